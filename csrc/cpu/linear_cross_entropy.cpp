// Cross entropy of rows of logits, and its gradient in their place. Arithmetic is float32, a row's totals float64; each
// gradient is rounded once, over the logit it belongs to. The true class's term of the gradient, p - 1, is computed as
// minus the sum of the other probabilities, and its loss as log1p of it where it leads the row, so that neither loses
// digits when p is near 1. A row whose target lies outside [0, V) and is not ignore_index gives NaN. One thread does a
// row: bitwise equal for every number of threads. Derivation: docs/ops/linear_cross_entropy.md.
#ifndef LF_ISA

#include <type_traits>

#include "parallel.h"
#include "simd.h"

#define LF_THIS_FILE "linear_cross_entropy.cpp"
#include "each_isa.h"

namespace llama_fast::cpu {

void cross_entropy_rows(const Tensor& logits, const Tensor& targets, const Tensor& row_scale, int64_t ignore_index,
                        double label_smoothing, double z_loss, const Tensor& loss, const Tensor& lse) {
  LF_DISPATCH(cross_entropy, logits, targets, row_scale, ignore_index, label_smoothing, z_loss, loss, lse);
}

}  // namespace llama_fast::cpu

#else

namespace llama_fast::cpu::LF_ISA {
namespace {

constexpr int kLanes = VecF::kLanes;
constexpr int64_t kBlock = 4096;  // columns summed in float32 before the total goes to float64
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
float max_of(const T* x, int64_t V) {
  VecF m0(-kInfinity), m1(-kInfinity);
  int64_t v = 0;
  for (; v + 2 * kLanes <= V; v += 2 * kLanes) {
    m0 = max(load(x + v), m0);
    m1 = max(load(x + v + kLanes), m1);
  }
  for (; v < V; v += kLanes) m0 = max(load_n(x + v, std::min<int64_t>(V - v, kLanes), -kInfinity), m0);
  return max(max(m0, m1));
}

struct Sums {
  double exps = 0.0;     // sum of e^(x - m)
  double offsets = 0.0;  // sum of x - m, when asked for
};

// Adds columns [begin, end) of a row with maximum m.
template <bool kOffsets, class T>
void add_sums(const T* x, int64_t begin, int64_t end, float m, Sums& sums) {
  const VecF shift(m);
  while (begin < end) {
    const int64_t stop = std::min(end, begin + kBlock);
    VecF e0(0.0F), e1(0.0F), offsets(0.0F);
    int64_t v = begin;
    for (; v + 2 * kLanes <= stop; v += 2 * kLanes) {
      const VecF a = load(x + v) - shift, b = load(x + v + kLanes) - shift;
      e0 = e0 + exp(a);
      e1 = e1 + exp(b);
      if constexpr (kOffsets) offsets = offsets + (a + b);
    }
    for (; v < stop; v += kLanes) {
      const int64_t n = std::min<int64_t>(stop - v, kLanes);
      e0 = e0 + exp(load_n(x + v, n, -kInfinity) - shift);
      if constexpr (kOffsets) offsets = offsets + (load_n(x + v, n, m) - shift);
    }
    sums.exps += sum(e0 + e1);
    sums.offsets += sum(offsets);
    begin = stop;
  }
}

// x[v] = a e^(x[v] - m) - b
template <class T>
void to_gradient(T* x, int64_t V, float m, float a, float b) {
  const VecF shift(m), scale(a), minus(-b);
  int64_t v = 0;
  for (; v + 2 * kLanes <= V; v += 2 * kLanes) {
    const VecF p = exp(load(x + v) - shift), q = exp(load(x + v + kLanes) - shift);
    store(x + v, fma(p, scale, minus));
    store(x + v + kLanes, fma(q, scale, minus));
  }
  for (; v < V; v += kLanes) {
    const int64_t n = std::min<int64_t>(V - v, kLanes);
    store_n(x + v, fma(exp(load_n(x + v, n) - shift), scale, minus), n);
  }
}

template <class T>
void fill(T* x, int64_t V, float value) {
  for (int64_t v = 0; v < V; ++v) x[v] = from_float<T>(value);
}

struct Options {
  double smoothing, z_loss;
};

// scale: null where no gradient is wanted.
template <class T>
void cross_entropy_row(T* x, int64_t V, int64_t target, const float* scale, Options o, float* loss, float* lse) {
  const float m = max_of(x, V), x_target = to_float(x[target]);
  Sums others;
  if (o.smoothing != 0.0) {
    add_sums<true>(x, 0, target, m, others);
    add_sums<true>(x, target + 1, V, m, others);
  } else {
    add_sums<false>(x, 0, target, m, others);
    add_sums<false>(x, target + 1, V, m, others);
  }
  const double offset = static_cast<double>(x_target) - m;
  const double e_target = std::exp(offset), total = others.exps + e_target;
  const double log_total = offset == 0.0 ? std::log1p(others.exps) : std::log(total);
  const double log_sum = m + log_total, inverse_V = 1.0 / static_cast<double>(V);
  double l = log_total - offset;
  if (o.smoothing != 0.0)
    l = (1.0 - o.smoothing) * l + o.smoothing * (log_total - (others.offsets + offset) * inverse_V);
  if (o.z_loss != 0.0) l += o.z_loss * log_sum * log_sum;
  *loss = static_cast<float>(l);
  *lse = static_cast<float>(log_sum);
  if (scale == nullptr) return;
  const double z = o.z_loss != 0.0 ? 2.0 * o.z_loss * log_sum : 0.0, s = *scale;
  to_gradient(x, V, m, static_cast<float>(s * (1.0 + z) / total), static_cast<float>(s * o.smoothing * inverse_V));
  const double d_target = (z * e_target - others.exps) / total + o.smoothing * (1.0 - inverse_V);
  x[target] = from_float<T>(static_cast<float>(s * d_target));
}

void cross_entropy(const Tensor& logits, const Tensor& targets, const Tensor& row_scale, int64_t ignore_index,
                   double label_smoothing, double z_loss, const Tensor& loss, const Tensor& lse) {
  const int64_t R = logits.size[0], V = logits.size[1];
  with_dtype(logits.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_tasks(R, [&](int64_t r, int64_t) {
      const FlushSubnormals flush;  // of probabilities: where logits are far apart, most are that small
      T* x = logits.ptr<T>() + r * logits.stride[0];
      const int64_t target = targets.ptr<int64_t>()[r * targets.stride[0]];
      const float* scale = row_scale.data == nullptr ? nullptr : row_scale.ptr<float>() + r * row_scale.stride[0];
      float* loss_r = loss.ptr<float>() + r * loss.stride[0];
      float* lse_r = lse.ptr<float>() + r * lse.stride[0];
      if (target >= 0 && target < V && target != ignore_index) {
        cross_entropy_row(x, V, target, scale, {label_smoothing, z_loss}, loss_r, lse_r);
      } else {
        const float value = target == ignore_index ? 0.0F : std::numeric_limits<float>::quiet_NaN();
        *loss_r = *lse_r = value;
        if (scale != nullptr) fill(x, V, value);
      }
    });
  });
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA

#endif
