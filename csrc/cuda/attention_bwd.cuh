// Attention, backward, on the matrix units of sm_80 and newer, in three kernels without atomics: delta = rowsum(dout
// out); dk and dv, a block a tile of keys, which walks over the queries that see it, of every head of the group; dq, a
// block a tile of queries, which walks over the keys that they see. The last two recompute the weights from lse:
//
//   P = exp(scale q k' - lse),   dv = P' dout,   dS = P (dout v' - delta),   dk = scale dS' q,   dq = scale dS k
//
// Everything is accumulated in float32. P and dS are rounded to T for their products, dq, dk and dv once at the end.
#pragma once

#include "attention.cuh"

namespace llama_fast::cuda::attention {

template <class T>
struct BwdParams {
  Heads<const T> dout, q, k, v, out;
  Global<const float> lse;  // [B, H, T]
  Heads<T> dq, dk, dv;
  Global<float> delta;  // [B, H, T]
  Shape shape;
  int slots;
};

// ---- delta
// -----------------------------------------------------------------------------------------------------------
constexpr int kDeltaThreads = 128;
constexpr int kDeltaRows = kDeltaThreads / kWarp * 16;  // of dout [B, T, H], 16 a warp

// The matrix units form the sums, of whose 16 x 16 results the diagonal is wanted: so they are rounded as those of
// dout v' are, and dS of a row that sees one key is 0, as it should be, and not the noise of two orders of summation.
template <class T, int D>
__global__ void __launch_bounds__(kDeltaThreads) attention_delta_kernel(BwdParams<T> p, int64_t rows) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, quad = lane % 4;
  Global<const uint32_t> out[2], dout[2];  // of rows g and g + 8, from column 2 quad on
  int64_t at[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kDeltaRows + warp * 16 + g + 8 * half;
    const int64_t row = index < rows ? index : rows - 1;
    const int64_t head = row % p.shape.H, t = row / p.shape.H % p.shape.T, batch = row / p.shape.H / p.shape.T;
    out[half] = pointer_cast<const uint32_t>(p.out.at(batch, t, head)) + quad;
    dout[half] = pointer_cast<const uint32_t>(p.dout.at(batch, t, head)) + quad;
    at[half] = index < rows ? (batch * p.shape.H + head) * p.shape.T + t : -1;
  }
  float delta[2][4] = {};
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk) {
    const uint32_t a[4] = {out[0][8 * kk], out[1][8 * kk], out[0][8 * kk + 4], out[1][8 * kk + 4]};
    const uint32_t b[2][2] = {{dout[0][8 * kk], dout[0][8 * kk + 4]}, {dout[1][8 * kk], dout[1][8 * kk + 4]}};
    mma_pair<T>(delta[0], delta[1], a, b);
  }
  if (quad != g / 2) return;  // the diagonal: row g of the first product, g + 8 of the second, column g
  if (at[0] >= 0) p.delta[at[0]] = g % 2 == 0 ? delta[0][0] : delta[0][1];
  if (at[1] >= 0) p.delta[at[1]] = g % 2 == 0 ? delta[1][2] : delta[1][3];
}

