// rms_norm and add_rms_norm on the CPU. Statistics and sums are float32; each output is rounded once.
// Backward: dx overwrites its output; dweight is summed over rows in float32 in kParts parts, whose bounds depend on R
// alone, so that it is bitwise equal for every number of threads. Derivation: docs/ops/rms_norm.md.
#ifndef LF_ISA

#include <memory>
#include <type_traits>

#include "memory.h"
#include "parallel.h"
#include "simd.h"

#define LF_THIS_FILE "rms_norm.cpp"
#include "each_isa.h"

namespace llama_fast::cpu {

void rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps, const Tensor& y, const Tensor& rstd) {
  use_huge_pages(y);
  LF_DISPATCH(norm_fwd, x, Tensor{}, weight, eps, y, Tensor{}, rstd);
}

void add_rms_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const Tensor& y,
                      const Tensor& sum, const Tensor& rstd) {
  use_huge_pages(y);
  use_huge_pages(sum);
  LF_DISPATCH(norm_fwd, x, residual, weight, eps, y, sum, rstd);
}

void rms_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, const Tensor& dx,
                  const Tensor& dweight) {
  use_huge_pages(dx);
  LF_DISPATCH(norm_bwd, dy, Tensor{}, x, weight, rstd, dx, dweight);
}

void add_rms_norm_bwd(const Tensor& dy, const Tensor& dsum, const Tensor& sum, const Tensor& weight, const Tensor& rstd,
                      const Tensor& dx, const Tensor& dweight) {
  use_huge_pages(dx);
  LF_DISPATCH(norm_bwd, dy, dsum, sum, weight, rstd, dx, dweight);
}

}  // namespace llama_fast::cpu

#else

namespace llama_fast::cpu::LF_ISA {
namespace {

constexpr int64_t kGrainElements = 16384;  // a thread's least share: below it, waking a thread costs more than it saves
constexpr int64_t kParts = 64;  // partial sums of dweight; more than the threads of a large machine would help
constexpr int64_t kRows = 4;    // rows that the backward takes at once, to read and write dweight a fourth as often

// Whether the second pass over a row fetches the next rows into the caches, C = 4096. On a Zen 5, GB/s a core with and
// without: forward f32 44 against 36, with the addition bf16 34 against 30, f32 45 against 41; backward bf16 37 against
// 33, f32 38 against 41, with the addition bf16 38 against 34, f32 29 against 39. On an Emerald Rapids, two cores:
// forward bf16 33 against 26, backward f32 38 against 31, with the addition 34 against 33.
// The forward always does. In bf16 on a Zen 5, two cores together, in three processes: without 56, 43, 45; the next
// row, asked for by each vector, 61, 48, 48; the row after it, by each cache line, 72, 52, 55 (f32 so 84, 54, 53,
// against 88, 58, 54).
// The backward's four rows of dy and x fill the first cache, and what is asked for into it drives them out of it. A
// Zen 4 asks by each cache line, into the second: in five processes, two cores together, bf16 28 to 35 against 27 to 30
// as above, 1.00 to 1.16 times, with the addition 1.02 to 1.12 times; f32 36 to 43 against 31 to 39 without, 1.05 to
// 1.25 times, with the addition 0.94 to 1.06 times. Elsewhere the second cache has not been tried.
template <class T, bool kAdd>
constexpr int64_t kRowsAhead = !kAdd && sizeof(T) == 2 ? 2 : 1;
enum class Ahead { none, first_cache, second_cache };
template <class T>
Ahead bwd_ahead() {
  if (amd_family() == 25) return Ahead::second_cache;
  return sizeof(T) == 2 || amd_family() == 0 ? Ahead::first_cache : Ahead::none;
}

template <class F>
void with_ahead(Ahead ahead, F&& f) {
  switch (ahead) {
    case Ahead::none:
      return f(std::integral_constant<Ahead, Ahead::none>{});
    case Ahead::first_cache:
      return f(std::integral_constant<Ahead, Ahead::first_cache>{});
    case Ahead::second_cache:
      return f(std::integral_constant<Ahead, Ahead::second_cache>{});
  }
}

template <class T>
const T* row(const Tensor& a, int64_t r) {
  return a.ptr<T>() + r * a.stride[0];
}
template <class T>
T* row_of_output(const Tensor& a, int64_t r) {
  return a.ptr<T>() + r * a.stride[0];
}

// Whether all rows of `a` may be streamed to with one `head`.
template <class T>
bool rows_share_boundaries(const Tensor& a) {
  return a.stride[0] % VecF::kLanes == 0;
}

template <class T>
constexpr int64_t kVectorBytes = VecF::kLanes * static_cast<int64_t>(sizeof(T));

// kAdd: sum_out = x + residual is written, rounded to T, and normalised as rounded.
template <class T, bool kAdd, bool kStream>
void norm_fwd_row(const T* x, const T* residual, const T* weight, double eps, T* y, T* sum_out, float* rstd, int64_t C,
                  int64_t x_next, int64_t residual_next) {
  const auto value = [&](int64_t c, auto n) {
    if constexpr (kAdd)
      return rounded(load_lanes(x + c, n) + load_lanes(residual + c, n), T{});
    else
      return load_lanes(x + c, n);
  };
  const float squares = sum_over_row(C, [&](int64_t c, auto n, VecF total) {
    const VecF v = value(c, n);
    return fma(v, v, total);
  });
  const auto r = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(C) + eps));
  *rstd = r;
  for_each_vector(kStream ? lanes_before_boundary(y) : 0, C, [&](int64_t c, auto n) {
    if (kRowsAhead<T, kAdd> == 1 || c * static_cast<int64_t>(sizeof(T)) % 64 < kVectorBytes<T>)
      __builtin_prefetch(x + kRowsAhead<T, kAdd> * x_next + c);
    if constexpr (kAdd) __builtin_prefetch(residual + residual_next + c);
    const VecF v = value(c, n);
    if constexpr (kAdd) write_lanes<kStream>(sum_out + c, v, n);
    write_lanes<kStream>(y + c, v * VecF(r) * load_lanes(weight + c, n), n);
  });
}

