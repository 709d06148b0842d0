// The place of each row's largest number, the first of equals, as torch's argmax: the first NaN where there is one.
#ifndef LF_ISA

#include "simd.h"

#define LF_THIS_FILE "argmax.cpp"
#include "each_isa.h"

namespace llama_fast::cpu {

void argmax(const Tensor& x, const Tensor& best) { LF_DISPATCH(argmax, x, best); }

}  // namespace llama_fast::cpu

#else

namespace llama_fast::cpu::LF_ISA {
namespace {

constexpr int64_t kBlock = 1024;

template <class T>
int64_t argmax_one_by_one(const T* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float value = to_float(x[i]);
    if (std::isnan(value)) return i;
    if (value > to_float(x[best])) best = i;
  }
  return best;
}

// The first block with the largest maximum, and the place in it.
template <class T>
int64_t argmax_row(const T* x, int64_t n) {
  constexpr float kLeast = -std::numeric_limits<float>::infinity();
  float best = kLeast;
  int64_t first = 0;
  VecF zeros(0.0F);  // NaN where a number is not finite: comparisons would not see a NaN
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    VecF top(kLeast);
    int64_t i = begin;
    for (; i + VecF::kLanes <= end; i += VecF::kLanes) {
      const VecF value = load(x + i);
      top = max(top, value);
      zeros = fma(value, VecF(0.0F), zeros);
    }
    float block_best = max(top);
    for (; i < end; ++i) {
      const float value = to_float(x[i]);
      block_best = value > block_best ? value : block_best;
      zeros = fma(VecF(value), VecF(0.0F), zeros);
    }
    if (block_best > best) {
      best = block_best;
      first = begin;
    }
  }
  if (!(sum(zeros) == 0.0F)) return argmax_one_by_one(x, n);
  while (to_float(x[first]) != best) ++first;
  return first;
}

void argmax(const Tensor& x, const Tensor& best) {
  with_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t r = 0; r < x.size[0]; ++r)
      best.ptr<int64_t>()[r] = argmax_row(x.ptr<T>() + r * x.stride[0], x.size[1]);
  });
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA

#endif
