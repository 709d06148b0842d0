// Attention, forward, on the matrix units of sm_80 and newer: a block does kRows queries of one head, walks over tiles
// of keys and keeps a running maximum and sum for each row (Dao 2023, arXiv:2307.08691). Scores, weights and output are
// accumulated in float32; a weight is rounded to T for its product with v, the output once at the end.
//
// Copies: while the scores of a tile are computed its values arrive; while the rest is computed, the next tile's keys.
#pragma once

#include "attention.cuh"

namespace llama_fast::cuda::attention {

template <class T_, int D_>
struct FwdConfig {
  using T = T_;
  static constexpr int D = D_;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kStrips = D <= 128 ? 2 : 1;  // of 16 rows a warp: half the reads of keys and values of one
  static constexpr int kRows = 16 * kStrips * kWarps;
  static constexpr int kKeys = D == 96 || D == 128 ? 32 : 64;  // 64 would take more registers than there are
  static constexpr bool kHoldQueries = D <= 64;                // in registers
  using Q = Tile<kRows, D>;
  using K = Tile<kKeys, D>;
  static constexpr int kSharedBytes = Q::kBytes + 2 * K::kBytes;  // 64 KiB for D = 128: two blocks a processor
  static constexpr int kBlocks = D <= 128 ? 2 : 1;
};

template <class T>
struct FwdParams {
  Heads<const T> q, k, v;
  Heads<T> out;
  Global<float> lse;  // [B, H, T]
  Shape shape;
  int slots;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    attention_fwd_kernel(FwdParams<typename Config::T> p) {
  using T = typename Config::T;
  using Q = typename Config::Q;
  using K = typename Config::K;
  constexpr int D = Config::D, kStrips = Config::kStrips, kKeys = Config::kKeys, kThreads = Config::kThreads;
  LLAMA_FAST_DYNAMIC_SHARED(shared);
  const uint32_t q_tile = shared_address(shared), k_tile = q_tile + Q::kBytes, v_tile = k_tile + K::kBytes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, quad = lane % 4;

  // the last slots first: under a causal mask they take longest
  const unsigned slots = p.slots;
  const int slot = static_cast<int>(slots - 1 - blockIdx.x % slots), head_index = static_cast<int>(blockIdx.x / slots);
  const int head = head_index % p.shape.H, batch = head_index / p.shape.H;
  const int group = head / (p.shape.H / p.shape.G);
  int first;
  const Sequence s = sequence_of(p.shape, slot, Config::kRows, first);
  if (first >= s.T) return;
  const Range keys = keys_of(p.shape, s, first, Config::kRows);
  const int first_tile = keys.begin / kKeys, tiles = (keys.end + kKeys - 1) / kKeys;
  const Global<const T> k = p.k.at(batch, s.begin, group), v = p.v.at(batch, s.begin, group);

  float out[kStrips][D / 8][4] = {}, max[kStrips][2], sum[kStrips][2] = {};
#pragma unroll
  for (int m = 0; m < kStrips; ++m) max[m][0] = max[m][1] = -kInfinity;
  uint32_t held[kStrips][Config::kHoldQueries ? D / 16 : 1][4];
  const int row = warp * 16 * kStrips;  // of the tile, the warp's first
  const uint32_t q_lane = Q::lane_a(q_tile, row), k_lane = K::lane_b_rows(k_tile), v_lane = K::lane_a(v_tile, 0);

  Q::template copy<kThreads>(q_tile, p.q.at(batch, s.begin, head), p.q.t, first, s.T);
  if (first_tile < tiles) K::template copy<kThreads>(k_tile, k, p.k.t, first_tile * kKeys, s.S);
  ptx::cp_async_commit_group();
  for (int tile = first_tile; tile < tiles; ++tile) {
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // this tile's keys are there, and nobody reads the last one's values any more
    K::template copy<kThreads>(v_tile, v, p.v.t, tile * kKeys, s.S);
    ptx::cp_async_commit_group();
    if constexpr (Config::kHoldQueries) {
      if (tile == first_tile) {
#pragma unroll
        for (int m = 0; m < kStrips; ++m)
#pragma unroll
          for (int kk = 0; kk < D / 16; ++kk) Q::load_a(held[m][kk], q_lane, 16 * m, kk);
      }
    }

    float score[kStrips][kKeys / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t a[kStrips][4];
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
        if constexpr (Config::kHoldQueries) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = held[m][kk][i];
        } else {
          Q::load_a(a[m], q_lane, 16 * m, kk);
        }
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[2][2];
        K::load_b_rows(b, k_lane, 16 * n, kk);
#pragma unroll
        for (int m = 0; m < kStrips; ++m) mma_pair<T>(score[m][2 * n], score[m][2 * n + 1], a[m], b);
      }
    }

