// Backward kernels of attention on sm_90a. docs/ops/attention_sm90.md has the count of flops and bytes and the reasons.
//
// A block owns a tile of keys of one key/value head: dk and dv stay in registers while it walks over the tiles of
// queries of the head's group, the last queries first. dq is summed in float32 in global memory, tile by tile, in the
// order of the keys: counters hold back a block until the one before it has added its part, so the sum repeats bitwise.
// Work is dealt in the order of that sum, so whoever is waited for has begun.
//   s = k q^T, p = 2^(scale log2(e) s - lse log2(e)), dp = v dout^T, ds = p (dp - delta)      all [keys, queries]
//   dv += p dout, dk += ds q, dq += ds^T k; p and ds rounded to T; dk and dq times scale at the end
// Producer warp 0 loads; warps 1 and 2 add dq, of every other step each; warp 3 rounds the sums that are complete. A
// consumer warpgroup owns 64 keys.
#pragma once

#include "attention_sm90.cuh"

namespace llama_fast::cuda::sm90 {

struct BwdParams {
  ptx::TensorMap q, k, v, dout;  // (D, row, head, batch)
  ptx::TensorMap stats;          // (lse log2(e) of 64 rows, delta of 64 rows; tile of queries)
  Global<float> dq_sum;          // [tiles of queries][2 groups][64 x D/2 accumulators as registers lie]
  Global<int> turns;             // [tiles of queries]: parts of dq_sum that have been added; 0 on entry
  Global<int> next_work;         // [2]: work to be dealt, head of a work to be rounded; 0 on entry
  Rows dq, dk, dv;
  Global<const int> cu_seqlens;
  int B, T, S, H, G, D, heads_a_group, sequences;
  int query_tiles;  // a head; packed: at most so many in all sequences together
  int key_tiles;    // likewise
  int section;      // key/value heads whose works are dealt together
  float scale, scale_log2;
  Mask mask;
};

template <class T_, int kHeadDim_>
struct BwdConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kGroups = 2, kRows = 64, kKeys = 64 * kGroups;
  static constexpr int kStagesQ = 4, kStagesDout = 2, kStagesDq = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kThreads = kGroupThreads * (kGroups + 1);
  static constexpr int kProducerRegisters = kHeadDim <= 64 ? 40 : 24, kConsumerRegisters = kHeadDim <= 64 ? 232 : 240;
  static_assert(registers_fit(kGroups, kProducerRegisters, kConsumerRegisters), "setmaxnreg would wait for ever");
  static constexpr int kKeyBytes = tile_bytes(kKeys, kHeadDim), kRowBytes = tile_bytes(kRows, kHeadDim);
  static constexpr int kDsBytes = tile_bytes(kKeys, kRows), kDqBytes = kRows * kHeadDim / kGroups * 4;
  static constexpr int kStatsBytes = 2 * kRows * 4;
  static constexpr int kSteps = 8, kStepBytes = 32;  // step infos: more than the stages of all rings reach back
  static constexpr int kK = 0, kV = kK + kKeyBytes, kQ = kV + kKeyBytes, kDout = kQ + kStagesQ * kRowBytes,
                       kDs = kDout + kStagesDout * kRowBytes, kDq = kDs + 2 * kDsBytes,
                       kStats = kDq + kStagesDq * kGroups * kDqBytes, kStep = kStats + kStagesQ * kStatsBytes,
                       kWorkStep = kStep + kSteps * kStepBytes, kWork = kWorkStep + 16, kRound = kWork + 16;
  static constexpr int kFullKeys = kRound + 8 * (4 * kGroups + 1), kEmptyKeys = kFullKeys + 8, kFullQ = kEmptyKeys + 8,
                       kEmptyQ = kFullQ + 8 * kStagesQ, kFullDout = kEmptyQ + 8 * kStagesQ,
                       kEmptyDout = kFullDout + 8 * kStagesDout, kFullDq = kEmptyDout + 8 * kStagesDout,
                       kEmptyDq = kFullDq + 16 * kGroups, kFullWork = kEmptyDq + 8 * kGroups * kStagesDq,
                       kEmptyWork = kFullWork + 16;
  static constexpr int kSharedBytes = kEmptyWork + 16;
};