// ---- dk, dv
// ----------------------------------------------------------------------------------------------------------
template <class T_, int D_>
struct KeysConfig {
  using T = T_;
  static constexpr int D = D_;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kParts =
      D > 128 ? 2 : 1;  // of the columns of dk and dv, one a warp: more overflow the registers
  static constexpr int kStrips = D <= 64 ? 2 : 1;  // of 16 keys a warp
  static constexpr int kKeys = 16 * kStrips * kWarps / kParts;
  static constexpr int kQueries = 32;
  using K = Tile<kKeys, D>;
  using Q = Tile<kQueries, D>;
  static constexpr int kStageBytes = 2 * Q::kBytes;  // queries and dout
  static constexpr int kStatisticsBytes = 2 * kQueries * 4;
  static constexpr int kSharedBytes = 2 * K::kBytes + 2 * kStageBytes + 2 * kStatisticsBytes;
  static constexpr int kBlocks = D <= 128 ? 2 : 1;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    attention_dkdv_kernel(BwdParams<typename Config::T> p) {
  using T = typename Config::T;
  using K = typename Config::K;
  using Q = typename Config::Q;
  constexpr int D = Config::D, kStrips = Config::kStrips, kQueries = Config::kQueries, kThreads = Config::kThreads;
  constexpr int kColumns = D / Config::kParts;  // of dk and dv, a warp: whole panels
  static_assert(Config::kParts == 1 || kColumns % Q::kColumns == 0, "panels");
  LLAMA_FAST_DYNAMIC_SHARED(shared);
  const uint32_t k_tile = shared_address(shared), v_tile = k_tile + K::kBytes, stages = v_tile + K::kBytes;
  const Shared<float> statistics = pointer_cast<float>(shared + (2 * K::kBytes + 2 * Config::kStageBytes));
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, g = lane / 4, quad = lane % 4;
  const int row = warp / Config::kParts * 16 * kStrips;            // of the tile of keys, the warp's first
  const int first_chunk = warp % Config::kParts * (kColumns / 8);  // of the warp's columns

  const int slot = static_cast<int>(blockIdx.x % p.slots);
  const int64_t group_index = blockIdx.x / p.slots;
  const int group = static_cast<int>(group_index % p.shape.G), batch = static_cast<int>(group_index / p.shape.G);
  const int heads = p.shape.H / p.shape.G;
  int first;
  const Sequence s = sequence_of(p.shape, slot, Config::kKeys, first);
  if (first >= s.S) return;
  const Range queries = queries_of(p.shape, s, first, Config::kKeys);
  const int first_tile = queries.begin / kQueries;
  const int tiles = queries.end > queries.begin ? (queries.end + kQueries - 1) / kQueries - first_tile : 0;
  const int turns = tiles * heads;

  // Turn `turn` is a tile of queries of one head of the group.
  const auto head_of = [&](int turn) { return group * heads + turn / tiles; };
  const auto query_of = [&](int turn) { return (first_tile + turn % tiles) * kQueries; };
  const auto copy_stage = [&](int turn) {
    const uint32_t stage = stages + turn % 2 * Config::kStageBytes;
    const int head = head_of(turn), t = query_of(turn);
    Q::template copy<kThreads>(stage, p.q.at(batch, s.begin, head), p.q.t, t, s.T);
    Q::template copy<kThreads>(stage + Q::kBytes, p.dout.at(batch, s.begin, head), p.dout.t, t, s.T);
  };
  // Thread i < 2 kQueries has lse log2(e) or delta of a query; a query that is not there or sees no key has weight 0.
  const auto load_statistic = [&](int turn) {
    const int t = query_of(turn) + thread % kQueries;
    const bool lse = thread < kQueries;
    float x = lse ? kInfinity : 0.0F;
    if (thread < 2 * kQueries && t < s.T) {
      const int64_t at = (static_cast<int64_t>(batch) * p.shape.H + head_of(turn)) * p.shape.T + s.begin + t;
      x = lse ? p.lse[at] * kLog2e : static_cast<float>(p.delta[at]);
      if (lse && x == -kInfinity) x = kInfinity;
    }
    return x;
  };

  K::template copy<kThreads>(k_tile, p.k.at(batch, s.begin, group), p.k.t, first, s.S);
  K::template copy<kThreads>(v_tile, p.v.at(batch, s.begin, group), p.v.t, first, s.S);
  float dk[kStrips][kColumns / 8][4] = {}, dv[kStrips][kColumns / 8][4] = {};
  if (turns > 0) {
    copy_stage(0);
    const float x = load_statistic(0);
    if (thread < 2 * kQueries) statistics[thread] = x;
  }
  ptx::cp_async_commit_group();
  const float scale = p.shape.scale * kLog2e;
  const uint32_t k_lane = K::lane_a(k_tile, row), v_lane = K::lane_a(v_tile, row);
  const uint32_t rows_lane = Q::lane_b_rows(stages),
                 columns_lane = Q::lane_a(stages, 0) + first_chunk * (kQueries * 16);
  for (int turn = 0; turn < turns; ++turn) {
    float next = 0.0F;
    if (turn + 1 < turns) {
      copy_stage(turn + 1);
      next = load_statistic(turn + 1);
    }
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<1>();
    __syncthreads();  // this turn's queries are there
    const uint32_t stage = turn % 2 * Config::kStageBytes;
    const uint32_t q_rows = rows_lane + stage, dout_rows = q_rows + Q::kBytes;
    const uint32_t q_columns = columns_lane + stage, dout_columns = q_columns + Q::kBytes;
    const Shared<float> lse = statistics + turn % 2 * 2 * kQueries, delta = lse + kQueries;
    const int t = query_of(turn);

    float weight[kStrips][kQueries / 8][4] = {}, ds[kStrips][kQueries / 8][4] = {};  // [keys, queries]
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t a_k[kStrips][4], a_v[kStrips][4];
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
        K::load_a(a_k[m], k_lane, 16 * m, kk);
        K::load_a(a_v[m], v_lane, 16 * m, kk);
      }
#pragma unroll
      for (int n = 0; n < kQueries / 16; ++n) {
        uint32_t b_q[2][2], b_dout[2][2];
        Q::load_b_rows(b_q, q_rows, 16 * n, kk);
        Q::load_b_rows(b_dout, dout_rows, 16 * n, kk);
#pragma unroll
        for (int m = 0; m < kStrips; ++m) {
          mma_pair<T>(weight[m][2 * n], weight[m][2 * n + 1], a_k[m], b_q);
          mma_pair<T>(ds[m][2 * n], ds[m][2 * n + 1], a_v[m], b_dout);
        }
      }
    }

#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) weight[m][n][i] *= scale;
    if (!all_seen(p.shape, s, t, kQueries, first + row, 16 * kStrips)) {
#pragma unroll
      for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Range seen = queries_of(p.shape, s, first + row + 16 * m + g + 8 * half, 1).from(t + 2 * quad);
#pragma unroll
          for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
            for (int column = 0; column < 2; ++column)
              if (!seen.has(8 * n + column)) weight[m][n][2 * half + column] = -kInfinity;
        }
    }
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int query = 8 * n + 2 * quad + column;
        const float lse_of_query = lse[query], delta_of_query = delta[query];
