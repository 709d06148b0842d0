// The matrix-vector product of a decode, y = x W^T for one to four rows of x: W is read once, at the rate of memory.
// Sums are float32 and rounded once. One thread does an output: bitwise equal for every number of threads, and each row
// bitwise equal to that row alone.
#ifndef LF_ISA

#include "parallel.h"
#include "simd.h"

#define LF_THIS_FILE "linear.cpp"
#include "each_isa.h"

namespace llama_fast::cpu {

void gemv(const Tensor& x, const Tensor& weight, const Tensor& y) { LF_DISPATCH(gemv, x, weight, y); }

}  // namespace llama_fast::cpu

#else

namespace llama_fast::cpu::LF_ISA {
namespace {

constexpr int kLanes = VecF::kLanes;
constexpr int64_t kOutputs = 4;  // rows of W at a time: four streams, and four chains of sums for one row of x
constexpr int64_t kGrainElements = 32768;  // of W, a thread's least share
constexpr int64_t kAhead = 1024;           // bytes of prefetch

// y[r, o] for kRows rows of x and kOut rows of W
template <int kRows, int kOut, class T>
void gemv_block(const T* x, int64_t x_stride, const T* w, int64_t w_stride, T* y, int64_t y_stride, int64_t K) {
  VecF acc[kRows][kOut];
  for (auto& row : acc)
    for (VecF& a : row) a = VecF(0.0F);
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    VecF w_k[kOut];
    for (int o = 0; o < kOut; ++o) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + o * w_stride + k) + kAhead, 0, 0);
      w_k[o] = load(w + o * w_stride + k);
    }
    for (int r = 0; r < kRows; ++r) {
      const VecF x_k = load(x + r * x_stride + k);
      for (int o = 0; o < kOut; ++o) acc[r][o] = fma(x_k, w_k[o], acc[r][o]);
    }
  }
  if (k < K)
    for (int r = 0; r < kRows; ++r)
      for (int o = 0; o < kOut; ++o)
        acc[r][o] = fma(load_n(x + r * x_stride + k, K - k), load_n(w + o * w_stride + k, K - k), acc[r][o]);
  for (int r = 0; r < kRows; ++r)
    for (int o = 0; o < kOut; ++o) y[r * y_stride + o] = from_float<T>(sum(acc[r][o]));
}

template <int kRows, class T>
void gemv_rows(const Tensor& x, const Tensor& weight, const Tensor& y) {
  const int64_t N = weight.size[0], K = weight.size[1], w_stride = weight.stride[0];
  const int64_t blocks = (N + kOutputs - 1) / kOutputs;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (kOutputs * std::max<int64_t>(K, 1)));
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * kOutputs; o < std::min(end * kOutputs, N); o += kOutputs) {
      const T* w = weight.ptr<T>() + o * w_stride;
      if (o + kOutputs <= N)
        gemv_block<kRows, kOutputs>(x.ptr<T>(), x.stride[0], w, w_stride, y.ptr<T>() + o, y.stride[0], K);
      else
        for (int64_t i = 0; i < N - o; ++i)
          gemv_block<kRows, 1>(x.ptr<T>(), x.stride[0], w + i * w_stride, w_stride, y.ptr<T>() + o + i, y.stride[0], K);
    }
  });
}

void gemv(const Tensor& x, const Tensor& weight, const Tensor& y) {
  with_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    switch (x.size[0]) {
      case 1:
        return gemv_rows<1, T>(x, weight, y);
      case 2:
        return gemv_rows<2, T>(x, weight, y);
      case 3:
        return gemv_rows<3, T>(x, weight, y);
      case 4:
        return gemv_rows<4, T>(x, weight, y);
      default:
        throw std::invalid_argument("x: gemv takes 1 to 4 rows");
    }
  });
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA

#endif