// What the producer tells the others of a step; byte offsets of words in shared memory. The first four are the same for
// all steps of a work.
struct Step {
  static constexpr int kKeysLeft = 0;  // from the first key of the tile to the end
  static constexpr int kDiagonal = 4;  // first key of the tile, as a row of the tensors, plus T - S
  static constexpr int kKeyTile = 8;
  static constexpr int kWork = 12;  // number of the work among those of the block
  static constexpr int kRow = 16;   // first row of the tile of queries, in the tensors
  static constexpr int kPart = 20;  // the tile of queries, of all
  static constexpr int kLast = 24;  // whether it is the last one of its work
};

// Tiles of queries, from the last to the first, that see a tile of keys.
struct BwdWork {
  Span span;  // block: the tile of keys
  int group;
  int first_tile, tiles;  // [first, first + tiles)
  int stats_tile;         // of tile 0 of the sequence and head 0 of the batch
};

// `index`: sections of heads one after the other; in a section the tiles of keys in ascending order, each of all heads.
// So the tiles of keys of a head, whose dq is summed in that order, begin one after the other and not at once.
template <class Config>
LLAMA_FAST_DEVICE BwdWork bwd_work(const BwdParams& p, int index) {
  const int heads = p.cu_seqlens != nullptr ? p.G : p.B * p.G;
  const int first_head = index / (p.section * p.key_tiles) * p.section, rest = index - first_head * p.key_tiles;
  const int section = min(p.section, heads - first_head);
  const int block = rest / section, head = first_head + rest % section;
  BwdWork work{};
  work.group = head % p.G;
  if (p.cu_seqlens != nullptr) {
    work.span = find_span(p.cu_seqlens, p.sequences, Config::kKeys, block);
    if (work.span.T < 0) return work;
    work.stats_tile = work.span.begin / Config::kRows + work.span.sequence;
  } else {
    work.span = Span{0, p.T, p.S, block, head / p.G, 0};
    work.stats_tile = work.span.batch * p.H * p.query_tiles;
  }
  const Span& span = work.span;
  const int first_key = span.block * Config::kKeys, offset = span.S - span.T;
  work.first_tile = p.mask.causal ? max(first_key - offset, 0) / Config::kRows : 0;
  int last = (span.T + Config::kRows - 1) / Config::kRows;
  if (p.mask.window > 0) {
    const int last_row = first_key + Config::kKeys - 1 + p.mask.window - 1 - offset;
    last = last_row < 0 ? 0 : min(last, last_row / Config::kRows + 1);
  }
  work.tiles = max(last - work.first_tile, 0);
  return work;
}

template <class Config>
LLAMA_FAST_DEVICE int works(const BwdParams& p) {
  return p.key_tiles * (p.cu_seqlens != nullptr ? 1 : p.B) * p.G;
}

