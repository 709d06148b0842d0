#include "../ops.h"
namespace llama_fast::cpu {
void rope_fwd(const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool, const Tensor&, const Tensor&) {}
void rope_bwd(const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool, const Tensor&, const Tensor&) {}
}
