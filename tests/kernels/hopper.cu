// A warp-specialised product on sm_90a, on which tests/test_emulator.py tries the emulator: c[M, N] = a[M, K] b[N,
// K]^T, one TMA producer warp, one consumer warpgroup, a ring of two stages.
#include <string>

#include "cuda/launch.cuh"
#include "cuda/tensor_map.cuh"

namespace llama_fast::cuda {

constexpr int kM = 64, kN = 128, kK = 64, kStages = 2;
constexpr int kABytes = kM * kK * 2, kStage = kABytes + kN * kK * 2;
constexpr int kResult = kStages * kStage, kResultBytes = kM * kN * 2, kBarriers = kResult + kResultBytes;
constexpr int kBytes = kBarriers + 2 * kStages * 8;

template <class T>
__global__ void __launch_bounds__(256, 1)
    gemm_kernel(const __grid_constant__ ptx::TensorMap a, const __grid_constant__ ptx::TensorMap b,
                const __grid_constant__ ptx::TensorMap c, int K) {
  LLAMA_FAST_DYNAMIC_SHARED(shared);
  const uint32_t tiles = shared_address(shared), full = tiles + kBarriers, empty = full + 8 * kStages;
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
    ptx::setmaxnreg_inc<256>();
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
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty + 8 * s);
    }
    ptx::wgmma_use(acc);
    // two panels of 64 columns, swizzled as the tensor map of c says
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kN / 8; n += 2) {
      const int row = 16 * warp + lane % 16, chunk = n % 8 + lane / 16;
      const float* d = acc + 4 * n;
      ptx::stmatrix_x4(tiles + kResult + n / 8 * kM * 128 + row * 128 + ((chunk ^ (row % 8)) << 4),
                       {ptx::cvt_rn_x2<T>(d[1], d[0]), ptx::cvt_rn_x2<T>(d[3], d[2]), ptx::cvt_rn_x2<T>(d[5], d[4]),
                        ptx::cvt_rn_x2<T>(d[7], d[6])});
    }
    ptx::fence_proxy_async();
    ptx::bar_sync(1, 128);
    if (threadIdx.x == 0) {
      for (int panel = 0; panel < kN / 64; ++panel)
        ptx::tma_store_2d(c, tiles + kResult + panel * kM * 128, n0 + panel * 64, m0);
      ptx::bulk_commit_group();
      ptx::bulk_wait_group_read<0>();
    }
  }
}

template <class T>
void gemm(const Tensor& a, const Tensor& b, const Tensor& c) {
  const int M = a.size[0], K = a.size[1], N = b.size[0];
  const auto map_a = make_tensor_map<2>("gemm", a, {1, 0}, {kK, kM}),
             map_b = make_tensor_map<2>("gemm", b, {1, 0}, {kK, kN}),
             map_c = make_tensor_map<2>("gemm", c, {1, 0}, {64, kM});
  const dim3 grid((N + kN - 1) / kN, (M + kM - 1) / kM);
  launch({"gemm", grid, dim3(256), kBytes}, gemm_kernel<T>, map_a, map_b, map_c, K);
}

}  // namespace llama_fast::cuda

#ifdef LLAMA_FAST_EMULATE
#include "report.h"

extern "C" const char* run_gemm(const void* a, const void* b, void* c, int M, int N, int K, bool is_bf16) {
  using namespace llama_fast;
  return report([=] {
    const Mapping ma(a, M * K * 2, "a"), mb(b, N * K * 2, "b"), mc(c, M * N * 2, "c");
    const DType type = is_bf16 ? DType::bf16 : DType::f16;
    const Tensor ta{ma.data(), type, 2, {M, K}, {K, 1}}, tb{mb.data(), type, 2, {N, K}, {K, 1}},
        tc{mc.data(), type, 2, {M, N}, {N, 1}};
    is_bf16 ? cuda::gemm<bf16>(ta, tb, tc) : cuda::gemm<f16>(ta, tb, tc);
  });
}
#else
template void llama_fast::cuda::gemm<llama_fast::bf16>(const Tensor&, const Tensor&, const Tensor&);
template void llama_fast::cuda::gemm<llama_fast::f16>(const Tensor&, const Tensor&, const Tensor&);
#endif
