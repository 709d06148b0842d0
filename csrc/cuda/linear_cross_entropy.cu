// Cross entropy of rows of logits, and its gradient in their place. A block does a row: it reads it once for the
// maximum and the sums, which follow the maximum as it grows, and once more to write the gradient over it. Arithmetic
// is float32, a row's totals float64; each gradient is rounded once. The true class is left out of the sums: its
// gradient, p - 1, is minus the sum of the other probabilities, and its loss log1p of it where it leads the row, so
// that neither loses digits when p is near 1. A row whose target lies outside [0, V) and is not ignore_index gives NaN.
// The second kernel is for logits that are computed again, some classes at a time: lse is known, and so is the gradient
// at the target.
// Derivation: docs/ops/linear_cross_entropy.md.
#include <algorithm>

#include "reduce.cuh"
#include "stream.cuh"
#include "vec.cuh"

namespace llama_fast::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kPieces = 2;         // that a thread has in flight
constexpr int kPiecesAThread = 8;  // of a row, before a block takes more threads

template <class T>
struct CrossEntropy {
  Rows<T> logits;
  Global<const int64_t> targets;
  Global<const float> row_scale;
  Global<float> loss, lse;
  int64_t target_stride, scale_stride;
  int64_t V, ignore_index;
  double label_smoothing, z_loss;
  bool gradient;
};

// Sums over the columns that a thread has seen, the true class left out of all but the maximum.
struct Running {
  float max = -kInfinity;
  float shift = 0.0F;    // the maximum when it was last raised
  float exps = 0.0F;     // sum of e^(x - shift)
  float offsets = 0.0F;  // sum of x - shift
  float count = 0.0F;

  LLAMA_FAST_DEVICE void raise(float to) {
    if (exps != 0.0F) exps *= expf(shift - to);
    if (count != 0.0F) offsets += count * (shift - to);
    shift = to;
  }
};

template <class T, int kWidth>
LLAMA_FAST_DEVICE void add(Running& sums, const Piece<T, kWidth>& piece, int64_t c, int64_t V, int64_t target,
                           bool offsets) {
  float x[kWidth], largest = sums.max;
  piece.unpack(x);
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (c + i < V) largest = fmaxf(largest, x[i]);
  if (largest > sums.max) {
    sums.raise(largest);
    sums.max = largest;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (c + i >= V || c + i == target) continue;
    sums.exps += expf(x[i] - sums.shift);
    if (offsets) {
      sums.offsets += x[i] - sums.shift;
      sums.count += 1.0F;
    }
  }
}

// What the gradient's pass needs of a row: dlogit[v] = a e^(x[v] - max) - b, and `true_class` at the target.
struct RowGradient {
  float a, b, true_class;
};

// others, offsets: over the row without the target, relative to `max`.
LLAMA_FAST_DEVICE RowGradient finish_row(double max, double others, double offsets, double x_target, int64_t V,
                                         double smoothing, double z_loss, double scale, float* loss, float* lse) {
  const double offset = x_target - max, e_target = exp(offset), total = others + e_target;
  const double log_total = offset == 0.0 ? log1p(others) : log(total), log_sum = max + log_total;
  const double inverse_V = 1.0 / static_cast<double>(V);
  double l = log_total - offset;
  if (smoothing != 0.0) l = (1.0 - smoothing) * l + smoothing * (log_total - (offsets + offset) * inverse_V);
  if (z_loss != 0.0) l += z_loss * log_sum * log_sum;
  *loss = static_cast<float>(l);
  *lse = static_cast<float>(log_sum);
  const double z = z_loss != 0.0 ? 2.0 * z_loss * log_sum : 0.0;
  return {static_cast<float>(scale * (1.0 + z) / total), static_cast<float>(scale * smoothing * inverse_V),
          static_cast<float>(scale * ((z * e_target - others) / total + smoothing * (1.0 - inverse_V)))};
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads) cross_entropy_kernel(CrossEntropy<T> p) {
  LLAMA_FAST_SHARED(float, scratch, 3 * kMaxWarps);
  LLAMA_FAST_SHARED(float, shared_row, 3);
  const int64_t r = blockIdx.x, target = p.targets[r * p.target_stride];
  const Global<T> row = p.logits.row(r);
  const int64_t step = static_cast<int64_t>(blockDim.x) * kWidth, first = static_cast<int64_t>(threadIdx.x) * kWidth;
  if (target < 0 || target >= p.V || target == p.ignore_index) {
    const float value = target == p.ignore_index ? 0.0F : __builtin_nanf("");
    if (threadIdx.x == 0) p.loss[r] = p.lse[r] = value;
    if (p.gradient)
      for (int64_t c = threadIdx.x; c < p.V; c += blockDim.x) row[c] = from_float<T>(value);
    return;
  }
  const T target_logit = row[target];
  const bool offsets = p.label_smoothing != 0.0;
  Running sums;
  for (int64_t base = first; base < p.V; base += kPieces * step) {
    Piece<T, kWidth> pieces[kPieces];
#pragma unroll
    for (int j = 0; j < kPieces; ++j) pieces[j].load_written(row + (base + j * step), p.V - base - j * step);
#pragma unroll
    for (int j = 0; j < kPieces; ++j) add(sums, pieces[j], base + j * step, p.V, target, offsets);
  }
  const float max = block_reduce<Max>(sums.max, scratch);
  sums.raise(max);
  const float others = block_reduce<Add>(sums.exps, scratch + kMaxWarps);
  const float offset_sum = offsets ? block_reduce<Add>(sums.offsets, scratch + 2 * kMaxWarps) : 0.0F;
  if (threadIdx.x == 0) {
    const float scale = p.gradient ? static_cast<float>(p.row_scale[r * p.scale_stride]) : 0.0F;
    float loss, lse;
    const RowGradient g = finish_row(max, others, offset_sum, to_float(target_logit), p.V, p.label_smoothing, p.z_loss,
                                     scale, &loss, &lse);
    p.loss[r] = loss;
    p.lse[r] = lse;
    shared_row[0] = g.a;
    shared_row[1] = g.b;
    shared_row[2] = g.true_class;
  }
  if (!p.gradient) return;
  __syncthreads();
  const float a = shared_row[0], b = shared_row[1], true_class = shared_row[2];
  for (int64_t base = first; base < p.V; base += kPieces * step) {
    Piece<T, kWidth> pieces[kPieces];
#pragma unroll
    for (int j = 0; j < kPieces; ++j) pieces[j].load_written(row + (base + j * step), p.V - base - j * step);
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int64_t c = base + j * step;
      float x[kWidth];
      pieces[j].unpack(x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = c + i == target ? true_class : a * expf(x[i] - max) - b;
      pieces[j].pack(x);
      pieces[j].store(row + c, p.V - c);
    }
  }
}

