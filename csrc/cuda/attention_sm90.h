// Attention for sm_90a, chosen by the launchers of attention.cu where it takes the call. Arguments as in ops.h.
#pragma once

#include "ops.h"

namespace llama_fast::cuda {

// Why the sm_90a kernels do not take a call, or nullptr. They need a device of compute capability 9.0.
const char* attention_sm90_objection(const Tensor& q, const Tensor& k, const Tensor& v, double scale);

// scratch: 4 bytes, aligned to 4, of any content.
void attention_sm90_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                        bool causal, int64_t window, const Tensor& out, const Tensor& lse, const Tensor& scratch,
                        Stream s);

// scratch: attention_sm90_bwd_scratch bytes, aligned to 16, of any content.
int64_t attention_sm90_bwd_scratch(const Tensor& q, const Tensor& cu_seqlens);
void attention_sm90_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const Tensor& lse, const Tensor& cu_seqlens, double scale, bool causal, int64_t window,
                        const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& scratch, Stream s);

}  // namespace llama_fast::cuda
