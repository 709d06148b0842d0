// Kernels whose threads and blocks meet in global memory, on which tests/test_emulator.py tries the race checker.
#include <string>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/ptx_sm90.cuh"

namespace llama_fast::cuda {

constexpr int kColumns = 64;

// total[c] = sum over the blocks b of 2 x[b, 63 - c], in the order of the blocks. turn: 0 at first.
__global__ void chain_kernel(Global<const float> x, Global<float> doubled, Global<float> total, Global<int> turn) {
  const int c = threadIdx.x, b = blockIdx.x;
  doubled[b * kColumns + c] = 2.f * x[b * kColumns + c];
  __syncthreads();  // the row is there
  const float mine = doubled[b * kColumns + kColumns - 1 - c];
  if (c == 0)
    while (ptx::ld_acquire_gpu(turn) != b) ptx::nanosleep(100);
  __syncthreads();  // the blocks before have added
  total[c] = total[c] + mine;
  __syncthreads();  // this one has
  if (c == 0) ptx::red_release_gpu_add(turn, 1);
}

// y[b, c] = x[b, c], by a bulk copy from shared memory, which thread 0 reads back into z[b].
__global__ void bulk_kernel(Global<const float> x, Global<float> y, Global<float> z) {
  LLAMA_FAST_SHARED(float, row, kColumns);
  const int c = threadIdx.x, b = blockIdx.x;
  row[c] = x[b * kColumns + c];
  ptx::fence_proxy_async();
  __syncthreads();
  if (c != 0) return;
  ptx::bulk_store(y + b * kColumns, shared_address(row), kColumns * 4);
  ptx::bulk_commit_group();
  ptx::bulk_wait_group<0>();
  z[b] = static_cast<float>(y[b * kColumns + kColumns - 1]);
}

}  // namespace llama_fast::cuda

#ifdef LLAMA_FAST_EMULATE
#include "report.h"

using namespace llama_fast;

extern "C" {

const char* run_chain(const float* x, float* doubled, float* total, int* turn, int blocks) {
  return report([=] {
    const size_t row = cuda::kColumns * 4;
    const Mapping mx(x, blocks * row, "x"), md(doubled, blocks * row, "doubled"), mt(total, row, "total"),
        mu(turn, 4, "turn");
    cuda::launch({"chain", dim3(blocks), dim3(cuda::kColumns)}, cuda::chain_kernel,
                 static_cast<const float*>(mx.data()), static_cast<float*>(md.data()), static_cast<float*>(mt.data()),
                 static_cast<int*>(mu.data()));
  });
}

const char* run_bulk(const float* x, float* y, float* z, int blocks) {
  return report([=] {
    const size_t row = cuda::kColumns * 4;
    const Mapping mx(x, blocks * row, "x"), my(y, blocks * row, "y"), mz(z, blocks * 4, "z");
    cuda::launch({"bulk", dim3(blocks), dim3(cuda::kColumns)}, cuda::bulk_kernel, static_cast<const float*>(mx.data()),
                 static_cast<float*>(my.data()), static_cast<float*>(mz.data()));
  });
}

}  // extern "C"
#endif
