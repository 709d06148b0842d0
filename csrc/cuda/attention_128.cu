// Attention for head dim 128 on sm_80 and newer.
#include "attention_sm80.cuh"

namespace llama_fast::cuda {

template void attention_sm80_fwd<128>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, bool, int64_t,
                                      const Tensor&, const Tensor&, Stream);
template void attention_sm80_bwd<128>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                      const Tensor&, const Tensor&, double, bool, int64_t, const Tensor&, const Tensor&,
                                      const Tensor&, const Tensor&, Stream);

}  // namespace llama_fast::cuda
