// The matrix-vector product of a decode, y = x W^T for one to eight rows of x: W is read once, at the rate of memory.
// Sums are float32 and rounded once. One thread does an output: bitwise equal for every number of threads, and each row
// bitwise equal to that row alone. Several products of one x are one loop: a thread goes on to the next matrix at once.
#ifndef LF_ISA

#include "parallel.h"
#include "simd.h"

#define LF_THIS_FILE "linear.cpp"
#include "each_isa.h"

namespace llama_fast::cpu {

void gemv_group(const Tensor& x, const Tensor* weights, const Tensor* ys, int count) {
  LF_DISPATCH(gemv_group, x, weights, ys, count);
}

void gemv(const Tensor& x, const Tensor& weight, const Tensor& y) { gemv_group(x, &weight, &y, 1); }

}  // namespace llama_fast::cpu

#else

namespace llama_fast::cpu::LF_ISA {
namespace {

constexpr int64_t kGrainElements = 32768;  // of W, a thread's least share
constexpr int kChains = 2;                 // sums along a row of W, which hide the latency of a multiply-add

template <class T>
using Unit = typename UnitOf<T>::type;
// Elements of T that `multiply` takes at a time.
template <class T>
constexpr int64_t kStep = VecF::kLanes * kPerUnit<Unit<T> >;

// acc + a b
template <class T>
LF_INLINE VecF multiply(const T* a, const T* b, VecF acc) {
  if constexpr (kPerUnit<Unit<T> > == 2)
    return dot(load_units(reinterpret_cast<const Unit<T>*>(a)), load_units(reinterpret_cast<const Unit<T>*>(b)), acc);
  else
    return fma(load(a), load(b), acc);
}

// y[r] = the dot product of row r of x and one row of W. One row of W at a time, in the order of memory, is what the
// processor's own prefetching follows best (docs/ops/linear.md).
template <int kRows, class T>
void gemv_row(const T* x, int64_t x_stride, const T* w, T* y, int64_t y_stride, int64_t K) {
  VecF acc[kRows][kChains];
  for (auto& row : acc)
    for (VecF& a : row) a = VecF(0.0F);
  int64_t k = 0;
  for (; k + kChains * kStep<T> <= K; k += kChains * kStep<T>)
    for (int i = 0; i < kChains; ++i)
      for (int r = 0; r < kRows; ++r)
        acc[r][i] = multiply(x + r * x_stride + k + i * kStep<T>, w + k + i * kStep<T>, acc[r][i]);
  for (; k < K; k += VecF::kLanes) {
    const int64_t n = std::min<int64_t>(VecF::kLanes, K - k);
    for (int r = 0; r < kRows; ++r) acc[r][0] = fma(load_n(x + r * x_stride + k, n), load_n(w + k, n), acc[r][0]);
  }
  for (int r = 0; r < kRows; ++r) y[r * y_stride] = from_float<T>(sum(acc[r][0] + acc[r][1]));
}

// Output `o` of all rows of x, four at a time: the row of W comes from memory once.
template <class T>
void gemv_output(const Tensor& x, const Tensor& weight, const Tensor& y, int64_t o) {
  const int64_t K = x.size[1], R = x.size[0];
  const auto rows = [&](auto count, int64_t r) {
    gemv_row<decltype(count)::value, T>(x.ptr<T>() + r * x.stride[0], x.stride[0],
                                        weight.ptr<T>() + o * weight.stride[0], y.ptr<T>() + r * y.stride[0] + o,
                                        y.stride[0], K);
  };
  int64_t r = 0;
  for (; r + 4 <= R; r += 4) rows(std::integral_constant<int, 4>{}, r);
  if (R - r == 3) rows(std::integral_constant<int, 3>{}, r);
  if (R - r == 2) rows(std::integral_constant<int, 2>{}, r);
  if (R - r == 1) rows(std::integral_constant<int, 1>{}, r);
}

// Outputs of all the products, one after the other, are the loop's items.
void gemv_group(const Tensor& x, const Tensor* weights, const Tensor* ys, int count) {
  if (x.size[0] < 1 || x.size[0] > kGemvRows) throw std::invalid_argument("x: gemv takes 1 to 8 rows");
  int64_t outputs = 0;
  for (int i = 0; i < count; ++i) outputs += weights[i].size[0];
  with_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(outputs, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(x.size[1], 1)),
                 [&](int64_t begin, int64_t end) {
                   for (int i = 0; i < count && end > 0; ++i) {
                     const int64_t N = weights[i].size[0];
                     for (int64_t o = std::max<int64_t>(begin, 0); o < std::min(end, N); ++o)
                       gemv_output<T>(x, weights[i], ys[i], o);
                     begin -= N;
                     end -= N;
                   }
                 });
  });
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA

#endif