template <class Config>
LLAMA_FAST_DEVICE void bwd_produce(const BwdParams& p, uint32_t shared) {
  const bool leader = threadIdx.x % 32 == 0;
  uint32_t step = 0;
#pragma unroll 1
  for (uint32_t n = 0;; ++n) {
    int index = 0;
    if (leader) index = atomicAdd(p.next_work, 1);
    index = __shfl_sync(kAllLanes, index, 0);
    BwdWork work{};
    if (index < works<Config>(p)) work = bwd_work<Config>(p, index);
    if (leader)
      deal_work(shared + Config::kWork, shared + Config::kFullWork, shared + Config::kEmptyWork, n, index,
                work.tiles * p.heads_a_group);
    if (index >= works<Config>(p)) return;
    if (leader) ptx::mbarrier_wait(shared + Config::kEmptyKeys, n % 2 ^ 1);
    if (leader && work.tiles == 0) ptx::mbarrier_arrive(shared + Config::kFullKeys);
    if (leader && work.tiles > 0) {
      const Span& span = work.span;
      const uint32_t full_keys = shared + Config::kFullKeys;
      const int first_key = span.block * Config::kKeys;
      ptx::mbarrier_arrive_expect_tx(full_keys, 2 * Config::kKeyBytes);
      load_tile<Config::kKeys, Config::kHeadDim>(shared + Config::kK, p.k, full_keys, span.begin + first_key,
                                                 work.group, span.batch);
      load_tile<Config::kKeys, Config::kHeadDim>(shared + Config::kV, p.v, full_keys, span.begin + first_key,
                                                 work.group, span.batch);
      // In shared memory, for want of registers.
      ptx::st_shared_v4(
          shared + Config::kWorkStep,
          uint4{static_cast<uint32_t>(span.S - first_key),
                static_cast<uint32_t>(span.begin + first_key - span.S + span.T), static_cast<uint32_t>(span.block), n});
      const int first_row = span.begin + work.first_tile * Config::kRows;
      const int first_head = work.group * p.heads_a_group;
      int row = first_row + (work.tiles - 1) * Config::kRows, head = first_head + p.heads_a_group - 1;
      int part = work.stats_tile + head * p.query_tiles + work.first_tile + work.tiles - 1;
#pragma unroll 1
      for (; row >= first_row;
           row -= Config::kRows, head += p.heads_a_group, part += p.heads_a_group * p.query_tiles - 1) {
#pragma unroll 1
        for (; head >= first_head; --head, part -= p.query_tiles, ++step) {
          const int stage = step % Config::kStagesQ;
          const uint32_t full_q = shared + Config::kFullQ + 8 * stage;
          ptx::mbarrier_wait(shared + Config::kEmptyQ + 8 * stage, step / Config::kStagesQ % 2 ^ 1);
          ptx::fence_proxy_async();  // the statistics were read with ordinary loads
          const uint32_t info = shared + Config::kStep + step % Config::kSteps * Config::kStepBytes;
          ptx::st_shared_v4(info, ptx::ld_shared_v4(shared + Config::kWorkStep));
          ptx::st_shared(info + Step::kRow, row);
          ptx::st_shared(info + Step::kPart, part);
          ptx::st_shared(info + Step::kLast, head == first_head && row == first_row);
          ptx::mbarrier_arrive_expect_tx(full_q, Config::kRowBytes + Config::kStatsBytes);
          // By a tensor map and not as 512 bytes: racecheck takes a plain bulk copy for a write of this thread.
          ptx::tma_load_2d(shared + Config::kStats + stage * Config::kStatsBytes, p.stats, full_q, 0, part);
          load_tile<Config::kRows, Config::kHeadDim>(shared + Config::kQ + stage * Config::kRowBytes, p.q, full_q, row,
                                                     head, span.batch);
          const uint32_t full_dout = shared + Config::kFullDout + 8 * (step % 2);
          ptx::mbarrier_wait(shared + Config::kEmptyDout + 8 * (step % 2), step / 2 % 2 ^ 1);
          ptx::mbarrier_arrive_expect_tx(full_dout, Config::kRowBytes);
          load_tile<Config::kRows, Config::kHeadDim>(shared + Config::kDout + step % 2 * Config::kRowBytes, p.dout,
                                                     full_dout, row, head, span.batch);
        }
      }
    }
    __syncwarp();
  }
}

template <class Config, class F>
LLAMA_FAST_DEVICE void each_bwd_work(const BwdParams& p, uint32_t shared, F&& f) {
  each_dealt_work(shared + Config::kWork, shared + Config::kFullWork, shared + Config::kEmptyWork, works<Config>(p), f);
}

