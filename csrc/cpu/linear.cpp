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
// Rows of W that a thread reads at once, far from each other, and how far ahead of their use it asks for them: with one
// row at a time a core of Intel's servers has too few loads on their way (docs/ops/linear.md).
constexpr int kStreams = 8;
constexpr int64_t kAhead = 512, kLine = 64;  // bytes
// Where the sums of so many rows do not fit the registers, those of fewer take turns, of that many bytes.
constexpr int64_t kTurn = 256;
constexpr int kSumsInRegisters = VecF::kRegisters / 2;

template <class T>
using Unit = typename UnitOf<T>::type;
// Elements of T that `multiply` takes at a time.
template <class T>
constexpr int64_t kStep = VecF::kLanes * kPerUnit<Unit<T> >;

using Sums = VecF[kChains];  // of one output

// acc + a b
template <class T>
LF_INLINE VecF multiply(const T* a, const T* b, VecF acc) {
  if constexpr (kPerUnit<Unit<T> > == 2)
    return dot(load_units(reinterpret_cast<const Unit<T>*>(a)), load_units(reinterpret_cast<const Unit<T>*>(b)), acc);
  else
    return fma(load(a), load(b), acc);
}

// sums[o][r] += terms [0, K) of row r of x and row o of W, in the same order for all numbers of rows.
template <bool kAsk, int kOutputs, int kRows, class T>
LF_INLINE void add_terms(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t K, Sums (*sums)[kRows]) {
  constexpr int64_t kBytes = kChains * kStep<T> * static_cast<int64_t>(sizeof(T));
  static_assert(kTurn % kBytes == 0, "a term would go to another chain");
  VecF acc[kOutputs][kRows][kChains];
  std::memcpy(acc, sums, sizeof(acc));
  int64_t k = 0;
  for (; k + kChains * kStep<T> <= K; k += kChains * kStep<T>) {
    if (kAsk)
      for (int o = 0; o < kOutputs; ++o)
        for (int64_t line = 0; line < kBytes; line += kLine)
          __builtin_prefetch(reinterpret_cast<const char*>(w + o * w_stride + k) + kAhead + line);
    for (int i = 0; i < kChains; ++i)
      for (int o = 0; o < kOutputs; ++o)
        for (int r = 0; r < kRows; ++r)
          acc[o][r][i] =
              multiply(x + r * x_stride + k + i * kStep<T>, w + o * w_stride + k + i * kStep<T>, acc[o][r][i]);
  }
  for (; k < K; k += VecF::kLanes) {
    const int64_t n = std::min<int64_t>(VecF::kLanes, K - k);
    for (int o = 0; o < kOutputs; ++o)
      for (int r = 0; r < kRows; ++r)
        acc[o][r][0] = fma(load_n(x + r * x_stride + k, n), load_n(w + o * w_stride + k, n), acc[o][r][0]);
  }
  std::memcpy(sums, acc, sizeof(acc));
}

// Outputs 0, distance, ... of `kRows` rows of x, `kOutputs` of them.
template <int kOutputs, int kRows, class T>
void gemv_outputs(const T* x, int64_t x_stride, const T* w, int64_t w_stride, T* y, int64_t y_stride, int64_t distance,
                  int64_t K) {
  constexpr int kTogether = std::max(1, std::min(kOutputs, kSumsInRegisters / (kRows * kChains)));
  constexpr int64_t kTerms = kTogether == kOutputs ? INT64_MAX : kTurn / static_cast<int64_t>(sizeof(T));
  static_assert(kOutputs % kTogether == 0, "the last turn would take more");
  Sums sums[kOutputs][kRows];
  for (auto& output : sums)
    for (auto& row : output)
      for (VecF& s : row) s = VecF(0.0F);
  w_stride *= distance;
  for (int64_t k = 0; k < K; k += std::min(kTerms, K - k))
    for (int o = 0; o < kOutputs; o += kTogether)
      add_terms<(kOutputs > 1), kTogether, kRows>(x + k, x_stride, w + o * w_stride + k, w_stride,
                                                  std::min(kTerms, K - k), sums + o);
  for (int o = 0; o < kOutputs; ++o)
    for (int r = 0; r < kRows; ++r) y[r * y_stride + o * distance] = from_float<T>(sum(sums[o][r][0] + sums[o][r][1]));
}

// Outputs o, o + distance, ... of all rows of x, four at a time: the rows of W come from memory once.
template <int kOutputs, class T>
void gemv_rows(const Tensor& x, const Tensor& weight, const Tensor& y, int64_t o, int64_t distance) {
  const int64_t R = x.size[0];
  const auto rows = [&](auto count, int64_t r) {
    gemv_outputs<kOutputs, decltype(count)::value, T>(
        x.ptr<T>() + r * x.stride[0], x.stride[0], weight.ptr<T>() + o * weight.stride[0], weight.stride[0],
        y.ptr<T>() + r * y.stride[0] + o, y.stride[0], distance, x.size[1]);
  };
  int64_t r = 0;
  for (; r + 4 <= R; r += 4) rows(std::integral_constant<int, 4>{}, r);
  if (R - r == 3) rows(std::integral_constant<int, 3>{}, r);
  if (R - r == 2) rows(std::integral_constant<int, 2>{}, r);
  if (R - r == 1) rows(std::integral_constant<int, 1>{}, r);
}

// Outputs [begin, end). One row of W after the other, in the order of memory, is what the prefetching of AMD's
// processors follows best.
template <class T>
void gemv_part(const Tensor& x, const Tensor& weight, const Tensor& y, int64_t begin, int64_t end) {
  const int64_t distance = amd_family() == 0 ? (end - begin) / kStreams : 0;
  for (int64_t i = 0; i < distance; ++i) gemv_rows<kStreams, T>(x, weight, y, begin + i, distance);
  for (int64_t o = begin + kStreams * distance; o < end; ++o) gemv_rows<1, T>(x, weight, y, o, 1);
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
                     const int64_t from = std::max<int64_t>(begin, 0), to = std::min(end, N);
                     if (from < to) gemv_part<T>(x, weights[i], ys[i], from, to);
                     begin -= N;
                     end -= N;
                   }
                 });
  });
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA

#endif
