// Instantiates the sm_80 attention of one head dim: included by attention_<D>.cu, a shard of the build each.
#pragma once

#include "attention.h"
#include "attention_bwd.cuh"
#include "attention_fwd.cuh"

namespace llama_fast::cuda {

// Calls f(T{}) with T = bf16 or f16.
template <class F>
void with_half(DType dtype, F&& f) {
  if (dtype == DType::bf16)
    f(bf16{});
  else if (dtype == DType::f16)
    f(f16{});
  else
    throw std::invalid_argument("attention: dtype: expected bfloat16 or float16");
}

template <int D>
void attention_sm80_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                        bool causal, int64_t window, const Tensor& out, const Tensor& lse, Stream s) {
  with_half(q.dtype, [&](auto tag) {
    attention::launch_fwd<attention::FwdConfig<decltype(tag), D>>(
        q, k, v, attention::make_shape(q, k, cu_seqlens, scale, causal, window), out, lse, s);
  });
}

template <int D>
void attention_sm80_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const Tensor& lse, const Tensor& cu_seqlens, double scale, bool causal, int64_t window,
                        const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& delta, Stream s) {
  with_half(q.dtype, [&](auto tag) {
    attention::launch_bwd<decltype(tag), D>(
        dout, q, k, v, out, lse, attention::make_shape(q, k, cu_seqlens, scale, causal, window), dq, dk, dv, delta, s);
  });
}

}  // namespace llama_fast::cuda
