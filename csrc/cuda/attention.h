// The attention kernels that the launchers of attention.cu choose among, arguments as in ops.h. Rows are aligned to 16
// bytes; sizes fit an int.
#pragma once

#include "ops.h"

namespace llama_fast::cuda {

// For sm_80 and newer; T bf16 or f16, D 64, 96, 128 or 256. attention_<D>.cu holds those of one head dim.
template <int D>
void attention_sm80_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                        bool causal, int64_t window, const Tensor& out, const Tensor& lse, Stream s);
// delta: [B, H, T] f32, scratch.
template <int D>
void attention_sm80_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const Tensor& lse, const Tensor& cu_seqlens, double scale, bool causal, int64_t window,
                        const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& delta, Stream s);

}  // namespace llama_fast::cuda