    ptx::cp_async_wait_group<0>();
    __syncthreads();  // the values are there, and nobody reads the keys any more
    if (tile + 1 < tiles) K::template copy<kThreads>(k_tile, k, p.k.t, (tile + 1) * kKeys, s.S);
    ptx::cp_async_commit_group();

    const float scale = p.shape.scale * kLog2e;
    const bool masked = !all_seen(p.shape, s, first + row, 16 * kStrips, tile * kKeys, kKeys);
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[m][n][i] *= scale;
      if (masked) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // against constants: a column's number would take a register each
          const Range seen = keys_of(p.shape, s, first + row + 16 * m + g + 8 * half, 1).from(tile * kKeys + 2 * quad);
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int column = 0; column < 2; ++column)
              if (!seen.has(8 * n + column)) score[m][n][2 * half + column] = -kInfinity;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // rows g and g + 8
        float largest = max[m][half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
          largest = fmaxf(largest, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
        largest = quad_reduce<Max>(largest);
        const float shift = largest == -kInfinity ? 0.0F : largest;  // a row that has seen no key yet
        const float correction = ptx::ex2(max[m][half] - shift);
        max[m][half] = largest;
        float total = 0.0F;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            score[m][n][i] = ptx::ex2(score[m][n][i] - shift);
            total += score[m][n][i];
          }
        sum[m][half] = sum[m][half] * correction + total;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          out[m][n][2 * half] *= correction;
          out[m][n][2 * half + 1] *= correction;
        }
      }
    }

#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
      uint32_t a[kStrips][4];
#pragma unroll
      for (int m = 0; m < kStrips; ++m) as_a<T>(a[m], score[m][2 * kk], score[m][2 * kk + 1]);
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[2][2];
        K::load_b_columns(b, v_lane, 16 * kk, n);
#pragma unroll
        for (int m = 0; m < kStrips; ++m) mma_pair<T>(out[m][2 * n], out[m][2 * n + 1], a[m], b);
      }
    }
  }

  // The output goes through the warp's own rows of the query tile, to leave in whole chunks.
  if (first_tile >= tiles) {  // no tile waited for the queries
    ptx::cp_async_wait_group<0>();
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < kStrips; ++m) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_reduce<Add>(sum[m][half]);
      const int t = first + row + 16 * m + g + 8 * half;
      const bool none = total == 0.0F;  // it sees no key
      factor[half] = none ? 0.0F : 1.0F / total;
      if (quad == 0 && t < s.T)
        p.lse[(static_cast<int64_t>(batch) * p.shape.H + head) * p.shape.T + s.begin + t] =
            none ? -kInfinity : max[m][half] * kLn2 + logf(total);
    }
    Q::template put<T>(q_tile, row + 16 * m, 0, out[m], factor[0], factor[1]);
  }
  __syncwarp();
  Q::template write_out<16 * kStrips, D / 8>(q_tile, row, 0, p.out.at(batch, s.begin, head), p.out.t, first + row, s.T);
}

template <class Config>
void launch_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Shape& shape, const Tensor& out,
                const Tensor& lse, Stream s) {
  using T = typename Config::T;
  const int64_t n = slots(shape, shape.T, Config::kRows);
  const FwdParams<T> p{Heads<const T>(q),  Heads<const T>(k), Heads<const T>(v), Heads<T>(out), lse.ptr<float>(), shape,
                       static_cast<int>(n)};
  launch(launch_of("attention_fwd", s, grid(n * shape.H * shape.B), Config::kThreads, Config::kSharedBytes),
         attention_fwd_kernel<Config>, p);
}

}  // namespace llama_fast::cuda::attention