template <class T, bool kAdd, bool kStream>
void norm_fwd_rows(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const Tensor& y,
                   const Tensor& sum_out, const Tensor& rstd) {
  const int64_t R = x.size[0], C = x.size[1];
  parallel_for(R, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(C, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* y_row = row_of_output<T>(y, r);
      T* sum_row = kAdd ? row_of_output<T>(sum_out, r) : nullptr;
      const T* residual_row = kAdd ? row<T>(residual, r) : nullptr;
      norm_fwd_row<T, kAdd, kStream>(row<T>(x, r), residual_row, weight.ptr<T>(), eps, y_row, sum_row,
                                     rstd.ptr<float>() + r, C, x.stride[0], kAdd ? residual.stride[0] : 0);
    }
    stream_fence();
  });
}

void norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const Tensor& y,
              const Tensor& sum_out, const Tensor& rstd) {
  const bool add = residual.data != nullptr;
  with_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t bytes = (add ? 2 : 1) * x.size[0] * x.size[1] * static_cast<int64_t>(sizeof(T));
    const bool past_caches =
        should_stream(bytes) &&
        (!add || (y.stride[0] == sum_out.stride[0] && same_boundaries(y.ptr<T>(), sum_out.ptr<T>())));
    with_bool(add, [&](auto kAdd) {
      with_bool(past_caches,
                [&](auto kStream) { norm_fwd_rows<T, kAdd, kStream>(x, residual, weight, eps, y, sum_out, rstd); });
    });
  });
}