#pragma unroll
        for (int m = 0; m < kStrips; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = 2 * half + column;
            const float w = ptx::ex2(weight[m][n][i] - lse_of_query);
            weight[m][n][i] = w;
            ds[m][n][i] = w * (ds[m][n][i] - delta_of_query);
          }
      }

#pragma unroll
    for (int kk = 0; kk < kQueries / 16; ++kk) {
      uint32_t a_weight[kStrips][4], a_ds[kStrips][4];
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
        as_a<T>(a_weight[m], weight[m][2 * kk], weight[m][2 * kk + 1]);
        as_a<T>(a_ds[m], ds[m][2 * kk], ds[m][2 * kk + 1]);
      }
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b_q[2][2], b_dout[2][2];
        Q::load_b_columns(b_dout, dout_columns, 16 * kk, n);
        Q::load_b_columns(b_q, q_columns, 16 * kk, n);
#pragma unroll
        for (int m = 0; m < kStrips; ++m) {
          mma_pair<T>(dv[m][2 * n], dv[m][2 * n + 1], a_weight[m], b_dout);
          mma_pair<T>(dk[m][2 * n], dk[m][2 * n + 1], a_ds[m], b_q);
        }
      }
    }
    if (turn + 1 < turns && thread < 2 * kQueries) statistics[(turn + 1) % 2 * 2 * kQueries + thread] = next;
    __syncthreads();  // nobody reads this turn's stage any more
  }

  // They go through the tiles of keys and values, to leave in whole chunks.
  ptx::cp_async_wait_group<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kStrips; ++m) {
    K::template put<T>(k_tile, row + 16 * m, first_chunk, dk[m], p.shape.scale, p.shape.scale);
    K::template put<T>(v_tile, row + 16 * m, first_chunk, dv[m], 1.0F, 1.0F);
  }
  __syncwarp();
  K::template write_out<16 * kStrips, kColumns / 8>(k_tile, row, first_chunk, p.dk.at(batch, s.begin, group), p.dk.t,
                                                    first + row, s.S);
  K::template write_out<16 * kStrips, kColumns / 8>(v_tile, row, first_chunk, p.dv.at(batch, s.begin, group), p.dv.t,
                                                    first + row, s.S);
}