// Adds the dq of every other step to dq_sum, when the tiles of keys before this one have added theirs. Two warps take
// turns, so that one waits for its addition to be complete while the next one begins.
template <class Config>
LLAMA_FAST_DEVICE void bwd_add_dq(const BwdParams& p, uint32_t shared, uint32_t parity) {
  uint32_t step = 0;
  each_bwd_work<Config>(p, shared, [&](uint32_t, uint32_t slot) {
    const uint32_t end = step + ptx::ld_shared(slot + 4);
#pragma unroll 1
    for (step += (step ^ parity) & 1; step < end; step += 2) {
      if (threadIdx.x % 32 != 0) continue;
      const int stage = step % Config::kStagesQ;
      const uint32_t info = shared + Config::kStep + step % Config::kSteps * Config::kStepBytes;
      ptx::mbarrier_wait(shared + Config::kFullQ + 8 * stage, step / Config::kStagesQ % 2);
      const int key_tile = static_cast<int>(ptx::ld_shared(info + Step::kKeyTile));
      const int position = key_tile * Config::kKeys + static_cast<int>(ptx::ld_shared(info + Step::kRow)) -
                           static_cast<int>(ptx::ld_shared(info + Step::kDiagonal));
      const int before = key_tile - p.mask.low(position) / Config::kKeys;
      const int part = static_cast<int>(ptx::ld_shared(info + Step::kPart));
      ptx::mbarrier_arrive(shared + Config::kEmptyQ + 8 * stage);  // so that the phase just seen is not overtaken
      const int dq_stage = step % Config::kStagesDq;
      while (ptx::ld_acquire_gpu(p.turns + part) != before) ptx::nanosleep(20);
      const Global<float> sum = p.dq_sum + static_cast<int64_t>(part) * (Config::kGroups * Config::kDqBytes / 4);
#pragma unroll
      for (int group = 0; group < Config::kGroups; ++group) {
        const uint32_t source = shared + Config::kDq + (dq_stage * Config::kGroups + group) * Config::kDqBytes;
        ptx::mbarrier_wait(shared + Config::kFullDq + 8 * (2 * group + parity), step / 2 % 2);
        if (before == 0)
          ptx::bulk_store(sum + group * (Config::kDqBytes / 4), source, Config::kDqBytes);
        else
          ptx::bulk_reduce_add_f32(sum + group * (Config::kDqBytes / 4), source, Config::kDqBytes);
        ptx::bulk_commit_group();
      }
      ptx::bulk_wait_group_read<1>();
      ptx::mbarrier_arrive(shared + Config::kEmptyDq + 8 * dq_stage);
      ptx::bulk_wait_group_read<0>();
      ptx::mbarrier_arrive(shared + Config::kEmptyDq + 8 * (Config::kStagesDq + dq_stage));
      ptx::bulk_wait_group<0>();
      ptx::fence_proxy_async_global();
      ptx::red_release_gpu_add(p.turns + part, 1);
    }
    step = end;
    __syncwarp();
  });
}