// dx = rstd (dy weight - x rstd^2 mean(dy weight x)) [+ dsum] for kN rows from `r`; dweight_part += dy x rstd, or = if
// `first`.
template <int kN, class T, bool kAdd, bool kStream, Ahead kAhead>
void norm_bwd_rows(const Tensor& dy, const Tensor& dsum, const Tensor& x, const T* weight, const float* rstd,
                   const Tensor& dx, int64_t r, bool first, float* dweight_part) {
  const int64_t C = x.size[1];
  const T *dy_row[kN], *x_row[kN], *dsum_row[kN];
  T* dx_row[kN];
  VecF scale[kN], k[kN];
  for (int i = 0; i < kN; ++i) {
    dy_row[i] = row<T>(dy, r + i);
    x_row[i] = row<T>(x, r + i);
    dsum_row[i] = kAdd ? row<T>(dsum, r + i) : nullptr;
    dx_row[i] = row_of_output<T>(dx, r + i);
    const float dot = sum_over_row(C, [&](int64_t c, auto n, VecF total) {
      if constexpr (kAdd) __builtin_prefetch(dsum_row[i] + c);
      return fma(load_lanes(dy_row[i] + c, n) * load_lanes(x_row[i] + c, n), load_lanes(weight + c, n), total);
    });
    const float s = rstd[r + i];
    scale[i] = VecF(s);
    k[i] = VecF(-s * (s * (s * (dot / static_cast<float>(C)))));  // s * dot first: s^3 has a third of the range
  }
  for_each_vector(kStream ? lanes_before_boundary(dx_row[0]) : 0, C, [&](int64_t c, auto n) {
    const VecF w = load_lanes(weight + c, n);
    VecF dw(0.0F);  // of these rows alone: fewer additions to the large sum, so less of them is rounded away
    for (int i = 0; i < kN; ++i) {
      if constexpr (kAhead == Ahead::first_cache) {
        __builtin_prefetch(dy_row[i] + c + kN * dy.stride[0]);
        __builtin_prefetch(x_row[i] + c + kN * x.stride[0]);
      }
      if (kAhead == Ahead::second_cache && c * static_cast<int64_t>(sizeof(T)) % 64 < kVectorBytes<T>) {
        __builtin_prefetch(dy_row[i] + c + kN * dy.stride[0], 0, 2);
        __builtin_prefetch(x_row[i] + c + kN * x.stride[0], 0, 2);
      }
      const VecF g = load_lanes(dy_row[i] + c, n), v = load_lanes(x_row[i] + c, n);
      dw = fma(g * v, scale[i], dw);
      VecF d = fma(v, k[i], g * w * scale[i]);
      if constexpr (kAdd) d = d + load_lanes(dsum_row[i] + c, n);
      write_lanes<kStream>(dx_row[i] + c, d, n);
    }
    write_lanes<false>(dweight_part + c, first ? dw : dw + load_lanes(dweight_part + c, n), n);
  });
}

void norm_bwd(const Tensor& dy, const Tensor& dsum, const Tensor& x, const Tensor& weight, const Tensor& rstd,
              const Tensor& dx, const Tensor& dweight) {
  const int64_t R = x.size[0], C = x.size[1];
  const int64_t parts = std::max<int64_t>(1, std::min({kParts, R / kRows, R * C / kGrainElements}));
  const std::unique_ptr<float[]> dweight_parts(new float[static_cast<size_t>(parts * C)]);
  with_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool past_caches = should_stream(R * C * static_cast<int64_t>(sizeof(T))) && rows_share_boundaries<T>(dx);
    with_bool(dsum.data != nullptr, [&](auto kAdd) {
      with_bool(past_caches, [&](auto kStream) {
        with_ahead(bwd_ahead<T>(), [&](auto kAhead) {
          parallel_for(parts, 1, [&](int64_t part_begin, int64_t part_end) {
            for (int64_t part = part_begin; part < part_end; ++part) {
              const int64_t begin = R * part / parts, end = R * (part + 1) / parts;
              float* dw = dweight_parts.get() + part * C;
              int64_t r = begin;
              for (; r + kRows <= end; r += kRows)
                norm_bwd_rows<kRows, T, kAdd, kStream, kAhead>(dy, dsum, x, weight.ptr<T>(), rstd.ptr<float>(), dx, r,
                                                               r == begin, dw);
              for (; r < end; ++r)
                norm_bwd_rows<1, T, kAdd, kStream, kAhead>(dy, dsum, x, weight.ptr<T>(), rstd.ptr<float>(), dx, r,
                                                           r == begin, dw);
            }
            stream_fence();
          });
        });
      });
    });
    const int64_t used = R == 0 ? 0 : parts;
    parallel_for(C, std::max<int64_t>(VecF::kLanes, kGrainElements / parts), [&](int64_t begin, int64_t end) {
      for_each_vector(0, end - begin, [&](int64_t c, auto n) {
        VecF total(0.0F);
        for (int64_t part = 0; part < used; ++part)
          total = total + load_lanes(dweight_parts.get() + part * C + begin + c, n);
        write_lanes<false>(dweight.ptr<T>() + begin + c, total, n);
      });
    });
  });
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA

#endif