// ---- dq
// --------------------------------------------------------------------------------------------------------------
template <class T_, int D_>
struct QueriesConfig {
  using T = T_;
  static constexpr int D = D_;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kKeys = D <= 64 ? 64 : D <= 128 ? 32 : 16;
  static constexpr bool kHold = D <= 128;  // the queries and dout, in registers
  using Q = Tile<kRows, D>;
  using K = Tile<kKeys, D>;
  static constexpr int kStageBytes = 2 * K::kBytes;  // keys and values
  static constexpr int kSharedBytes = 2 * Q::kBytes + 2 * kStageBytes;
  static constexpr int kBlocks = D <= 128 ? 2 : 1;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    attention_dq_kernel(BwdParams<typename Config::T> p) {
  using T = typename Config::T;
  using K = typename Config::K;
  using Q = typename Config::Q;
  constexpr int D = Config::D, kKeys = Config::kKeys, kThreads = Config::kThreads;
  LLAMA_FAST_DYNAMIC_SHARED(shared);
  const uint32_t q_tile = shared_address(shared), dout_tile = q_tile + Q::kBytes, stages = dout_tile + Q::kBytes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, quad = lane % 4, row = warp * 16;

  const int slot = p.slots - 1 - static_cast<int>(blockIdx.x % p.slots);
  const int64_t head_index = blockIdx.x / p.slots;
  const int head = static_cast<int>(head_index % p.shape.H), batch = static_cast<int>(head_index / p.shape.H);
  const int group = head / (p.shape.H / p.shape.G);
  int first;
  const Sequence s = sequence_of(p.shape, slot, Config::kRows, first);
  if (first >= s.T) return;
  const Range keys = keys_of(p.shape, s, first, Config::kRows);
  const int first_tile = keys.begin / kKeys, tiles = (keys.end + kKeys - 1) / kKeys;
  const Global<const T> k = p.k.at(batch, s.begin, group), v = p.v.at(batch, s.begin, group);
  const auto copy_stage = [&](int tile) {
    const uint32_t stage = stages + tile % 2 * Config::kStageBytes;
    K::template copy<kThreads>(stage, k, p.k.t, tile * kKeys, s.S);
    K::template copy<kThreads>(stage + K::kBytes, v, p.v.t, tile * kKeys, s.S);
  };

  Q::template copy<kThreads>(q_tile, p.q.at(batch, s.begin, head), p.q.t, first, s.T);
  Q::template copy<kThreads>(dout_tile, p.dout.at(batch, s.begin, head), p.dout.t, first, s.T);
  if (first_tile < tiles) copy_stage(first_tile);
  ptx::cp_async_commit_group();
  float lse[2] = {kInfinity, kInfinity}, delta[2] = {};  // of rows g and g + 8; weight 0 where there is no such query
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = first + row + g + 8 * half;
    if (t < s.T) {
      const int64_t at = (static_cast<int64_t>(batch) * p.shape.H + head) * p.shape.T + s.begin + t;
      lse[half] = p.lse[at] * kLog2e;
      if (lse[half] == -kInfinity) lse[half] = kInfinity;
      delta[half] = p.delta[at];
    }
  }
  const float scale = p.shape.scale * kLog2e;
  const uint32_t q_lane = Q::lane_a(q_tile, row), dout_lane = Q::lane_a(dout_tile, row);
  const uint32_t rows_lane = K::lane_b_rows(stages), columns_lane = K::lane_a(stages, 0);
  float dq[D / 8][4] = {};
  uint32_t held_q[Config::kHold ? D / 16 : 1][4], held_dout[Config::kHold ? D / 16 : 1][4];
  for (int tile = first_tile; tile < tiles; ++tile) {
    if (tile + 1 < tiles) copy_stage(tile + 1);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<1>();
    __syncthreads();  // this tile's keys and values are there
    const uint32_t stage = tile % 2 * Config::kStageBytes;
    const uint32_t k_rows = rows_lane + stage, v_rows = k_rows + K::kBytes, k_columns = columns_lane + stage;
    if constexpr (Config::kHold) {
      if (tile == first_tile) {
#pragma unroll
        for (int kk = 0; kk < D / 16; ++kk) {
          Q::load_a(held_q[kk], q_lane, 0, kk);
          Q::load_a(held_dout[kk], dout_lane, 0, kk);
        }
      }
    }

    float weight[kKeys / 8][4] = {}, ds[kKeys / 8][4] = {};  // [queries, keys]
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t a_q[4], a_dout[4];
      if constexpr (Config::kHold) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a_q[i] = held_q[kk][i], a_dout[i] = held_dout[kk][i];
      } else {
        Q::load_a(a_q, q_lane, 0, kk);
        Q::load_a(a_dout, dout_lane, 0, kk);
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b_k[2][2], b_v[2][2];
        K::load_b_rows(b_k, k_rows, 16 * n, kk);
        K::load_b_rows(b_v, v_rows, 16 * n, kk);
        mma_pair<T>(weight[2 * n], weight[2 * n + 1], a_q, b_k);
        mma_pair<T>(ds[2 * n], ds[2 * n + 1], a_dout, b_v);
      }
    }

