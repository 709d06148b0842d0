// A block that hands registers from one warpgroup to two others, on which tests/test_emulator.py tries the emulator.
#include <string>

#include "cuda/launch.cuh"
#include "cuda/ptx_sm90.cuh"

namespace llama_fast::cuda {

__global__ void __launch_bounds__(384, 1) registers_kernel(Global<int> done) {
  if (threadIdx.x < 128)
    ptx::setmaxnreg_dec<24>();
  else
    ptx::setmaxnreg_inc<240>();
  done[threadIdx.x] = 1;
}

}  // namespace llama_fast::cuda

#ifdef LLAMA_FAST_EMULATE
#include "report.h"

extern "C" const char* run_registers(int* done) {
  using namespace llama_fast;
  return report([=] {
    const Mapping mapped(done, 384 * 4, "done");
    cuda::launch({"registers", dim3(1), dim3(384)}, cuda::registers_kernel, static_cast<int*>(mapped.data()));
  });
}
#endif
