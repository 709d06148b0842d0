// swiglu on the CPU: y = silu(gate) up. All arithmetic is float32 and each output is rounded once; the backward
// recomputes the sigmoid. Elementwise, so independent of the threads, and an output may be the memory of an input.
// Derivation: docs/ops/swiglu.md.
#ifndef LF_ISA

#include "memory.h"
#include "parallel.h"
#include "simd.h"

#define LF_THIS_FILE "swiglu.cpp"
#include "each_isa.h"

namespace llama_fast::cpu {

void swiglu_fwd(const Tensor& gate, const Tensor& up, const Tensor& y) {
  use_huge_pages(y);
  LF_DISPATCH(fwd, gate, up, y);
}

void swiglu_bwd(const Tensor& dy, const Tensor& gate, const Tensor& up, const Tensor& dgate, const Tensor& dup) {
  use_huge_pages(dgate);
  use_huge_pages(dup);
  LF_DISPATCH(bwd, dy, gate, up, dgate, dup);
}

}  // namespace llama_fast::cpu

#else

namespace llama_fast::cpu::LF_ISA {
namespace {

// Columns of one task; with rows that follow one another in memory, all of the tensor is one row.
constexpr int64_t kBlock = 4096;
constexpr int64_t kGrainBlocks = 4;  // a thread's least share: below it, waking a thread costs more than it saves

template <bool kStream, class T>
void fwd_row(const T* gate, const T* up, T* y, int64_t n) {
  for_each_vector(kStream ? lanes_before_boundary(y) : 0, n, [&](int64_t c, auto lanes) {
    const VecF g = load_lanes(gate + c, lanes);
    write_lanes<kStream>(y + c, g * sigmoid<T>(g) * load_lanes(up + c, lanes), lanes);
  });
}

// dgate = dy up s (1 + gate (1 - s));  dup = dy gate s
template <bool kStream, class T>
void bwd_row(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {
  for_each_vector(kStream ? lanes_before_boundary(dgate) : 0, n, [&](int64_t c, auto lanes) {
    const VecF g = load_lanes(gate + c, lanes), u = load_lanes(up + c, lanes), d = load_lanes(dy + c, lanes);
    const VecF s = sigmoid<T>(g);
    write_lanes<kStream>(dup + c, d * (g * s), lanes);
    const VecF slope = s * fma(g, VecF(1.0F) - s, VecF(1.0F));
    write_lanes<kStream>(dgate + c, d * u * slope, lanes);
  });
}

// Calls row(r, c, n) on blocks of at most kBlock columns, on all threads.
template <class Row>
void for_each_block(int64_t R, int64_t F, const Row& row) {
  const int64_t blocks = (F + kBlock - 1) / kBlock;
  parallel_for(R * blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i % blocks * kBlock;
      row(i / blocks, c, std::min(kBlock, F - c));
    }
    stream_fence();
  });
}

bool rows_adjoin(const Tensor& a) { return a.stride[0] == a.size[1] || a.size[0] == 1; }

void fwd(const Tensor& gate, const Tensor& up, const Tensor& y) {
  const bool flat = rows_adjoin(gate) && rows_adjoin(up) && rows_adjoin(y);
  const int64_t R = flat ? 1 : y.size[0], F = flat ? y.size[0] * y.size[1] : y.size[1];
  with_dtype(y.dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool past_caches = should_stream(R * F * static_cast<int64_t>(sizeof(T)));
    for_each_block(R, F, [&](int64_t r, int64_t c, int64_t n) {
      const T* gate_row = gate.ptr<T>() + r * gate.stride[0] + c;
      const T* up_row = up.ptr<T>() + r * up.stride[0] + c;
      T* y_row = y.ptr<T>() + r * y.stride[0] + c;
      if (past_caches)
        fwd_row<true>(gate_row, up_row, y_row, n);
      else
        fwd_row<false>(gate_row, up_row, y_row, n);
    });
  });
}

void bwd(const Tensor& dy, const Tensor& gate, const Tensor& up, const Tensor& dgate, const Tensor& dup) {
  const bool flat = rows_adjoin(dy) && rows_adjoin(gate) && rows_adjoin(up) && rows_adjoin(dgate) && rows_adjoin(dup);
  const int64_t R = flat ? 1 : dy.size[0], F = flat ? dy.size[0] * dy.size[1] : dy.size[1];
  with_dtype(dy.dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool past_caches = should_stream(2 * R * F * static_cast<int64_t>(sizeof(T)));
    for_each_block(R, F, [&](int64_t r, int64_t c, int64_t n) {
      const T* dy_row = dy.ptr<T>() + r * dy.stride[0] + c;
      const T* gate_row = gate.ptr<T>() + r * gate.stride[0] + c;
      const T* up_row = up.ptr<T>() + r * up.stride[0] + c;
      T* dgate_row = dgate.ptr<T>() + r * dgate.stride[0] + c;
      T* dup_row = dup.ptr<T>() + r * dup.stride[0] + c;
      if (past_caches && same_boundaries(dgate_row, dup_row))
        bwd_row<true>(dy_row, gate_row, up_row, dgate_row, dup_row, n);
      else
        bwd_row<false>(dy_row, gate_row, up_row, dgate_row, dup_row, n);
    });
  });
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA

#endif