// dq = scale dq_sum, rounded, of the rows whose last tile of keys is the one of a work. Dealt in the order of the works
// to whichever warp of whichever block is free: of a head of a work the 16 rows of each tile that one consumer warp
// had, so that the last ones take little time. For want of registers the number dealt, and which of the tiles, is kept
// in the warp's 8 bytes of shared memory, `state`, and the rest is computed again. kDepth: pairs of loads in flight.
template <class Config, int kDepth>
LLAMA_FAST_DEVICE void bwd_round_dq(const BwdParams& p, uint32_t state) {
  using T = typename Config::T;
  constexpr int kPairs = Config::kHeadDim / 16, kPairWords = 2 * 4 * kGroupThreads;  // 16 columns of 64 rows
  static_assert(kPairs % kDepth == 0 && Config::kGroups * Config::kDqBytes == 4 * kPairs * kPairWords,
                "the layout of dq_sum");
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  while (true) {
    __syncwarp();
    if (lane == 0) {
      ptx::st_shared(state, atomicAdd(p.next_work + 1, 1));
      ptx::st_shared(state + 4, 0);
    }
    __syncwarp();
    if (static_cast<int>(ptx::ld_shared(state)) >= works<Config>(p) * p.heads_a_group * 4) return;
#pragma unroll 1
    while (true) {
      Global<const float> sum;
      Global<T> to;
      int rows;
      {
        const int index = static_cast<int>(ptx::ld_shared(state)), warp = index % 4;
        const BwdWork work = bwd_work<Config>(p, index / 4 / p.heads_a_group);
        const Span& span = work.span;
        const int first_key = span.block * Config::kKeys, offset = span.S - span.T;
        int end = work.first_tile + work.tiles;
        if (first_key + Config::kKeys < span.S)
          end = p.mask.causal ? min(end, (first_key + Config::kKeys - offset) / Config::kRows) : 0;
        const int tile = work.first_tile + static_cast<int>(ptx::ld_shared(state + 4));
        if (tile >= end) break;
        const int head = work.group * p.heads_a_group + index / 4 % p.heads_a_group;
        const int part = work.stats_tile + head * p.query_tiles + tile;
        if (lane == 0) {
          const int parts = span.block + 1 - p.mask.low(tile * Config::kRows + offset) / Config::kKeys;
          while (ptx::ld_acquire_gpu(p.turns + part) != parts) ptx::nanosleep(200);
        }
        __syncwarp();
        if (lane == 0) ptx::st_shared(state + 4, tile + 1 - work.first_tile);
        const int row = tile * Config::kRows + 16 * warp + lane / 4 + lane % 4 / 2 * 8;
        rows = span.T - row;
        sum = p.dq_sum + (static_cast<int64_t>(part) * (kPairs * kPairWords) + 4 * (32 * warp + lane));
        to = p.dq.template at<T>(span.batch, span.begin + row, head) + 8 * (lane % 2);
      }
#pragma unroll 1
      for (int pair = 0; pair < kPairs; pair += kDepth) {
        float4 x[kDepth][2];
#pragma unroll
        for (int i = 0; i < 2 * kDepth; ++i)
          x[i / 2][i % 2] = bit_cast<float4>(ptx::ld_global_v4(sum + i * (kPairWords / 2)));
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
          const float4 a = x[i][0], b = x[i][1];
          uint32_t chunks[4] = {pack<T>(a.x * p.scale, a.y * p.scale), pack<T>(b.x * p.scale, b.y * p.scale),
                                pack<T>(a.z * p.scale, a.w * p.scale), pack<T>(b.z * p.scale, b.w * p.scale)};
          gather_chunks(chunks);
          if (rows > 0 && 16 * (pair + i) + 8 * (lane % 2) < p.D)
            ptx::st_global_v4(to + 16 * i, uint4{chunks[0], chunks[1], chunks[2], chunks[3]});
        }
        sum = sum + kDepth * kPairWords, to = to + 16 * kDepth;
      }
      __syncwarp();
    }
  }
}

