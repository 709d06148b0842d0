// The backward kernels of rms_norm and add_rms_norm: csrc/cuda/rms_norm.cu says which does what.
#pragma once

#include "rms_norm.cuh"

namespace llama_fast::cuda {

template <class T>
struct NormBwd {
  Rows<const T> dy, x, dsum;
  Global<const T> weight;
  Global<const float> rstd;
  Rows<T> dx;
  Global<float> partial;  // [parts, C]
  Global<float> means;    // [R]: of g x_hat; where rows are read twice
  int64_t R, C;
};

// A thread's sums of dweight into its block's row of partial, from column c on.
template <int kWidth>
LLAMA_FAST_DEVICE void store_sums(Global<float> partial, int64_t C, int64_t part, int64_t c,
                                  const float (&sums)[kWidth]) {
  const Global<float> row = partial + (part * C + c);
  if constexpr (kWidth > 1) {
    if (c + kWidth <= C && C % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWidth; i += 4)
        ptx::st_global_v4(row + i, make_uint4(bit_cast<uint32_t>(sums[i]), bit_cast<uint32_t>(sums[i + 1]),
                                              bit_cast<uint32_t>(sums[i + 2]), bit_cast<uint32_t>(sums[i + 3])));
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (c + i < C) row[i] = sums[i];
}

// dx = rstd (g - x_hat mean(g x_hat)) + dsum with g = dy w; `mean` is the row's.
LLAMA_FAST_DEVICE float norm_dx(float dy, float x, float w, float dsum, float rstd, float mean) {
  return rstd * (dy * w - x * rstd * mean) + dsum;
}

// Blocks of the walk over short rows on a multiprocessor: 48 KB of x and dy in flight. With dsum, registers for three
// would spill.
constexpr int short_blocks(bool add) { return add ? 2 : 3; }

// Short rows: a block walks over as many at once as it has place for, and adds the slots' dweight in order at the end.
template <class T, int kWidth, int kMine, bool kAdd>
__global__ void __launch_bounds__(kBwdThreads, short_blocks(kAdd)) norm_bwd_short_kernel(NormBwd<T> p, int lane_bits) {
  constexpr int kRows = kShortRows<kMine>;
  constexpr int kStride = kBwdThreads + kWarp / kWidth;  // of a value's sums: no bank twice
  LLAMA_FAST_SHARED(float, sums, kMine * kWidth * kStride);
  const ShortPlace at(lane_bits, kBwdThreads);
  const int C = static_cast<int>(p.C);
  const float inverse_C = 1.0F / static_cast<float>(C);
  float dweight[kMine][kWidth] = {}, w[kWidth], x_f32[kWidth], dy_f32[kWidth], dsum_f32[kWidth] = {};
  const int64_t turn = static_cast<int64_t>(kRows) * at.slots;
  for (int64_t base = blockIdx.x * turn; base < p.R; base += gridDim.x * turn) {
    Piece<T, kWidth> x[kRows][kMine], dy[kRows][kMine], dsum[kAdd ? kRows : 1][kMine];
    Piece<T, kWidth> weight[kMine];  // in the loop: from L1, for want of registers
    float rstd[kRows], means[kRows] = {};
#pragma unroll
    for (int j = 0; j < kMine; ++j) weight[j].load(p.weight + at.column<kWidth>(j), C - at.column<kWidth>(j));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t r = base + i * at.slots + at.slot;
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        const int c = at.column<kWidth>(j), n = r < p.R ? C - c : 0;
        x[i][j].load(p.x.row(r) + c, n);
        dy[i][j].load(p.dy.row(r) + c, n);
        if constexpr (kAdd) dsum[i][j].load(p.dsum.row(r) + c, n);
      }
      rstd[i] = 0.0F;
      if (r < p.R) rstd[i] = p.rstd[r];
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        weight[j].unpack(w);
        x[i][j].unpack(x_f32);
        dy[i][j].unpack(dy_f32);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) means[i] += dy_f32[k] * w[k] * (x_f32[k] * rstd[i]);
      }
    }
    at.reduce(means);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t r = base + i * at.slots + at.slot;
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        const int c = at.column<kWidth>(j);
        weight[j].unpack(w);
        x[i][j].unpack(x_f32);
        dy[i][j].unpack(dy_f32);
        if constexpr (kAdd) dsum[i][j].unpack(dsum_f32);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          dweight[j][k] += dy_f32[k] * (x_f32[k] * rstd[i]);
          x_f32[k] = norm_dx(dy_f32[k], x_f32[k], w[k], dsum_f32[k], rstd[i], means[i] * inverse_C);
        }
        x[i][j].pack(x_f32);
        x[i][j].store(p.dx.row(r) + c, r < p.R ? C - c : 0);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kMine; ++j)
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sums[(j * kWidth + k) * kStride + threadIdx.x] = dweight[j][k];
  __syncthreads();
  for (int c = threadIdx.x; c < C; c += kBwdThreads) {
    const int piece = c / kWidth, value = (piece >> lane_bits) * kWidth + c % kWidth;
    const Shared<float> mine = sums + (value * kStride + (piece & (at.lanes - 1)));
    float total = 0.0F;
#pragma unroll 8
    for (int slot = 0; slot < at.slots; ++slot) total += mine[slot << lane_bits];
    p.partial[static_cast<int64_t>(blockIdx.x) * C + c] = total;
  }
}

