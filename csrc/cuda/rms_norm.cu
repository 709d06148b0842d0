// rms_norm and add_rms_norm. A block does a row; sums are float32, y and dx are rounded once. add_rms_norm rounds
// x + residual to T and normalises the rounded sum.
//
// The forward reads a row once and holds it in registers where it fits (kHeld), else reads it a second time. The
// backward's blocks walk over rows, the next row's pieces in flight while one is reduced, and add dweight in registers:
// one float32 row of `partial` a block, summed in order by a second kernel. Longer rows wait in shared memory instead
// of registers; still longer or unaligned ones take two kernels that read x and dy once each. Derivation:
// docs/ops/rms_norm.md.
#include <algorithm>

#include "reduce.cuh"
#include "stream.cuh"
#include "vec.cuh"

namespace llama_fast::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kPieces = 4;           // of a thread of the forward at once: 64 bytes in flight
constexpr int kSumWarps = 8;         // share the parts of 32 columns of dweight
constexpr int kColumnThreads = 256;  // norm_dweight_columns: one column a thread

int threads_for(int64_t pieces) {
  return static_cast<int>(std::min<int64_t>(ceil_div(std::max<int64_t>(pieces, 1), kWarp) * kWarp, kMaxThreads));
}

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

template <class T>
struct NormBwd {
  Rows<const T> dy, x, dsum;
  Global<const T> weight;
  Global<const float> rstd;
  Rows<T> dx;
  Global<float> partial;  // [parts, C]
  int64_t R, C;
};

// dx = rstd (g - x_hat mean(g x_hat)) + dsum with g = dy w; `mean` is the row's.
LLAMA_FAST_DEVICE float norm_dx(float dy, float x, float w, float dsum, float rstd, float mean) {
  return rstd * (dy * w - x * rstd * mean) + dsum;
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
  const Global<float> partial = p.partial + (static_cast<int64_t>(blockIdx.x) * p.C + c);
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (i < n) partial[i] = dweight[i];
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
  for (int j = 0; j < kMine; ++j) {
    const int64_t c = first + j * step;
    const Global<float> partial = p.partial + (static_cast<int64_t>(blockIdx.x) * p.C + c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (c + i < p.C) partial[i] = dweight[j][i];
  }
}

// Any row: reads x and dy twice, the second time from the caches.
template <class T, int kWidth, bool kAdd>
__global__ void __launch_bounds__(kMaxThreads) norm_dx_kernel(NormBwd<T> p) {
  LLAMA_FAST_SHARED(float, scratch, kMaxWarps);
  const int64_t r = blockIdx.x, step = static_cast<int64_t>(blockDim.x) * kWidth, first = threadIdx.x * kWidth;
  const float rstd = p.rstd[r];
  Piece<T, kWidth> piece;
  float w[kWidth], x[kWidth], dy[kWidth], dsum[kWidth] = {}, dot = 0.0F;
  for (int64_t c = first; c < p.C; c += step) {
    piece.load(p.weight + c, p.C - c);
    piece.unpack(w);
    piece.load(p.x.row(r) + c, p.C - c);
    piece.unpack(x);
    piece.load(p.dy.row(r) + c, p.C - c);
    piece.unpack(dy);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) dot += dy[i] * w[i] * (x[i] * rstd);
  }
  const float mean = block_reduce<Add>(dot, scratch) / static_cast<float>(p.C);
  for (int64_t c = first; c < p.C; c += step) {
    piece.load(p.weight + c, p.C - c);
    piece.unpack(w);
    piece.load(p.x.row(r) + c, p.C - c);
    piece.unpack(x);
    piece.load(p.dy.row(r) + c, p.C - c);
    piece.unpack(dy);
    if constexpr (kAdd) {
      piece.load(p.dsum.row(r) + c, p.C - c);
      piece.unpack(dsum);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = norm_dx(dy[i], x[i], w[i], dsum[i], rstd, mean);
    piece.pack(x);
    piece.store(p.dx.row(r) + c, p.C - c);
  }
}

// partial[part, c] = sum of dy x rstd over the part's rows, a piece of columns a thread; blockIdx.y is the part.
template <class T, int kWidth>
__global__ void __launch_bounds__(kColumnThreads) norm_dweight_columns_kernel(NormBwd<T> p) {
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x) * kWidth, n = p.C - c;
  const int64_t parts = gridDim.y, part = blockIdx.y, begin = p.R * part / parts, end = p.R * (part + 1) / parts;
  float dweight[kWidth] = {};
#pragma unroll 4
  for (int64_t r = begin; r < end; ++r) {
    Piece<T, kWidth> x, dy;
    float x_f32[kWidth], dy_f32[kWidth];
    x.load(p.x.row(r) + c, n);
    dy.load(p.dy.row(r) + c, n);
    const float rstd = p.rstd[r];
    x.unpack(x_f32);
    dy.unpack(dy_f32);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) dweight[i] += dy_f32[i] * (x_f32[i] * rstd);
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (i < n) p.partial[part * p.C + c + i] = dweight[i];
}