template <class T>
struct CrossEntropyPiece {
  Rows<T> logits;
  Global<const int64_t> targets;
  Global<const T> dtarget;
  Global<const float> lse, row_scale;
  int64_t target_stride, scale_stride;
  int64_t k, first, V, ignore_index;
  float label_smoothing, z_loss;
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads) cross_entropy_piece_kernel(CrossEntropyPiece<T> p) {
  const int64_t r = blockIdx.x, target = p.targets[r * p.target_stride], place = target - p.first;
  const Global<T> row = p.logits.row(r);
  const int64_t step = static_cast<int64_t>(blockDim.x) * kWidth, begin = static_cast<int64_t>(threadIdx.x) * kWidth;
  const bool ignored = target == p.ignore_index;
  // Where the target is none of the classes lse is NaN, and so is the row. No test of z_loss, so that a row with an
  // infinite lse is NaN as well.
  const float lse = p.lse[r], scale = p.row_scale[r * p.scale_stride], true_class = to_float(p.dtarget[r]);
  const float a = scale * (1.0F + 2.0F * p.z_loss * lse), b = scale * (p.label_smoothing / static_cast<float>(p.V));
  for (int64_t base = begin; base < p.k; base += kPieces * step) {
    Piece<T, kWidth> pieces[kPieces];
#pragma unroll
    for (int j = 0; j < kPieces; ++j) pieces[j].load_written(row + (base + j * step), p.k - base - j * step);
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int64_t c = base + j * step;
      float x[kWidth];
      pieces[j].unpack(x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = ignored ? 0.0F : c + i == place ? true_class : a * expf(x[i] - lse) - b;
      pieces[j].pack(x);
      pieces[j].store(row + c, p.k - c);
    }
  }
}

// Threads that take a row's pieces in kPiecesAThread turns, or more where these would be too many.
int64_t threads_for(int64_t columns, int width) {
  const int64_t warps = ceil_div(ceil_div(columns, width * kPiecesAThread), kWarp);
  return std::clamp<int64_t>(warps * kWarp, kWarp, kMaxThreads);
}

}  // namespace

void cross_entropy_rows(const Tensor& logits, const Tensor& targets, const Tensor& row_scale, int64_t ignore_index,
                        double label_smoothing, double z_loss, const Tensor& loss, const Tensor& lse, Stream s) {
  const char* op = "linear_cross_entropy";
  const OnDevice device(op, s);
  const int64_t R = logits.size[0], V = logits.size[1];
  if (R == 0) return;
  with_dtype(logits.dtype, [&](auto tag) {
    using T = decltype(tag);
    const CrossEntropy<T> p{Rows<T>(logits),
                            targets.ptr<int64_t>(),
                            row_scale.ptr<float>(),
                            loss.ptr<float>(),
                            lse.ptr<float>(),
                            targets.stride[0],
                            row_scale.stride[0],
                            V,
                            ignore_index,
                            label_smoothing,
                            z_loss,
                            row_scale.data != nullptr};
    with_bool(rows_aligned(logits), [&](auto kAligned) {
      constexpr int kWidth = kAligned ? kLanes<T> : 1;
      launch(launch_of(op, s, grid(R), threads_for(V, kWidth)), cross_entropy_kernel<T, kWidth>, p);
    });
  });
}

void cross_entropy_piece(const Tensor& logits, const Tensor& targets, const Tensor& dtarget, const Tensor& lse,
                         const Tensor& row_scale, int64_t first, int64_t V, int64_t ignore_index,
                         double label_smoothing, double z_loss, Stream s) {
  const char* op = "linear_cross_entropy";
  const OnDevice device(op, s);
  const int64_t B = logits.size[0], k = logits.size[1];
  if (B == 0 || k == 0) return;
  with_dtype(logits.dtype, [&](auto tag) {
    using T = decltype(tag);
    const CrossEntropyPiece<T> p{Rows<T>(logits),
                                 targets.ptr<int64_t>(),
                                 dtarget.ptr<T>(),
                                 lse.ptr<float>(),
                                 row_scale.ptr<float>(),
                                 targets.stride[0],
                                 row_scale.stride[0],
                                 k,
                                 first,
                                 V,
                                 ignore_index,
                                 static_cast<float>(label_smoothing),
                                 static_cast<float>(z_loss)};
    with_bool(rows_aligned(logits), [&](auto kAligned) {
      constexpr int kWidth = kAligned ? kLanes<T> : 1;
      launch(launch_of(op, s, grid(B), threads_for(k, kWidth)), cross_entropy_piece_kernel<T, kWidth>, p);
    });
  });
}

}  // namespace llama_fast::cuda
