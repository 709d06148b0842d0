// The state that the launchers of the library share.
#include "stream.cuh"

namespace llama_fast::cuda {

void set_synchronous(bool value) { synchronous() = value; }

}  // namespace llama_fast::cuda
