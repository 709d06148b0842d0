// Attention for sm_90a in the emulator, called by tests/test_attention_sm90.py.
#include "cuda/attention_sm90_bwd.cu"
#include "cuda/attention_sm90_fwd.cu"
#include "emulator/block.h"
#include "report.h"

namespace {

using llama_fast::DType;
using llama_fast::Tensor;

// A tensor of Python's: address (0: absent), bytes, number of dimensions, then their sizes and strides.
struct Known {
  Tensor tensor;
  Mapping mapping;
  Known(const int64_t* x, DType dtype, const char* name) {
    if (x[0] == 0) return;
    mapping = Mapping(reinterpret_cast<const void*>(x[0]), static_cast<size_t>(x[1]), name);
    tensor.data = mapping.data();
    tensor.dtype = dtype;
    tensor.ndim = static_cast<int>(x[2]);
    for (int i = 0; i < tensor.ndim; ++i) tensor.size[i] = x[3 + i], tensor.stride[i] = x[3 + tensor.ndim + i];
  }
};

}  // namespace

extern "C" const char* run_options(uint64_t seed, bool race_check) {
  return report([=] {
    llama_fast::emulator::options().seed = seed;
    llama_fast::emulator::options().race_check = race_check;
  });
}

// tensors: q, k, v, cu_seqlens, out, lse, scratch; options: scale, causal, window.
extern "C" const char* run_attention_fwd(const int64_t* const* tensors, bool is_bf16, const double* options) {
  return report([=] {
    const DType type = is_bf16 ? DType::bf16 : DType::f16;
    const Known q(tensors[0], type, "q"), k(tensors[1], type, "k"), v(tensors[2], type, "v"),
        cu(tensors[3], DType::i32, "cu_seqlens"), out(tensors[4], type, "out"), lse(tensors[5], DType::f32, "lse"),
        scratch(tensors[6], DType::i32, "scratch");
    llama_fast::cuda::attention_sm90_fwd(q.tensor, k.tensor, v.tensor, cu.tensor, options[0], options[1] != 0,
                                         static_cast<int64_t>(options[2]), out.tensor, lse.tensor, scratch.tensor,
                                         llama_fast::cuda::Stream{});
  });
}

// tensors: dout, q, k, v, out, lse, cu_seqlens, dq, dk, dv, scratch; options: scale, causal, window.
extern "C" const char* run_attention_bwd(const int64_t* const* tensors, bool is_bf16, const double* options) {
  return report([=] {
    const DType type = is_bf16 ? DType::bf16 : DType::f16;
    const Known dout(tensors[0], type, "dout"), q(tensors[1], type, "q"), k(tensors[2], type, "k"),
        v(tensors[3], type, "v"), out(tensors[4], type, "out"), lse(tensors[5], DType::f32, "lse"),
        cu(tensors[6], DType::i32, "cu_seqlens"), dq(tensors[7], type, "dq"), dk(tensors[8], type, "dk"),
        dv(tensors[9], type, "dv"), scratch(tensors[10], DType::f32, "scratch");
    llama_fast::cuda::attention_sm90_bwd(dout.tensor, q.tensor, k.tensor, v.tensor, out.tensor, lse.tensor, cu.tensor,
                                         options[0], options[1] != 0, static_cast<int64_t>(options[2]), dq.tensor,
                                         dk.tensor, dv.tensor, scratch.tensor, llama_fast::cuda::Stream{});
  });
}

extern "C" int64_t attention_bwd_scratch(const int64_t* q, const int64_t* cu_seqlens) {
  const Known kq(q, DType::bf16, "q"), cu(cu_seqlens, DType::i32, "cu_seqlens");
  return llama_fast::cuda::attention_sm90_bwd_scratch(kq.tensor, cu.tensor);
}
