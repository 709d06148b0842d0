// A warp-specialised product on sm_90a, on which tests/test_emulator.py tries the emulator: c[M, N] = a[M, K] b[N,
// K]^T, one TMA producer warp, one consumer warpgroup, a ring of two stages.
#include <string>

#include "cuda/launch.cuh"
#include "cuda/tensor_map.cuh"

namespace llama_fast::cuda {

constexpr int kM = 64, kN = 96, kK = 64, kStages = 2;
constexpr int kABytes = kM * kK * 2, kStage = kABytes + kN * kK * 2;
constexpr int kBytes = kStages * kStage + 2 * kStages * 8;

template <class T>
__global__ void __launch_bounds__(256, 1)
    gemm_kernel(const __grid_constant__ ptx::TensorMap a, const __grid_constant__ ptx::TensorMap b, Global<float> c,
                int M, int N, int K) {
  LLAMA_FAST_DYNAMIC_SHARED(shared);
  const uint32_t tiles = shared_address(shared), full = tiles + kStages * kStage, empty = full + 8 * kStages;
  const int m0 = blockIdx.y * kM, n0 = blockIdx.x * kN, steps = (K + kK - 1) / kK;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x == 128) {
      for (int k = 0; k < steps; ++k) {
        const int s = k % kStages;
        ptx::mbarrier_wait(empty + 8 * s, (k / kStages & 1) ^ 1);
        ptx::mbarrier_arrive_expect_tx(full + 8 * s, kStage);
        ptx::tma_load_2d(tiles + s * kStage, a, full + 8 * s, k * kK, m0);
        ptx::tma_load_2d(tiles + s * kStage + kABytes, b, full + 8 * s, k * kK, n0);
      }
    }
  } else {
    ptx::setmaxnreg_inc<232>();
    float acc[kN / 2] = {};
    for (int k = 0; k < steps; ++k) {
      const int s = k % kStages;
      ptx::mbarrier_wait(full + 8 * s, k / kStages & 1);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kK / 16; ++step)
        ptx::wgmma_ss<T, kN, false, false>(acc, ptx::matrix_descriptor(tiles + s * kStage + step * 32, 16, 1024),
                                           ptx::matrix_descriptor(tiles + s * kStage + kABytes + step * 32, 16, 1024),
                                           1);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty + 8 * s);
    }
    ptx::wgmma_use(acc);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const int m = m0 + 16 * warp + lane / 4 + 8 * (i / 2 % 2), n = n0 + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      if (m < M && n < N) c[static_cast<int64_t>(m) * N + n] = acc[i];
    }
  }
}

template <class T>
void gemm(const Tensor& a, const Tensor& b, const Tensor& c) {
  const int M = a.size[0], K = a.size[1], N = b.size[0];
  const auto map_a = make_tensor_map<2>("gemm", a, {1, 0}, {kK, kM}),
             map_b = make_tensor_map<2>("gemm", b, {1, 0}, {kK, kN});
  const dim3 grid((N + kN - 1) / kN, (M + kM - 1) / kM);
  launch({"gemm", grid, dim3(256), kBytes}, gemm_kernel<T>, map_a, map_b, Global<float>(c.ptr<float>()), M, N, K);
}

}  // namespace llama_fast::cuda

#ifdef LLAMA_FAST_EMULATE
#include "report.h"

extern "C" const char* run_gemm(const void* a, const void* b, float* c, int M, int N, int K, bool is_bf16) {
  using namespace llama_fast;
  return report([=] {
    const Mapping ma(a, M * K * 2, "a"), mb(b, N * K * 2, "b"), mc(c, M * N * 4, "c");
    const DType type = is_bf16 ? DType::bf16 : DType::f16;
    const Tensor ta{ma.data(), type, 2, {M, K}, {K, 1}}, tb{mb.data(), type, 2, {N, K}, {K, 1}},
        tc{mc.data(), DType::f32, 2, {M, N}, {N, 1}};
    is_bf16 ? cuda::gemm<bf16>(ta, tb, tc) : cuda::gemm<f16>(ta, tb, tc);
  });
}
#else
template void llama_fast::cuda::gemm<llama_fast::bf16>(const Tensor&, const Tensor&, const Tensor&);
template void llama_fast::cuda::gemm<llama_fast::f16>(const Tensor&, const Tensor&, const Tensor&);
#endif
