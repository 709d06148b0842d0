// Forward kernel of attention on sm_90a. docs/ops/attention_sm90.md has the roofline and the reasons.
//
// A persistent block: one producer warp feeds a ring of K and V tiles through TMA; each consumer warpgroup owns 64 rows
// of the tile of queries. Per tile of keys a group queues S = Q K^T of the next tile, then out += P V of this one,
// hands the turn to the other group, and computes the next P while the tensor cores run the other's products.
//   p_j = 2^(scale log2(e) (s_j - m)), m: a maximum of the row that may lag by kSlack / (scale log2(e))
//   out = sum p_j v_j / sum p_j (p rounded to T in the numerator, not in the denominator), lse = scale m + ln sum p_j
#pragma once

#include "attention_sm90.cuh"

namespace llama_fast::cuda::sm90 {

struct FwdParams {
  ptx::TensorMap q, k, v;  // maps of a tensor: (D, row, head, batch)
  Rows out;
  Global<float> lse;  // [B, H, T]
  Global<const int> cu_seqlens;
  Global<int> next_tile;  // 0 on entry; null where there is no more than a tile a block
  int B, T, S, H, D, heads_a_group, sequences;
  int blocks;   // of queries a head; packed: at most so many in all sequences together
  int section;  // heads whose tiles are dealt together, so that their keys and values stay in the second cache
  float scale, scale_log2;
  Mask mask;
};

template <class T_, int kHeadDim_, int kGroups_, int kBlockKeys_, int kStages_>
struct FwdConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kGroups = kGroups_, kBlockKeys = kBlockKeys_, kStages = kStages_;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kThreads = kGroupThreads * (kGroups + 1);
  static constexpr int kProducerRegisters = kGroups == 2 ? 40 : 32, kConsumerRegisters = kGroups == 2 ? 232 : 160;
  // Whether a group leaves out the blocks of keys that only later groups see, and the wait for the next keys needs
  // every weight. On an H200, ms, without and with: D 64, 8 x 2k, 0.359 and 0.346; D 128, 16k, 1.542 and 1.644.
  static constexpr bool kLeavesOut = kHeadDim <= 64;
  static_assert(registers_fit(kGroups, kProducerRegisters, kConsumerRegisters), "setmaxnreg would wait for ever");
  static constexpr int kQBytes = tile_bytes(kRows, kHeadDim), kKeyBytes = tile_bytes(kBlockKeys, kHeadDim);
  static constexpr int kQ = 0, kK = kQBytes, kV = kK + kStages * kKeyBytes, kBarriers = kV + kStages * kKeyBytes;
  static constexpr int kFullQ = kBarriers, kEmptyQ = kFullQ + 8, kFullK = kEmptyQ + 8, kEmptyK = kFullK + 8 * kStages,
                       kFullV = kEmptyK + 8 * kStages, kEmptyV = kFullV + 8 * kStages, kWork = kEmptyV + 8 * kStages,
                       kFullWork = kWork + 16, kEmptyWork = kFullWork + 16;
  static constexpr int kSharedBytes = kEmptyWork + 16;
};

struct FwdWork {
  Span span;
  int head, first_key_block, last_key_block;  // [first, last)
};

// Tile `index` of the order: sections of heads; in a section the last queries, which see the most keys, first.
template <class Config>
LLAMA_FAST_DEVICE FwdWork fwd_work(const FwdParams& p, int index) {
  const int heads = p.cu_seqlens != nullptr ? p.H : p.B * p.H;
  const int section_tiles = p.section * p.blocks;
  const int section = index / section_tiles, rest = index % section_tiles;
  const int section_heads = min(p.section, heads - section * p.section);
  const int block = p.blocks - 1 - rest / section_heads, head = section * p.section + rest % section_heads;
  FwdWork work;
  if (p.cu_seqlens != nullptr) {
    work.span = find_span(p.cu_seqlens, p.sequences, Config::kRows, block);
    work.head = head;
  } else {
    work.span = Span{0, p.T, p.S, block, head / p.H, 0};
    work.head = head % p.H;
  }
  const Span& span = work.span;
  const int row = span.block * Config::kRows, offset = span.S - span.T;
  const int last_row = min(row + Config::kRows, span.T) - 1;
  const int high = p.mask.high(last_row + offset, span.S);
  work.first_key_block = p.mask.low(row + offset) / Config::kBlockKeys;
  work.last_key_block = span.T >= 0 && high > 0 ? (high + Config::kBlockKeys - 1) / Config::kBlockKeys : 0;
  return work;
}

