// Small kernels on which tests/test_emulator.py tries the emulator. Each run_<name> gives "" or the report of the
// fault.
#include <string>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace llama_fast::cuda {

// y[i] = sum of the 256 x of i's block, by shuffles and shared memory
__global__ void block_sums_kernel(Global<const float> x, Global<float> y, int n) {
  LLAMA_FAST_SHARED(float, partial, 8);
  const int i = blockIdx.x * blockDim.x + threadIdx.x, warp = threadIdx.x / 32;
  float v = i < n ? x[i] : 0.f;
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(~0u, v, lanes);
  if (threadIdx.x % 32 == 0) partial[warp] = v;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < 8; ++w) sum += partial[w];
  if (i < n) y[i] = sum;
}

// d[16, 8] = a[16, 16] b[16, 8], b by rows in memory: cp.async, ldmatrix and mma of one warp
template <class T>
__global__ void product_kernel(Global<const T> a, Global<const T> b, Global<float> d) {
  LLAMA_FAST_DYNAMIC_SHARED(tiles);
  const int lane = threadIdx.x;
  const uint32_t a_tile = shared_address(tiles), b_tile = a_tile + 16 * 16 * 2;
  ptx::cp_async_16(a_tile + lane * 16, a + lane * 8);
  if (lane < 16) ptx::cp_async_16(b_tile + lane * 16, b + lane * 8);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  __syncwarp();
  uint32_t a_frag[4], b_frag[2];
  ptx::ldmatrix_x4(a_frag, a_tile + lane % 16 * 32 + lane / 16 * 16);
  ptx::ldmatrix_x2_trans(b_frag, b_tile + lane % 16 * 16);
  float acc[4] = {};
  ptx::mma_m16n8k16<T>(acc, a_frag, b_frag, acc);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = acc[i];
}

}  // namespace llama_fast::cuda

#ifdef LLAMA_FAST_EMULATE
#include "report.h"

using namespace llama_fast;

extern "C" {

const char* run_block_sums(const float* x, float* y, int n, int claimed) {
  return report([=] {
    const Mapping mx(x, n * 4, "x"), my(y, n * 4, "y");
    cuda::launch({"block_sums", dim3((n + 255) / 256), dim3(256)}, cuda::block_sums_kernel,
                 static_cast<const float*>(mx.data()), static_cast<float*>(my.data()), claimed);
  });
}

const char* run_product(const void* a, const void* b, float* d, bool is_bf16) {
  return report([=] {
    const Mapping ma(a, 512, "a"), mb(b, 256, "b"), md(d, 512, "d");
    const auto go = [&](auto t) {
      using T = decltype(t);
      cuda::launch({"product", dim3(1), dim3(32), 512 + 256}, cuda::product_kernel<T>, static_cast<const T*>(ma.data()),
                   static_cast<const T*>(mb.data()), static_cast<float*>(md.data()));
    };
    is_bf16 ? go(bf16{}) : go(f16{});
  });
}

}  // extern "C"
#endif
