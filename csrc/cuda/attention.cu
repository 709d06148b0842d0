// Attention: chooses the kernels of a call.
#include "attention.h"
#include "attention_sm90.h"
#include "stream.cuh"

namespace llama_fast::cuda {
namespace {

template <int D>
using HeadDim = std::integral_constant<int, D>;

// Calls f(HeadDim<D>{}) for a D that was built.
template <class F>
void with_head_dim(const char* op, int64_t D, F&& f) {
  switch (D) {
    case 64:
      return f(HeadDim<64>{});
    case 96:
      return f(HeadDim<96>{});
    case 128:
      return f(HeadDim<128>{});
    case 256:
      return f(HeadDim<256>{});
    default:
      throw std::invalid_argument(std::string(op) + ": D: expected 64, 96, 128 or 256");
  }
}

#ifdef LLAMA_FAST_SM90
// Whether the kernels for sm_90a run the call.
bool on_sm90(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int device) {
  return architecture(device) == 90 && attention_sm90_objection(q, k, v, scale) == nullptr;
}
#endif

}  // namespace

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                   bool causal, int64_t window, const Tensor& out, const Tensor& lse,
                   [[maybe_unused]] const Tensor& scratch, Stream s) {
  const char* op = "attention_fwd";
  const OnDevice device(op, s);
  if (q.size[0] * q.size[1] == 0) return;
#ifdef LLAMA_FAST_SM90
  if (on_sm90(q, k, v, scale, s.device))
    return attention_sm90_fwd(q, k, v, cu_seqlens, scale, causal, window, out, lse, scratch, s);
#endif
  with_head_dim(op, q.size[3],
                [&](auto D) { attention_sm80_fwd<D>(q, k, v, cu_seqlens, scale, causal, window, out, lse, s); });
}

void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, const Tensor& cu_seqlens, double scale, bool causal, int64_t window,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& scratch, Stream s) {
  const char* op = "attention_bwd";
  const OnDevice device(op, s);
  if (q.size[0] == 0) return;
#ifdef LLAMA_FAST_SM90
  if (on_sm90(q, k, v, scale, s.device))
    return attention_sm90_bwd(dout, q, k, v, out, lse, cu_seqlens, scale, causal, window, dq, dk, dv, scratch, s);
#endif
  with_head_dim(op, q.size[3], [&](auto D) {
    attention_sm80_bwd<D>(dout, q, k, v, out, lse, cu_seqlens, scale, causal, window, dq, dk, dv, scratch, s);
  });
}

int64_t attention_fwd_scratch() { return 4; }  // attention_sm90_fwd's

int64_t attention_bwd_scratch(const Tensor& q, [[maybe_unused]] const Tensor& k, [[maybe_unused]] const Tensor& v,
                              [[maybe_unused]] const Tensor& cu_seqlens, [[maybe_unused]] double scale,
                              [[maybe_unused]] int device) {
#ifdef LLAMA_FAST_SM90
  if (on_sm90(q, k, v, scale, device)) return attention_sm90_bwd_scratch(q, cu_seqlens);
#endif
  return q.size[0] * q.size[1] * q.size[2] * static_cast<int64_t>(sizeof(float));  // delta
}

}  // namespace llama_fast::cuda