LLAMA_FAST_DEVICE int fwd_tiles(const FwdParams& p) { return p.blocks * (p.cu_seqlens != nullptr ? 1 : p.B) * p.H; }

template <class Config>
LLAMA_FAST_DEVICE void fwd_produce(const FwdParams& p, uint32_t shared) {
  constexpr int kStages = Config::kStages;
  const bool leader = threadIdx.x % 32 == 0;
  uint32_t k_count = 0, v_count = 0, q_count = 0;
  int index = blockIdx.x;
#pragma unroll 1
  for (uint32_t n = 0;; ++n) {
    if (leader) deal_work(shared + Config::kWork, shared + Config::kFullWork, shared + Config::kEmptyWork, n, index, 0);
    if (index >= fwd_tiles(p)) return;
    const FwdWork work = fwd_work<Config>(p, index);
    const Span& span = work.span;
    const int group = work.head / p.heads_a_group;
    if constexpr (Config::kLeavesOut) {  // every tile has a phase of Q, also one that sees no keys
      if (leader) ptx::mbarrier_wait(shared + Config::kEmptyQ, (n & 1) ^ 1);
      if (leader && work.first_key_block >= work.last_key_block) ptx::mbarrier_arrive(shared + Config::kFullQ);
    }
    if (leader && work.first_key_block < work.last_key_block) {
      const auto load_keys = [&](const ptx::TensorMap& map, int tiles, int full, int empty, uint32_t& count,
                                 int block) {
        const int stage = count % kStages;
        ptx::mbarrier_wait(shared + empty + 8 * stage, (count / kStages & 1) ^ 1);
        ptx::mbarrier_arrive_expect_tx(shared + full + 8 * stage, Config::kKeyBytes);
        load_tile<Config::kBlockKeys, Config::kHeadDim>(shared + tiles + stage * Config::kKeyBytes, map,
                                                        shared + full + 8 * stage,
                                                        span.begin + block * Config::kBlockKeys, group, span.batch);
        ++count;
      };
      if constexpr (!Config::kLeavesOut) ptx::mbarrier_wait(shared + Config::kEmptyQ, (q_count & 1) ^ 1);
      ptx::mbarrier_arrive_expect_tx(shared + Config::kFullQ, Config::kQBytes);
      load_tile<Config::kRows, Config::kHeadDim>(shared + Config::kQ, p.q, shared + Config::kFullQ,
                                                 span.begin + span.block * Config::kRows, work.head, span.batch);
      ++q_count;
      load_keys(p.k, Config::kK, Config::kFullK, Config::kEmptyK, k_count, work.last_key_block - 1);
#pragma unroll 1
      for (int block = work.last_key_block - 1; block >= work.first_key_block; --block) {
        if (block > work.first_key_block)
          load_keys(p.k, Config::kK, Config::kFullK, Config::kEmptyK, k_count, block - 1);
        load_keys(p.v, Config::kV, Config::kFullV, Config::kEmptyV, v_count, block);
      }
    }
    index = fwd_tiles(p);
    if (leader && p.next_tile != nullptr) index = gridDim.x + atomicAdd(p.next_tile, 1);
    index = __shfl_sync(kAllLanes, index, 0);
  }
}

// Maxima and sums of the two rows of a thread, row 0 and row 8 of its warp's 16, spread over the four threads of a
// quad.
struct RowState {
  float m[2], sum[2];
};