// A row is one piece a thread. Block b walks over rows b, b + blocks, ...
template <class T, bool kAdd>
__global__ void __launch_bounds__(kMaxThreads) norm_bwd_kernel(NormBwd<T> p) {
  constexpr int kWidth = kLanes<T>;
  LLAMA_FAST_SHARED(float, scratch, 2 * kMaxWarps);
  const int64_t c = threadIdx.x * kWidth, n = p.C - c;
  const float inverse_C = 1.0F / static_cast<float>(p.C);
  Piece<T, kWidth> weight, x, dy, dsum;
  float dweight[kWidth] = {}, w[kWidth], x_f32[kWidth], dy_f32[kWidth], dsum_f32[kWidth] = {};
  weight.load(p.weight + c, n);
  int half = 0;
  int64_t r = blockIdx.x;
  x.load(p.x.row(r) + c, n);
  dy.load(p.dy.row(r) + c, n);
  float rstd = p.rstd[r];
  while (r < p.R) {
    const int64_t next = r + gridDim.x, there = next < p.R ? n : 0, at = next < p.R ? next : r;
    Piece<T, kWidth> next_x, next_dy;
    next_x.load(p.x.row(at) + c, there);
    next_dy.load(p.dy.row(at) + c, there);
    if constexpr (kAdd) dsum.load(p.dsum.row(r) + c, n);
    const float next_rstd = p.rstd[at];

    weight.unpack(w);
    x.unpack(x_f32);
    dy.unpack(dy_f32);
    float dot = 0.0F;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) dot += dy_f32[i] * w[i] * (x_f32[i] * rstd);
    const float mean = block_reduce<Add>(dot, scratch + half) * inverse_C;
    half ^= kMaxWarps;
    if constexpr (kAdd) dsum.unpack(dsum_f32);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      dweight[i] += dy_f32[i] * (x_f32[i] * rstd);
      x_f32[i] = norm_dx(dy_f32[i], x_f32[i], w[i], dsum_f32[i], rstd, mean);
    }
    x.pack(x_f32);
    x.store(p.dx.row(r) + c, n);
    x = next_x;
    dy = next_dy;
    rstd = next_rstd;
    r = next;
  }
  store_sums(p.partial, p.C, blockIdx.x, c, dweight);
}

// A row is two pieces a thread, too many for the registers to hold the next row's beside dweight: those wait in shared
// memory, where each thread reads what it has copied itself.
template <class T>
struct Long {
  static constexpr int kWidth = kLanes<T>, kMine = 2, kStages = 2;
  static constexpr int64_t kColumns = int64_t{kWidth} * kMine * kMaxThreads;  // at most
  static constexpr int kSharedBytes = kStages * 2 * kMine * kMaxThreads * 16;
};

