// rms_norm and add_rms_norm on the CPU. Statistics and sums are float32; each output is rounded once.
// Backward: dx overwrites its output; dweight is summed over rows in float32 in kParts parts, whose bounds depend on R
// alone, so that it is bitwise equal for every number of threads. Derivation: docs/ops/rms_norm.md.
#ifndef LF_ISA

#include <vector>

#include "parallel.h"
#include "simd.h"

#define LF_THIS_FILE "rms_norm.cpp"
#include "each_isa.h"

namespace llama_fast::cpu {

void rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps, const Tensor& y, const Tensor& rstd) {
  LF_DISPATCH(norm_fwd, x, Tensor{}, weight, eps, y, Tensor{}, rstd);
}

void add_rms_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const Tensor& y,
                      const Tensor& sum, const Tensor& rstd) {
  LF_DISPATCH(norm_fwd, x, residual, weight, eps, y, sum, rstd);
}

void rms_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, const Tensor& dx,
                  const Tensor& dweight) {
  LF_DISPATCH(norm_bwd, dy, Tensor{}, x, weight, rstd, dx, dweight);
}

void add_rms_norm_bwd(const Tensor& dy, const Tensor& dsum, const Tensor& sum, const Tensor& weight,
                      const Tensor& rstd, const Tensor& dx, const Tensor& dweight) {
  LF_DISPATCH(norm_bwd, dy, dsum, sum, weight, rstd, dx, dweight);
}

}  // namespace llama_fast::cpu

#else

namespace llama_fast::cpu::LF_ISA {
namespace {

constexpr int kLanes = VecF::kLanes;
constexpr int64_t kGrainElements = 16384;  // a thread's least share: below it, waking a thread costs more than it saves
constexpr int64_t kParts = 64;             // partial sums of dweight; more than the threads of a large machine would help

// Calls f(c, n) for each vector of a row of C: n lanes from column c, n == kLanes but for the last.
template <class F>
LF_INLINE void for_each_vector(int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) f(c, std::integral_constant<int64_t, kLanes>{});
  if (c < C) f(c, C - c);
}

template <class T>
LF_INLINE VecF load_part(const T* p, std::integral_constant<int64_t, kLanes>) {
  return load(p);
}
template <class T>
LF_INLINE VecF load_part(const T* p, int64_t n) {
  return load_n(p, n);
}
template <class T>
LF_INLINE void store_part(T* p, VecF a, std::integral_constant<int64_t, kLanes>) {
  store(p, a);
}
template <class T>
LF_INLINE void store_part(T* p, VecF a, int64_t n) {
  store_n(p, a, n);
}

// kAdd: sum = x + residual is written, rounded to T, and normalised as rounded.
template <class T, bool kAdd>
void norm_fwd_row(const T* x, const T* residual, const T* weight, float eps, T* y, T* sum_out, float* rstd, int64_t C) {
  VecF squares(0.0F);
  for_each_vector(C, [&](int64_t c, auto n) {
    VecF v = load_part(x + c, n);
    if constexpr (kAdd) {
      store_part(sum_out + c, v + load_part(residual + c, n), n);
      v = load_part(sum_out + c, n);
    }
    squares = fma(v, v, squares);
  });
  const float r = 1.0F / std::sqrt(sum(squares) / static_cast<float>(C) + eps);
  *rstd = r;
  const T* source = kAdd ? sum_out : x;
  for_each_vector(C, [&](int64_t c, auto n) {
    store_part(y + c, load_part(source + c, n) * VecF(r) * load_part(weight + c, n), n);
  });
}

void norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const Tensor& y,
              const Tensor& sum_out, const Tensor& rstd) {
  const int64_t R = x.size[0], C = x.size[1];
  with_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(R, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(C, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* x_row = x.ptr<T>() + r * x.stride[0];
        T* y_row = y.ptr<T>() + r * y.stride[0];
        float* rstd_r = rstd.ptr<float>() + r;
        const float e = static_cast<float>(eps);
        if (residual.data == nullptr)
          norm_fwd_row<T, false>(x_row, nullptr, weight.ptr<T>(), e, y_row, nullptr, rstd_r, C);
        else
          norm_fwd_row<T, true>(x_row, residual.ptr<T>() + r * residual.stride[0], weight.ptr<T>(), e, y_row,
                                sum_out.ptr<T>() + r * sum_out.stride[0], rstd_r, C);
      }
    });
  });
}

// dx = rstd (dy weight - x rstd^2 mean(dy weight x)) [+ dsum];  dweight_part += dy x rstd
template <class T, bool kAdd>
void norm_bwd_row(const T* dy, const T* dsum, const T* x, const T* weight, float rstd, T* dx, float* dweight_part,
                  int64_t C) {
  VecF dot(0.0F);
  for_each_vector(C, [&](int64_t c, auto n) {
    const VecF dy_x = load_part(dy + c, n) * load_part(x + c, n);
    dot = fma(dy_x, load_part(weight + c, n), dot);
    store_part(dweight_part + c, fma(dy_x, VecF(rstd), load_part(dweight_part + c, n)), n);
  });
  const VecF k(-rstd * rstd * rstd * (sum(dot) / static_cast<float>(C)));
  for_each_vector(C, [&](int64_t c, auto n) {
    VecF v = load_part(dy + c, n) * load_part(weight + c, n) * VecF(rstd);
    v = fma(load_part(x + c, n), k, v);
    if constexpr (kAdd) v = v + load_part(dsum + c, n);
    store_part(dx + c, v, n);
  });
}

void norm_bwd(const Tensor& dy, const Tensor& dsum, const Tensor& x, const Tensor& weight, const Tensor& rstd,
              const Tensor& dx, const Tensor& dweight) {
  const int64_t R = x.size[0], C = x.size[1];
  const int64_t parts = std::max<int64_t>(1, std::min(kParts, R * C / kGrainElements));
  std::vector<float> dweight_parts(static_cast<size_t>(parts * C), 0.0F);
  with_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(parts, 1, [&](int64_t part_begin, int64_t part_end) {
      for (int64_t part = part_begin; part < part_end; ++part)
        for (int64_t r = R * part / parts; r < R * (part + 1) / parts; ++r) {
          const T* dy_row = dy.ptr<T>() + r * dy.stride[0];
          const T* x_row = x.ptr<T>() + r * x.stride[0];
          T* dx_row = dx.ptr<T>() + r * dx.stride[0];
          float* dw = dweight_parts.data() + part * C;
          const float rstd_r = rstd.ptr<float>()[r];
          if (dsum.data == nullptr)
            norm_bwd_row<T, false>(dy_row, nullptr, x_row, weight.ptr<T>(), rstd_r, dx_row, dw, C);
          else
            norm_bwd_row<T, true>(dy_row, dsum.ptr<T>() + r * dsum.stride[0], x_row, weight.ptr<T>(), rstd_r, dx_row,
                                  dw, C);
        }
    });
    for_each_vector(C, [&](int64_t c, auto n) {
      VecF total(0.0F);
      for (int64_t part = 0; part < parts; ++part) total = total + load_part(dweight_parts.data() + part * C + c, n);
      store_part(dweight.ptr<T>() + c, total, n);
    });
  });
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA

#endif