// s: scores of 64 rows on entry, weights p on return. Gives whether `factor` has to be applied to earlier sums of the
// rows: the maxima are taken over only where one grew by more than kSlack in the exponent, p <= 2^kSlack. So the first
// weights need not wait for the maxima: they are computed beside them, and again in the rare case.
// kFirst: as many exponentials as take the time of the maxima, or as there are registers for.
template <int kCols, int kFirst>
LLAMA_FAST_DEVICE bool softmax_step(float (&s)[kCols / 2], RowState& rows, float (&factor)[2], float scale_log2) {
  constexpr float kSlack = 8.0F;
  float shift[2], first[kFirst], high[4] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
  const auto weigh_first = [&] {
#pragma unroll
    for (int r = 0; r < 2; ++r) shift[r] = rows.m[r] == -kInfinity ? 0.0F : rows.m[r] * scale_log2;
#pragma unroll
    for (int i = 0; i < kFirst; ++i) first[i] = ptx::ex2(fmaf(s[i], scale_log2, -shift[i / 2 % 2]));
  };
  weigh_first();
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) high[i % 4] = fmaxf(high[i % 4], s[i]);
  bool grown = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    high[r] = fmaxf(high[2 * r], high[2 * r + 1]);
    grown = grown || (high[r] - rows.m[r]) * scale_log2 > kSlack;
  }
  grown = __any_sync(kAllLanes, grown);
  if (grown) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      high[r] = fmaxf(high[r], __shfl_xor_sync(kAllLanes, high[r], 1));
      high[r] = fmaxf(fmaxf(high[r], __shfl_xor_sync(kAllLanes, high[r], 2)), rows.m[r]);
      factor[r] = high[r] == -kInfinity ? 1.0F : ptx::ex2((rows.m[r] - high[r]) * scale_log2);
      rows.m[r] = high[r];
      rows.sum[r] *= factor[r];
    }
    weigh_first();
  }
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) {
    s[i] = i < kFirst ? first[i % kFirst] : ptx::ex2(fmaf(s[i], scale_log2, -shift[i / 2 % 2]));
    rows.sum[i / 2 % 2] += s[i];
  }
  return grown;
}

