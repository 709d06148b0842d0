#include "../ops.h"
namespace llama_fast::cpu {
void attention_bwd(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, bool, int64_t, const Tensor&, const Tensor&, const Tensor&) {}
}