template <class T, bool kAdd>
__global__ void __launch_bounds__(kMaxThreads) norm_bwd_long_kernel(NormBwd<T> p) {
  constexpr int kWidth = Long<T>::kWidth, kMine = Long<T>::kMine;
  LLAMA_FAST_SHARED(float, scratch, 2 * kMaxWarps);
  LLAMA_FAST_DYNAMIC_SHARED(shared);
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth, step = int64_t{kMaxThreads} * kWidth;
  const uint32_t mine = shared_address(shared) + threadIdx.x * 16;
  const auto place = [&](int stage, int tensor, int j) {
    return mine + ((stage * 2 + tensor) * kMine + j) * (kMaxThreads * 16);
  };
  const auto copy_row = [&](int stage, int64_t r) {
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int64_t c = first + j * step, n = p.C - c;
      const uint32_t bytes = n >= kWidth ? 16 : n > 0 ? static_cast<uint32_t>(n * sizeof(T)) : 0;
      ptx::cp_async_16(place(stage, 0, j), p.x.row(r) + c, bytes);
      ptx::cp_async_16(place(stage, 1, j), p.dy.row(r) + c, bytes);
    }
  };
  const float inverse_C = 1.0F / static_cast<float>(p.C);
  float dweight[kMine][kWidth] = {};
  int half = 0, stage = 0;
  int64_t r = blockIdx.x;
  copy_row(stage, r);
  ptx::cp_async_commit_group();
  while (r < p.R) {
    const int64_t next = r + gridDim.x;
    if (next < p.R) copy_row(stage ^ 1, next);
    ptx::cp_async_commit_group();
    Piece<T, kWidth> piece, dsum[kAdd ? kMine : 1];
    if constexpr (kAdd) {
#pragma unroll
      for (int j = 0; j < kMine; ++j) dsum[j].load(p.dsum.row(r) + (first + j * step), p.C - first - j * step);
    }
    const float rstd = p.rstd[r];
    ptx::cp_async_wait_group<1>();

    float dot = 0.0F, w[kWidth], x[kWidth], dy[kWidth];
    const auto read = [&](int j) {
      piece.load(p.weight + (first + j * step), p.C - first - j * step);
      piece.unpack(w);
      piece.set(ptx::ld_shared_v4(place(stage, 0, j)));
      piece.unpack(x);
      piece.set(ptx::ld_shared_v4(place(stage, 1, j)));
      piece.unpack(dy);
    };
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      read(j);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) dot += dy[i] * w[i] * (x[i] * rstd);
    }
    const float mean = block_reduce<Add>(dot, scratch + half) * inverse_C;
    half ^= kMaxWarps;
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      float dsum_f32[kWidth] = {};
      read(j);
      if constexpr (kAdd) dsum[j].unpack(dsum_f32);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        dweight[j][i] += dy[i] * (x[i] * rstd);
        x[i] = norm_dx(dy[i], x[i], w[i], dsum_f32[i], rstd, mean);
      }
      piece.pack(x);
      piece.store(p.dx.row(r) + (first + j * step), p.C - first - j * step);
    }
    stage ^= 1;
    r = next;
  }
#pragma unroll
  for (int j = 0; j < kMine; ++j) store_sums(p.partial, p.C, blockIdx.x, first + j * step, dweight[j]);
}