template <class Config>
LLAMA_FAST_DEVICE void fwd_consume(const FwdParams& p, uint32_t shared, int group) {
  using T = typename Config::T;
  constexpr int kStages = Config::kStages, kKeys = Config::kBlockKeys, kHeadDim = Config::kHeadDim;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int own_row = 64 * group + 16 * warp + lane / 4;  // and own_row + 8
  // Tiles read so far. With kLeavesOut v_count stands for all three, which at D 64 spares the registers of the others.
  uint32_t k_count = 0, v_count = 0, q_count = 0;
  const uint64_t q_operand = row_operand(shared + Config::kQ + 64 * group * kRowBytes);
  const uint64_t k_operand = row_operand(shared + Config::kK);
  const uint64_t v_operand = column_operand<kKeys>(shared + Config::kV);

  const auto release = [&](int barriers) {
    if (lane == 0) ptx::mbarrier_arrive(shared + barriers);
  };
  const auto await_and_release = [&](int full, int empty, uint32_t count) {  // a stage that the group does not use
    const int stage = 8 * (count % kStages);
    ptx::mbarrier_wait(shared + full + stage, count / kStages & 1);
    __syncwarp();  // all lanes have seen the phase end
    release(empty + stage);
  };
  using Scores = float[kKeys / 2];
  constexpr int kFirst = Config::kGroups == 2 ? 16 : 4;
  float out[kHeadDim / 2];
  uint32_t weights[kKeys / 16][4];
  const auto queue_scores = [&](Scores& s, int stage) {  // s = Q K^T
    const uint64_t k = k_operand + stage * (Config::kKeyBytes / 16);
#pragma unroll
    for (int kk = 0; kk < kHeadDim / 16; ++kk)
      ptx::wgmma_ss<T, kKeys, false, false>(s, q_operand + row_step<Config::kRows>(kk), k + row_step<kKeys>(kk),
                                            kk > 0);
    ptx::wgmma_commit_group();
  };
  const auto queue_values = [&](int stage) {  // out += P V
    const uint64_t v = v_operand + stage * (Config::kKeyBytes / 16);
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) ptx::wgmma_rs<T, kHeadDim, true>(out, weights[kk], v + column_step(kk), 1);
    ptx::wgmma_commit_group();
  };
  const auto round_weights = [&](const Scores& s) {
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[kk][i] = pack<T>(s[8 * kk + 2 * i], s[8 * kk + 2 * i + 1]);
  };

  const auto tile = [&](const FwdWork& work, uint32_t n) {
    const Span& span = work.span;
    const int row = span.block * Config::kRows + own_row;  // in the sequence
    const int position = row + span.S - span.T;
    RowState rows{{-kInfinity, -kInfinity}, {0.0F, 0.0F}};
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.0F;

    // Adds the blocks of keys below last_block to out and rows. The positions: of the group's rows.
    const auto attend = [&](int last_block, int first_position, int last_position) {
      const auto hide = [&](Scores& s, int block) {  // -inf where a key is not seen
        const int first = block * kKeys;
        if (first >= p.mask.low(last_position) && first + kKeys <= p.mask.high(first_position, span.S)) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int low = p.mask.low(position + 8 * r) - first - 2 * (lane % 4);
          const int high = p.mask.high(position + 8 * r, span.S) - first - 2 * (lane % 4);
#pragma unroll
          for (int i = 0; i < kKeys / 2; ++i)
            if (i / 2 % 2 == r) {
              const int column = i / 4 * 8 + i % 2;
              if (column < low || column >= high) s[i] = -kInfinity;
            }
        }
      };
      const auto keys = [&](uint32_t ahead) {  // of K before the one that is so many blocks ahead
        if constexpr (Config::kLeavesOut)
          return v_count + ahead;
        else
          return k_count;
      };
      const auto await_keys = [&](uint32_t count) {
        ptx::mbarrier_wait(shared + Config::kFullK + 8 * (count % kStages), count / kStages & 1);
      };
      const auto weighed = [&] {  // true; with kLeavesOut not before every weight is there
        if constexpr (Config::kLeavesOut)
          return !(rows.sum[0] < 0.0F || rows.sum[1] < 0.0F);
        else
          return true;
      };
      float factor[2];
      ptx::mbarrier_wait(shared + Config::kFullQ, (Config::kLeavesOut ? n : q_count) & 1);
      await_keys(keys(0));
      ptx::wgmma_fence();
      Scores s;
      queue_scores(s, keys(0) % kStages);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_use(s);
      release(Config::kEmptyK + 8 * (keys(0) % kStages));
      ++k_count;
      hide(s, last_block - 1);
      softmax_step<kKeys, kFirst>(s, rows, factor, p.scale_log2);
      round_weights(s);
      if (last_block - 2 >= work.first_key_block) await_keys(keys(1));
      for (int block = last_block - 2; block >= work.first_key_block; --block) {
        const int k_stage = keys(1) % kStages, v_stage = v_count % kStages;
        ptx::bar_sync(1 + group, 2 * kGroupThreads);
        ptx::wgmma_fence();
        Scores s;
        queue_scores(s, k_stage);
        ptx::mbarrier_wait(shared + Config::kFullV + 8 * v_stage, v_count / kStages & 1);
        ptx::wgmma_fence();
        queue_values(v_stage);
        ptx::bar_arrive(1 + (group + 1) % Config::kGroups, 2 * kGroupThreads);
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_use(s);
        release(Config::kEmptyK + 8 * k_stage);
        hide(s, block);
        const bool grown = softmax_step<kKeys, kFirst>(s, rows, factor, p.scale_log2);
        ++k_count;
        // Here, so that a branch stands between the weights and the wait for the products that run beside them: ptxas
        // puts the wait first where it can.
        if (block > work.first_key_block && weighed()) await_keys(keys(2));
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_use(out);
        release(Config::kEmptyV + 8 * v_stage);
        if (grown) {
#pragma unroll
          for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= factor[i / 2 % 2];
        }
        round_weights(s);
        ++v_count;
      }
      release(Config::kEmptyQ);
      ++q_count;
      const int v_stage = v_count % kStages;
      ptx::mbarrier_wait(shared + Config::kFullV + 8 * v_stage, v_count / kStages & 1);
      ptx::wgmma_fence();
      queue_values(v_stage);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_use(out);
      release(Config::kEmptyV + 8 * v_stage);
      ++v_count;
    };
    if constexpr (Config::kLeavesOut) {
      const int first_position = position - own_row + 64 * group, last_position = first_position + 63;
      // Blocks of keys that only groups of later rows see: gives back their stages, and passes the turn, which goes
      // round once a block but the last.
      int last_block = work.first_key_block;
      if (row - own_row + 64 * group < span.T)
        last_block = max(last_block, (p.mask.high(min(last_position, span.S - 1), span.S) + kKeys - 1) / kKeys);
#pragma unroll 1
      for (int block = work.last_key_block - 1; block >= last_block; --block) {
        await_and_release(Config::kFullK, Config::kEmptyK, v_count);
        if (block > work.first_key_block) {
          ptx::bar_sync(1 + group, 2 * kGroupThreads);
          ptx::bar_arrive(1 + (group + 1) % Config::kGroups, 2 * kGroupThreads);
        }
        await_and_release(Config::kFullV, Config::kEmptyV, v_count++);
      }
      if (work.first_key_block < last_block) {
        attend(last_block, first_position, last_position);
      } else {
        ptx::mbarrier_wait(shared + Config::kFullQ, n & 1);
        __syncwarp();
        release(Config::kEmptyQ);
      }
    } else if (work.first_key_block < work.last_key_block) {
      const int first_position = position - own_row + 64 * group;
      attend(work.last_key_block, first_position, first_position + 63);
    }

    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows.sum[r] += __shfl_xor_sync(kAllLanes, rows.sum[r], 1);
      rows.sum[r] += __shfl_xor_sync(kAllLanes, rows.sum[r], 2);
      inverse[r] = rows.sum[r] == 0.0F ? 0.0F : 1.0F / rows.sum[r];
      if (lane % 4 == 0 && row + 8 * r < span.T)
        p.lse[(static_cast<int64_t>(span.batch) * p.H + work.head) * p.T + span.begin + row + 8 * r] =
            rows.sum[r] == 0.0F ? -kInfinity : rows.m[r] * p.scale + __logf(rows.sum[r]);
    }
    store_rows<T, kHeadDim>(out, inverse, p.out.template at<T>(span.batch, span.begin + row, work.head), p.out.token,
                            span.T - row, p.D);
  };
  each_dealt_work(shared + Config::kWork, shared + Config::kFullWork, shared + Config::kEmptyWork, fwd_tiles(p),
                  [&](uint32_t n, uint32_t slot) {
                    const FwdWork work = fwd_work<Config>(p, static_cast<int>(ptx::ld_shared(slot)));
                    if (Config::kLeavesOut || work.span.T >= 0) tile(work, n);
                  });
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) attention_fwd_kernel(const __grid_constant__ FwdParams p) {
  LLAMA_FAST_DYNAMIC_SHARED(shared_memory);
  const uint32_t shared = shared_address(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Config::kGroups;
    ptx::mbarrier_init(shared + Config::kFullQ, 1);
    ptx::mbarrier_init(shared + Config::kEmptyQ, kConsumerWarps);
    for (int stage = 0; stage < Config::kStages; ++stage) {
      ptx::mbarrier_init(shared + Config::kFullK + 8 * stage, 1);
      ptx::mbarrier_init(shared + Config::kEmptyK + 8 * stage, kConsumerWarps);
      ptx::mbarrier_init(shared + Config::kFullV + 8 * stage, 1);
      ptx::mbarrier_init(shared + Config::kEmptyV + 8 * stage, kConsumerWarps);
    }
    for (int slot = 0; slot < 2; ++slot) {
      ptx::mbarrier_init(shared + Config::kFullWork + 8 * slot, 1);
      ptx::mbarrier_init(shared + Config::kEmptyWork + 8 * slot, kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  int group = static_cast<int>(threadIdx.x) / kGroupThreads;  // the last one produces
  if constexpr (Config::kLeavesOut) group = __shfl_sync(kAllLanes, group, 0);
  if (group == Config::kGroups) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x / 32 % 4 == 0) fwd_produce<Config>(p, shared);
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    if (group == Config::kGroups - 1) ptx::bar_arrive(1, 2 * kGroupThreads);
    fwd_consume<Config>(p, shared, group);
  }
}

}  // namespace llama_fast::cuda::sm90
