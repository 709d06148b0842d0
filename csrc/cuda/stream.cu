// The state that the launchers of the library share.
#include "stream.cuh"

namespace llama_fast::cuda {

void set_synchronous(bool value) { synchronous() = value; }

#ifdef LLAMA_FAST_EMULATE
void set_architecture(int value) { emulated_architecture() = value; }
void set_multiprocessors(int value) { emulated_multiprocessors() = value; }
#endif

}  // namespace llama_fast::cuda