#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) weight[n][i] *= scale;
    if (!all_seen(p.shape, s, first + row, 16, tile * kKeys, kKeys)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Range seen = keys_of(p.shape, s, first + row + g + 8 * half, 1).from(tile * kKeys + 2 * quad);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int column = 0; column < 2; ++column)
            if (!seen.has(8 * n + column)) weight[n][2 * half + column] = -kInfinity;
      }
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[n][i] = ptx::ex2(weight[n][i] - lse[i / 2]) * (ds[n][i] - delta[i / 2]);

#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
      uint32_t a[4];
      as_a<T>(a, ds[2 * kk], ds[2 * kk + 1]);
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[2][2];
        K::load_b_columns(b, k_columns, 16 * kk, n);
        mma_pair<T>(dq[2 * n], dq[2 * n + 1], a, b);
      }
    }
    __syncthreads();  // nobody reads this tile any more
  }

  ptx::cp_async_wait_group<0>();
  __syncthreads();
  Q::template put<T>(q_tile, row, 0, dq, p.shape.scale, p.shape.scale);
  __syncwarp();
  Q::template write_out<16, D / 8>(q_tile, row, 0, p.dq.at(batch, s.begin, head), p.dq.t, first + row, s.T);
}

template <class T, int D>
void launch_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                const Tensor& lse, const Shape& shape, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                const Tensor& delta, Stream s) {
  const char* op = "attention_bwd";
  using Keys = KeysConfig<T, D>;
  using Queries = QueriesConfig<T, D>;
  BwdParams<T> p{Heads<const T>(dout),
                 Heads<const T>(q),
                 Heads<const T>(k),
                 Heads<const T>(v),
                 Heads<const T>(out),
                 lse.ptr<const float>(),
                 Heads<T>(dq),
                 Heads<T>(dk),
                 Heads<T>(dv),
                 delta.ptr<float>(),
                 shape,
                 0};
  const int64_t rows = int64_t{1} * shape.B * shape.T * shape.H;
  if (rows > 0) {
    launch(launch_of(op, s, grid(ceil_div(rows, kDeltaRows)), kDeltaThreads), attention_delta_kernel<T, D>, p, rows);
  }
  p.slots = static_cast<int>(slots(shape, shape.S, Keys::kKeys));
  if (const int64_t blocks = int64_t{1} * p.slots * shape.G * shape.B; blocks > 0)
    launch(launch_of(op, s, grid(blocks), Keys::kThreads, Keys::kSharedBytes), attention_dkdv_kernel<Keys>, p);
  p.slots = static_cast<int>(slots(shape, shape.T, Queries::kRows));
  if (const int64_t blocks = int64_t{1} * p.slots * shape.H * shape.B; blocks > 0)
    launch(launch_of(op, s, grid(blocks), Queries::kThreads, Queries::kSharedBytes), attention_dq_kernel<Queries>, p);
}

}  // namespace llama_fast::cuda::attention