template <class Config>
LLAMA_FAST_DEVICE void bwd_consume(const BwdParams& p, uint32_t shared, int group) {
  using T = typename Config::T;
  constexpr int kHeadDim = Config::kHeadDim, kRows = Config::kRows, kKeys = Config::kKeys;
  const int thread = threadIdx.x % kGroupThreads, warp = thread / 32, lane = thread % 32;
  const uint64_t k_operand = row_operand(shared + Config::kK + 64 * group * sm90::kRowBytes);
  const uint64_t v_operand = row_operand(shared + Config::kV + 64 * group * sm90::kRowBytes);
  // dq's columns D/2 group to D/2 (group + 1) - 1
  constexpr int kOwnColumns = kHeadDim / 2;
  const uint64_t k_columns =
      column_operand<kKeys>(shared + Config::kK + group * kOwnColumns / kPanelCols * panel_bytes(kKeys) +
                            group * kOwnColumns % kPanelCols * 2);
  const auto release = [&](int barrier) {
    if (lane == 0) ptx::mbarrier_arrive(shared + barrier);
  };
  // Where stmatrix puts the row that this lane addresses: 16 bytes lane / 16 of row lane % 16 of the warp, swizzled.
  const uint32_t ds_row = (64 * group + 16 * warp + lane % 16) * sm90::kRowBytes + ((lane / 16 ^ lane % 8) << 4);

  uint32_t step = 0;
  float dk[kHeadDim / 2], dv[kHeadDim / 2], s[kRows / 2];

  const auto q_stage = [](uint32_t step) { return static_cast<int>(step % Config::kStagesQ); };
  const auto queue_scores = [&](uint32_t step) {  // s = K Q^T
    ptx::mbarrier_wait(shared + Config::kFullQ + 8 * q_stage(step), step / Config::kStagesQ % 2);
    ptx::wgmma_fence();
    const uint64_t operand = row_operand(shared + Config::kQ + q_stage(step) * Config::kRowBytes);
#pragma unroll
    for (int kk = 0; kk < kHeadDim / 16; ++kk)
      ptx::wgmma_ss<T, kRows, false, false>(s, k_operand + row_step<kKeys>(kk), operand + row_step<kRows>(kk), kk > 0);
    ptx::wgmma_commit_group();
  };

  each_bwd_work<Config>(p, shared, [&](uint32_t& n, uint32_t slot) {
    ptx::mbarrier_wait(shared + Config::kFullKeys, n % 2);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.0F;
    if (ptx::ld_shared(slot + 4) != 0) {
      queue_scores(step);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_use(s);
      bool last;
      do {
        const uint32_t info = shared + Config::kStep + step % Config::kSteps * Config::kStepBytes;
        const uint32_t q_tile = shared + Config::kQ + q_stage(step) * Config::kRowBytes;
        const uint32_t dout_tile = shared + Config::kDout + step % 2 * Config::kRowBytes;
        const uint32_t stats = shared + Config::kStats + q_stage(step) * Config::kStatsBytes;
        const uint32_t ds_tile = shared + Config::kDs + step % 2 * Config::kDsBytes;
        float dp[kRows / 2], dq[kOwnColumns / 2];
        uint32_t weights[kRows / 16][4], ds[kRows / 16][4];
        // dp = V dout^T
        ptx::mbarrier_wait(shared + Config::kFullDout + 8 * (step % 2), step / 2 % 2);
        ptx::wgmma_fence();
        const uint64_t dout_rows = row_operand(dout_tile);
#pragma unroll
        for (int kk = 0; kk < kHeadDim / 16; ++kk)
          ptx::wgmma_ss<T, kRows, false, false>(dp, v_operand + row_step<kKeys>(kk), dout_rows + row_step<kRows>(kk),
                                                kk > 0);
        ptx::wgmma_commit_group();
        last = ptx::ld_shared(info + Step::kLast) != 0;
        const int diagonal = static_cast<int>(ptx::ld_shared(info + Step::kDiagonal)) -
                             static_cast<int>(ptx::ld_shared(info + Step::kRow)) + 64 * group;
        const int keys_left = static_cast<int>(ptx::ld_shared(info + Step::kKeysLeft)) - 64 * group;
        if (keys_left < 64 || (p.mask.causal && diagonal > -64 + 1) ||
            (p.mask.window > 0 && diagonal < kRows - p.mask.window)) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            // The key is seen by the columns low <= column < high, where column 0 is row 2 (lane % 4) of the tile.
            const int key = 16 * warp + lane / 4 + 8 * r, own = key + diagonal - 2 * (lane % 4);
            const int low = key >= keys_left ? kRows : p.mask.causal ? own : -kRows;
            const int high = p.mask.window > 0 ? own + p.mask.window : kRows;
#pragma unroll
            for (int i = 0; i < kRows / 2; ++i)
              if (i / 2 % 2 == r) {
                const int column = i / 4 * 8 + i % 2;
                if (column < low || column >= high) s[i] = -kInfinity;
              }
          }
        }
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          const float2 lse = bit_cast<float2>(ptx::ld_shared_v2(stats + 4 * (8 * j + 2 * (lane % 4))));
#pragma unroll
          for (int i = 4 * j; i < 4 * j + 4; ++i)
            s[i] = ptx::ex2(fmaf(s[i], p.scale_log2, -(i % 2 == 0 ? lse.x : lse.y)));
        }
#pragma unroll
        for (int kk = 0; kk < kRows / 16; ++kk)
#pragma unroll
          for (int i = 0; i < 4; ++i) weights[kk][i] = pack<T>(s[8 * kk + 2 * i], s[8 * kk + 2 * i + 1]);
        // dv += P dout
        ptx::wgmma_fence();
        const uint64_t dout_columns = column_operand<kRows>(dout_tile);
#pragma unroll
        for (int kk = 0; kk < kRows / 16; ++kk)
          ptx::wgmma_rs<T, kHeadDim, true>(dv, weights[kk], dout_columns + column_step(kk), 1);
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<1>();  // dp, and dk of the step before
        ptx::wgmma_use(dp);
        if (step > 0) release(Config::kEmptyQ + 8 * q_stage(step - 1));
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          const float2 delta = bit_cast<float2>(ptx::ld_shared_v2(stats + 4 * kRows + 4 * (8 * j + 2 * (lane % 4))));
#pragma unroll
          for (int i = 4 * j; i < 4 * j + 4; ++i) dp[i] = s[i] * (dp[i] - (i % 2 == 0 ? delta.x : delta.y));
        }
#pragma unroll
        for (int kk = 0; kk < kRows / 16; ++kk) {
#pragma unroll
          for (int i = 0; i < 4; ++i) ds[kk][i] = pack<T>(dp[8 * kk + 2 * i], dp[8 * kk + 2 * i + 1]);
          ptx::stmatrix_x4(ds_tile + (ds_row ^ kk << 5), ds[kk]);
        }
        ptx::fence_proxy_async();
        if (last) {
          ptx::wgmma_wait_group<0>();  // dv, which frees the weights
        } else {
          queue_scores(step + 1);
          ptx::wgmma_wait_group<1>();
        }
        release(Config::kEmptyDout + 8 * (step % 2));
        ptx::bar_sync(1, Config::kGroups * kGroupThreads);
        // dq = dS^T K of all keys of the block
        ptx::wgmma_fence();
        const uint64_t ds_columns = column_operand<kKeys>(ds_tile);
#pragma unroll
        for (int kk = 0; kk < kKeys / 16; ++kk)
          ptx::wgmma_ss<T, kOwnColumns, true, true>(dq, ds_columns + column_step(kk), k_columns + column_step(kk),
                                                    kk > 0);
        ptx::wgmma_commit_group();
        // dk += dS Q
        const uint64_t ds_rows = row_operand(ds_tile + 64 * group * sm90::kRowBytes);
        const uint64_t q_columns = column_operand<kRows>(q_tile);
#pragma unroll
        for (int kk = 0; kk < kRows / 16; ++kk)
          if constexpr (kHeadDim <= 64)
            ptx::wgmma_rs<T, kHeadDim, true>(dk, ds[kk], q_columns + column_step(kk), 1);
          else  // 16 registers more would make ptxas serialize the products (C7512)
            ptx::wgmma_ss<T, kHeadDim, false, true>(dk, ds_rows + row_step<kKeys>(kk), q_columns + column_step(kk), 1);
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<1>();  // all but dk
        ptx::wgmma_use(dq);
        ptx::wgmma_use(s);
        const int dq_stage = step % Config::kStagesDq;
        ptx::mbarrier_wait(shared + Config::kEmptyDq + 8 * (group * Config::kStagesDq + dq_stage),
                           step / Config::kStagesDq % 2 ^ 1);
#pragma unroll
        for (int i = 0; i < kOwnColumns / 2; i += 4)
          ptx::st_shared_v4(shared + Config::kDq + (dq_stage * Config::kGroups + group) * Config::kDqBytes +
                                (i / 4 * kGroupThreads + thread) * 16,
                            bit_cast<uint4>(float4{dq[i], dq[i + 1], dq[i + 2], dq[i + 3]}));
        ptx::fence_proxy_async();
        __syncwarp();
        release(Config::kFullDq + 8 * (2 * group + step % 2));  // one for each of the warps that take turns
        ++step;
      } while (!last);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_use(dk);
      ptx::wgmma_use(dv);
      // Read again, so that it does not stay in a register through the loop.
      n = ptx::ld_shared(shared + Config::kStep + (step - 1) % Config::kSteps * Config::kStepBytes + Step::kWork);
    }
    __syncwarp();  // all lanes have seen the phase end
    release(Config::kEmptyKeys);
    const BwdWork work = bwd_work<Config>(p, static_cast<int>(ptx::ld_shared(shared + Config::kWork + 8 * (n % 2))));
    const Span& span = work.span;
    if (span.T < 0) return;
    const int key = span.block * kKeys + 64 * group + 16 * warp + lane / 4;
    const float one[2] = {1.0F, 1.0F}, scale[2] = {p.scale, p.scale};
    store_rows<T, kHeadDim>(dk, scale, p.dk.template at<T>(span.batch, span.begin + key, work.group), p.dk.token,
                            span.S - key, p.D);
    store_rows<T, kHeadDim>(dv, one, p.dv.template at<T>(span.batch, span.begin + key, work.group), p.dv.token,
                            span.S - key, p.D);
  });
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) attention_bwd_kernel(const __grid_constant__ BwdParams p) {
  LLAMA_FAST_DYNAMIC_SHARED(shared_memory);
  const uint32_t shared = shared_address(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Config::kGroups;
    ptx::mbarrier_init(shared + Config::kFullKeys, 1);
    ptx::mbarrier_init(shared + Config::kEmptyKeys, kConsumerWarps);
    for (int stage = 0; stage < Config::kStagesQ; ++stage) {
      ptx::mbarrier_init(shared + Config::kFullQ + 8 * stage, 1);
      ptx::mbarrier_init(shared + Config::kEmptyQ + 8 * stage, kConsumerWarps + 1);
    }
    for (int stage = 0; stage < Config::kStagesDout; ++stage) {
      ptx::mbarrier_init(shared + Config::kFullDout + 8 * stage, 1);
      ptx::mbarrier_init(shared + Config::kEmptyDout + 8 * stage, kConsumerWarps);
    }
    for (int group = 0; group < Config::kGroups; ++group) {
      for (int parity = 0; parity < 2; ++parity)
        ptx::mbarrier_init(shared + Config::kFullDq + 8 * (2 * group + parity), 4);
      for (int stage = 0; stage < Config::kStagesDq; ++stage)
        ptx::mbarrier_init(shared + Config::kEmptyDq + 8 * (group * Config::kStagesDq + stage), 1);
    }
    for (int stage = 0; stage < 2; ++stage) {
      ptx::mbarrier_init(shared + Config::kFullWork + 8 * stage, 1);
      ptx::mbarrier_init(shared + Config::kEmptyWork + 8 * stage, kConsumerWarps + 2);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int group =
      __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0);  // uniform to the compiler
  if (group == Config::kGroups) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    const int warp = threadIdx.x / 32 % 4;
    if (warp == 0)
      bwd_produce<Config>(p, shared);
    else if (warp <= 2)
      bwd_add_dq<Config>(p, shared, warp - 1);
    else
      bwd_round_dq<Config, Config::kHeadDim <= 64 ? 2 : 1>(p, shared + Config::kRound + 8 * 4 * Config::kGroups);
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    bwd_consume<Config>(p, shared, group);
    bwd_round_dq<Config, 4>(p, shared + Config::kRound + threadIdx.x / 32 * 8);  // what is left
  }
}

}  // namespace llama_fast::cuda::sm90