// Any row: the mean of g x_hat alone.
template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads) norm_means_kernel(NormBwd<T> p) {
  constexpr int kAtOnce = 2;
  LLAMA_FAST_SHARED(float, scratch, kMaxWarps);
  const int64_t r = blockIdx.x, step = static_cast<int64_t>(blockDim.x) * kWidth, first = threadIdx.x * kWidth;
  const float rstd = p.rstd[r];
  float dot = 0.0F;
  for (int64_t base = first; base < p.C; base += kAtOnce * step) {
    Piece<T, kWidth> x[kAtOnce], dy[kAtOnce], weight[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t c = base + j * step;
      x[j].load(p.x.row(r) + c, p.C - c);
      dy[j].load(p.dy.row(r) + c, p.C - c);
      weight[j].load(p.weight + c, p.C - c);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      float w[kWidth], x_f32[kWidth], dy_f32[kWidth];
      weight[j].unpack(w);
      x[j].unpack(x_f32);
      dy[j].unpack(dy_f32);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) dot += dy_f32[i] * w[i] * (x_f32[i] * rstd);
    }
  }
  const float mean = block_reduce<Add>(dot, scratch) / static_cast<float>(p.C);
  if (threadIdx.x == 0) p.means[r] = mean;
}

// dx, and partial[part, c] = sum of dy x rstd over the part's rows: a piece of columns a thread. Blocks go through the
// slabs of columns of a part, then through the parts.
template <class T, int kWidth, bool kAdd>
__global__ void __launch_bounds__(kColumnThreads, 2) norm_bwd_columns_kernel(NormBwd<T> p, int slabs, int parts) {
  constexpr int kAtOnce = 4;
  const int part = blockIdx.x / slabs, slab = blockIdx.x % slabs;
  const int64_t c = (static_cast<int64_t>(slab) * kColumnThreads + threadIdx.x) * kWidth, n = p.C - c;
  const int64_t begin = p.R * part / parts, end = p.R * (part + 1) / parts;
  Piece<T, kWidth> weight;
  float dweight[kWidth] = {}, w[kWidth];
  weight.load(p.weight + c, n);
  weight.unpack(w);
  for (int64_t base = begin; base < end; base += kAtOnce) {
    Piece<T, kWidth> x[kAtOnce], dy[kAtOnce], dsum[kAdd ? kAtOnce : 1];
    float rstd[kAtOnce], means[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t r = base + i, there = r < end ? n : 0;
      x[i].load(p.x.row(r) + c, there);
      dy[i].load(p.dy.row(r) + c, there);
      if constexpr (kAdd) dsum[i].load(p.dsum.row(r) + c, there);
      rstd[i] = means[i] = 0.0F;
      if (r < end) {
        rstd[i] = p.rstd[r];
        means[i] = p.means[r];
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t r = base + i, there = r < end ? n : 0;
      float x_f32[kWidth], dy_f32[kWidth], dsum_f32[kWidth] = {};
      x[i].unpack(x_f32);
      dy[i].unpack(dy_f32);
      if constexpr (kAdd) dsum[i].unpack(dsum_f32);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        dweight[k] += dy_f32[k] * (x_f32[k] * rstd[i]);
        x_f32[k] = norm_dx(dy_f32[k], x_f32[k], w[k], dsum_f32[k], rstd[i], means[i]);
      }
      x[i].pack(x_f32);
      x[i].store(p.dx.row(r) + c, there);
    }
  }
  store_sums(p.partial, p.C, part, c, dweight);
}

// dweight[c] = sum of partial[:, c]. A block has 32 columns. Warp w takes parts w, w + 32, ... of them all, then column
// w's 32 sums, which it adds pairwise: in order, the error would grow by 31 roundings instead of 5.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    norm_dweight_sum_kernel(Global<const float> partial, Global<T> dweight, int64_t parts, int64_t C) {
  constexpr int kStride = kWarp + 1;  // of a warp's sums: no bank twice
  LLAMA_FAST_SHARED(float, sums, kWarp* kStride);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarp;
  float total = 0.0F;
  if (first + lane < C) {
#pragma unroll 4
    for (int64_t part = warp; part < parts; part += kWarp) total += partial[part * C + first + lane];
  }
  sums[warp * kStride + lane] = total;
  __syncthreads();
  total = warp_reduce<Add>(sums[lane * kStride + warp]);
  if (lane == 0 && first + warp < C) dweight[first + warp] = from_float<T>(total);
}

}  // namespace llama_fast::cuda
