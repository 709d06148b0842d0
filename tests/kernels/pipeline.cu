// A pipelined product on sm_80, on which tests/test_emulator.py tries the emulator: c[M, N] = a[M, K] b[N, K]^T with
// cp.async, two stages, swizzled tiles, ldmatrix and mma; the result leaves through shared memory. K % 8 == N % 8 == 0.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace llama_fast::cuda {

constexpr int kTile = 64, kK = 32, kThreads = 128;
constexpr int kTileBytes = kTile * kK * 2, kStageBytes = 2 * kTileBytes;
constexpr int kBytes = 2 * kStageBytes;  // as large as the tile of c

// Address of a chunk of 16 bytes: rows of 64 bytes, two of them make 8 chunks, permuted by the pair's number
LLAMA_FAST_DEVICE uint32_t at(uint32_t tile, int row, int chunk) {
  const int place = (row % 2 * 4 + chunk) ^ (row / 2 % 4);
  return tile + row / 2 * 128 + place * 16;
}

template <class T>
LLAMA_FAST_DEVICE void load(uint32_t tile, Global<const T> x, int row0, int rows, int k0, int K) {
  for (int i = threadIdx.x; i < kTile * kK / 8; i += kThreads) {
    const int row = i / (kK / 8), chunk = i % (kK / 8), k = k0 + chunk * 8;
    const bool inside = row0 + row < rows && k < K;
    ptx::cp_async_16(at(tile, row, chunk), x + (inside ? static_cast<int64_t>(row0 + row) * K + k : 0),
                     inside ? 16 : 0);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    pipeline_kernel(Global<const T> a, Global<const T> b, Global<T> c, int M, int N, int K) {
  LLAMA_FAST_DYNAMIC_SHARED(shared);
  const uint32_t tiles = shared_address(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile, steps = (K + kK - 1) / kK;
  float acc[kTile / 8][4] = {};
  load(tiles, a, m0, M, 0, K);
  load(tiles + kTileBytes, b, n0, N, 0, K);
  ptx::cp_async_commit_group();
  for (int step = 0; step < steps; ++step) {
    const uint32_t now = tiles + step % 2 * kStageBytes, next = tiles + (step + 1) % 2 * kStageBytes;
    if (step + 1 < steps) {
      load(next, a, m0, M, (step + 1) * kK, K);
      load(next + kTileBytes, b, n0, N, (step + 1) * kK, K);
    }
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<1>();
    __syncthreads();  // the tiles are there
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
      uint32_t a_frag[4];
      ptx::ldmatrix_x4(a_frag, at(now, warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < kTile / 16; ++n) {
        uint32_t r[4];
        ptx::ldmatrix_x4(r, at(now + kTileBytes, n * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
        ptx::mma_m16n8k16<T>(acc[2 * n], a_frag, {r[0], r[1]}, acc[2 * n]);
        ptx::mma_m16n8k16<T>(acc[2 * n + 1], a_frag, {r[2], r[3]}, acc[2 * n + 1]);
      }
    }
    __syncthreads();  // everyone has read them
  }
  // each warp writes 16 rows of 128 bytes, and reads them back 16 bytes at a time
  const uint32_t rows = tiles + warp * 16 * 128;
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      ptx::st_shared(rows + row * 128 + ((n ^ (row % 8)) << 4) + lane % 4 * 4,
                     ptx::cvt_rn_x2<T>(acc[n][2 * half + 1], acc[n][2 * half]));
    }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * 8; i += 32) {
    const int row = i / 8, chunk = i % 8, m = m0 + warp * 16 + row, n = n0 + chunk * 8;
    const uint4 v = ptx::ld_shared_v4(rows + row * 128 + ((chunk ^ (row % 8)) << 4));
    if (m < M && n < N) ptx::st_global_v4(c + static_cast<int64_t>(m) * N + n, v);
  }
}

}  // namespace llama_fast::cuda

#ifdef LLAMA_FAST_EMULATE
#include "report.h"

extern "C" const char* run_product(const void* a, const void* b, void* c, int M, int N, int K, bool is_bf16) {
  using namespace llama_fast;
  return report([=] {
    const Mapping ma(a, M * K * 2, "a"), mb(b, N * K * 2, "b"), mc(c, M * N * 2, "c");
    const auto go = [&](auto t) {
      using T = decltype(t);
      using namespace cuda;
      launch({"product", dim3((N + kTile - 1) / kTile, (M + kTile - 1) / kTile), dim3(kThreads), kBytes},
             pipeline_kernel<T>, static_cast<const T*>(ma.data()), static_cast<const T*>(mb.data()),
             static_cast<T*>(mc.data()), M, N, K);
    };
    is_bf16 ? go(bf16{}) : go(f16{});
  });
}
#endif