// dweight[c] = sum of partial[:, c]: warp w takes parts w, w + kSumWarps, ..., and the warps' sums are added in order.
template <class T>
__global__ void __launch_bounds__(kWarp* kSumWarps)
    norm_dweight_sum_kernel(Global<const float> partial, Global<T> dweight, int64_t parts, int64_t C) {
  LLAMA_FAST_SHARED(float, sums, kWarp* kSumWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float total = 0.0F;
  if (c < C) {
#pragma unroll 4
    for (int64_t part = warp; part < parts; part += kSumWarps) total += partial[part * C + c];
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  if (warp != 0 || c >= C) return;
  total = 0.0F;
#pragma unroll
  for (int w = 0; w < kSumWarps; ++w) total += sums[w * kWarp + lane];
  dweight[c] = from_float<T>(total);
}

// Bytes of shared memory that a block may have ("Compute Capabilities", CUDA C++ Programming Guide).
int64_t most_shared(int architecture) {
  const int64_t kib = architecture == 80 || architecture == 87   ? 163
                      : architecture >= 90 && architecture < 120 ? 227
                                                                 : 99;
  return kib << 10;
}

template <bool kAdd>
void norm_fwd(const char* op, const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
              const Tensor& y, const Tensor& sum, const Tensor& rstd, Stream s) {
  const OnDevice device(op, s);
  const int64_t R = x.size[0], C = x.size[1];
  if (R == 0) return;
  const bool aligned =
      rows_aligned(x) && rows_aligned(residual) && rows_aligned(weight) && rows_aligned(y) && rows_aligned(sum);
  with_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormFwd<T> p{Rows<const T>(x),
                       Rows<const T>(residual),
                       weight.ptr<T>(),
                       Rows<T>(y),
                       Rows<T>(sum),
                       rstd.ptr<float>(),
                       C,
                       static_cast<float>(eps)};
    const auto run = [&](auto kWidth, auto kHeld) {
      launch(launch_of(op, s, grid(R), threads_for(ceil_div(ceil_div(C, kWidth), kPieces))),
             norm_fwd_kernel<T, kWidth, kHeld, kAdd>, p);
    };
    constexpr std::integral_constant<int, kLanes<T>> kLong;
    if (!aligned)
      run(std::integral_constant<int, 1>{}, std::false_type{});
    else if (C <= int64_t{kLong} * kPieces * kMaxThreads)
      run(kLong, std::true_type{});
    else
      run(kLong, std::false_type{});
  });
}

template <bool kAdd>
void norm_bwd(const char* op, const Tensor& dy, const Tensor& dsum, const Tensor& x, const Tensor& weight,
              const Tensor& rstd, const Tensor& dx, const Tensor& dweight, const Tensor& partial, Stream s) {
  const OnDevice device(op, s);
  const int64_t R = x.size[0], C = x.size[1], parts = partial.size[0];
  if (C == 0) return;
  const bool aligned =
      rows_aligned(dy) && rows_aligned(dsum) && rows_aligned(x) && rows_aligned(weight) && rows_aligned(dx);
  with_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormBwd<T> p{Rows<const T>(dy),
                       Rows<const T>(x),
                       Rows<const T>(dsum),
                       weight.ptr<T>(),
                       rstd.ptr<float>(),
                       Rows<T>(dx),
                       partial.ptr<float>(),
                       R,
                       C};
    constexpr int kLong = kLanes<T>;
    const auto run_any = [&](auto kWidth) {
      launch(launch_of(op, s, grid(R), threads_for(ceil_div(C, kWidth))), norm_dx_kernel<T, kWidth, kAdd>, p);
      launch(launch_of(op, s, grid(ceil_div(C, kColumnThreads * kWidth), parts), kColumnThreads),
             norm_dweight_columns_kernel<T, kWidth>, p);
    };
    if (R == 0) {
      // dweight = 0
    } else if (aligned && C <= int64_t{kLong} * kMaxThreads) {
      launch(launch_of(op, s, grid(parts), threads_for(ceil_div(C, kLong))), norm_bwd_kernel<T, kAdd>, p);
    } else if (aligned && C <= Long<T>::kColumns && Long<T>::kSharedBytes <= most_shared(architecture(s.device))) {
      launch(launch_of(op, s, grid(parts), kMaxThreads, Long<T>::kSharedBytes), norm_bwd_long_kernel<T, kAdd>, p);
    } else if (aligned) {
      run_any(std::integral_constant<int, kLong>{});
    } else {
      run_any(std::integral_constant<int, 1>{});
    }
    launch(launch_of(op, s, grid(ceil_div(C, kWarp)), kWarp * kSumWarps), norm_dweight_sum_kernel<T>,
           Global<const float>(partial.ptr<const float>()), Global<T>(dweight.ptr<T>()), parts, C);
  });
}

}  // namespace

// As many blocks of the backward as a device holds at 64 registers a thread, and no more than rows.
int64_t norm_parts(int64_t R, int64_t C, int64_t item, int device) {
  constexpr int64_t kThreadsPerProcessor = 1024, kMostBlocks = 32;
  const int64_t threads = threads_for(ceil_div(C * item, 16));
  return std::min(R, multiprocessors(device) * std::min(kThreadsPerProcessor / threads, kMostBlocks));
}

void rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps, const Tensor& y, const Tensor& rstd, Stream s) {
  norm_fwd<false>("rms_norm_fwd", x, Tensor{}, weight, eps, y, Tensor{}, rstd, s);
}

void rms_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, const Tensor& dx,
                  const Tensor& dweight, const Tensor& partial, Stream s) {
  norm_bwd<false>("rms_norm_bwd", dy, Tensor{}, x, weight, rstd, dx, dweight, partial, s);
}

void add_rms_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const Tensor& y,
                      const Tensor& sum, const Tensor& rstd, Stream s) {
  norm_fwd<true>("add_rms_norm_fwd", x, residual, weight, eps, y, sum, rstd, s);
}

void add_rms_norm_bwd(const Tensor& dy, const Tensor& dsum, const Tensor& sum, const Tensor& weight, const Tensor& rstd,
                      const Tensor& dx, const Tensor& dweight, const Tensor& partial, Stream s) {
  norm_bwd<true>("add_rms_norm_bwd", dy, dsum, sum, weight, rstd, dx, dweight, partial, s);
}

}  // namespace llama_fast::cuda
