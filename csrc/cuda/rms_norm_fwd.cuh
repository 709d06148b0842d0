// The forward kernels of rms_norm and add_rms_norm: csrc/cuda/rms_norm.cu says which does what.
#pragma once

#include "rms_norm.cuh"

namespace llama_fast::cuda {

template <class T>
struct NormFwd {
  Rows<const T> x, residual;
  Global<const T> weight;
  Rows<T> y, sum;
  Global<float> rstd;
  int64_t C;
  float eps;
};

// x^(-1/2) within 0.6 units in the last place: a Newton step from the rounded quotient, its residual by fused products.
LLAMA_FAST_DEVICE float reciprocal_sqrt(float x) {
  const float r = 1.0F / sqrtf(x), product = x * r, lost = fmaf(x, r, -product);
  const float residual = fmaf(-product, r, 1.0F) - lost * r;
  return x > 0.0F && x < kInfinity ? fmaf(0.5F * r, residual, r) : r;
}

// a b c; for float32 without the rounding of a b.
template <class T>
LLAMA_FAST_DEVICE float product(float a, float b, float c) {
  const float ab = a * b;
  if constexpr (sizeof(T) == 4) {
    const float better = fmaf(ab, c, fmaf(a, b, -ab) * c);
    if (fabsf(better) < kInfinity) return better;
  }
  return ab * c;
}

template <class T, int kWidth, int kMine, bool kAdd>
__global__ void __launch_bounds__(kFwdThreads) norm_fwd_short_kernel(NormFwd<T> p, int64_t R, int lane_bits) {
  constexpr int kRows = kShortRows<kMine>;
  const ShortPlace at(lane_bits, kFwdThreads);
  const int C = static_cast<int>(p.C);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows * at.slots + at.slot;
  Piece<T, kWidth> held[kRows][kMine], others[kAdd ? kRows : 1][kMine];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t r = first + i * at.slots;
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int c = at.column<kWidth>(j), n = r < R ? C - c : 0;
      held[i][j].load(p.x.row(r) + c, n);
      if constexpr (kAdd) others[i][j].load(p.residual.row(r) + c, n);
    }
  }
  float x[kWidth], squares[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    [[maybe_unused]] const int64_t r = first + i * at.slots;
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      held[i][j].unpack(x);
      if constexpr (kAdd) {
        const int c = at.column<kWidth>(j);
        float other[kWidth];
        others[i][j].unpack(other);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) x[k] += other[k];
        held[i][j].pack(x);
        held[i][j].store(p.sum.row(r) + c, r < R ? C - c : 0);
        held[i][j].unpack(x);
      }
#pragma unroll
      for (int k = 0; k < kWidth; ++k) squares[i] += x[k] * x[k];
    }
  }
  at.reduce(squares);
  float rstd[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t r = first + i * at.slots;
    rstd[i] = reciprocal_sqrt(squares[i] / static_cast<float>(C) + p.eps);
    if (at.lane == 0 && r < R) p.rstd[r] = rstd[i];
  }
#pragma unroll
  for (int j = 0; j < kMine; ++j) {
    const int c = at.column<kWidth>(j);
    Piece<T, kWidth> weight;
    float w[kWidth];
    weight.load(p.weight + c, C - c);
    weight.unpack(w);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t r = first + i * at.slots;
      held[i][j].unpack(x);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) x[k] = product<T>(x[k], rstd[i], w[k]);
      held[i][j].pack(x);
      held[i][j].store(p.y.row(r) + c, r < R ? C - c : 0);
    }
  }
}

template <class T, int kWidth, bool kHeld, bool kAdd>
__global__ void __launch_bounds__(kMaxThreads) norm_fwd_kernel(NormFwd<T> p) {
  LLAMA_FAST_SHARED(float, scratch, kMaxWarps);
  const int64_t r = blockIdx.x, step = static_cast<int64_t>(blockDim.x) * kWidth, first = threadIdx.x * kWidth;
  Piece<T, kWidth> held[kPieces];
  float x[kWidth], squares = 0.0F;
  for (int64_t base = first; base < p.C; base += kPieces * step) {  // once where the row is held
#pragma unroll
    for (int j = 0; j < kPieces; ++j) held[j].load(p.x.row(r) + base + j * step, p.C - base - j * step);
    if constexpr (kAdd) {
      Piece<T, kWidth> others[kPieces];
#pragma unroll
      for (int j = 0; j < kPieces; ++j) others[j].load(p.residual.row(r) + base + j * step, p.C - base - j * step);
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        float other[kWidth];
        held[j].unpack(x);
        others[j].unpack(other);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) x[i] += other[i];
        held[j].pack(x);
        held[j].store(p.sum.row(r) + base + j * step, p.C - base - j * step);
      }
    }
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      held[j].unpack(x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) squares += x[i] * x[i];
    }
  }
  const float rstd = reciprocal_sqrt(block_reduce<Add>(squares, scratch) / static_cast<float>(p.C) + p.eps);
  if (threadIdx.x == 0) p.rstd[r] = rstd;
  for (int64_t base = first; base < p.C; base += kPieces * step) {
    if constexpr (!kHeld) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int64_t c = base + j * step;
        if constexpr (kAdd)
          held[j].load_written(p.sum.row(r) + c, p.C - c);
        else
          held[j].load(p.x.row(r) + c, p.C - c);
      }
    }
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int64_t c = base + j * step;
      Piece<T, kWidth> piece;
      float w[kWidth];
      piece.load(p.weight + c, p.C - c);
      piece.unpack(w);
      held[j].unpack(x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = product<T>(x[i], rstd, w[i]);
      piece.pack(x);
      piece.store(p.y.row(r) + c, p.C - c);
    }
  }
}

}  // namespace llama_fast::cuda
