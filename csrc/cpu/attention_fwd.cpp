// The forward of attention on the CPU: out [B,T,H,D] T and lse [B,H,T] float32, both overwritten.
// Scores, their exponentials, the sums and the accumulator of out are float32; the weights are rounded to T before they
// multiply v where the processor multiplies bfloat16 pairs, and nowhere else; out is rounded once. Nothing depends on
// the number of threads. Scratch: packed k and v, at most kWaveBytes or one head's, and a tile a thread; never T x S.
// Design and derivation: docs/ops/attention.md.
#ifndef LF_ISA

#include <type_traits>

#include "attention_plan.h"
#include "parallel.h"
#include "simd.h"

#define LF_THIS_FILE "attention_fwd.cpp"
#include "each_isa.h"

namespace llama_fast::cpu {

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                   bool causal, int64_t window, const Tensor& out, const Tensor& lse) {
#if LF_X86
  if (current_isa() == Isa::amx && amx::attention_fwd(q, k, v, cu_seqlens, scale, causal, window, out, lse)) return;
#endif
  LF_DISPATCH(attention_fwd, q, k, v, cu_seqlens, scale, causal, window, out, lse);
}

int64_t attention_few_scratch(int64_t D) { return 2 * kFewRows * blocks_of(D, 16) * 16 + kKeys; }

void attention_few(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t window, const Tensor& out,
                   const Tensor& lse, float* scratch) {
  LF_DISPATCH(attention_few, q, k, v, scale, window, out, lse, scratch);
}

}  // namespace llama_fast::cpu

#else

#include "attention_tile.h"

#include "attention_few.h"

namespace llama_fast::cpu::LF_ISA {
namespace {

constexpr int64_t kWaveBytes = 32 << 20;  // packed k and v that are worked on together: about a last-level cache

// What a thread needs for one tile.
template <class U>
struct FwdTile {
  U* q;           // [Du][kRows]
  float* scores;  // [kKeys][kRows], then the weights: units [kKeys / kPer][kRows]
  float* out;     // [D][kRows]
  float* buffer;  // four rows of D

  static int64_t floats(int64_t D) { return D * kRows<U> + kKeys * kRows<U> + D * kRows<U> + 4 * round_up(D, kLanes); }
  FwdTile(float* base, int64_t D)
      : q(reinterpret_cast<U*>(base)),
        scores(base + D * kRows<U>),
        out(scores + kKeys * kRows<U>),
        buffer(out + D * kRows<U>) {}
};

struct RowState {
  alignas(64) float max[kMostRows];    // of scale * log2(e) * score; -inf before the first key
  alignas(64) float sum[kMostRows];    // of 2^(score - max)
  alignas(64) float alpha[kMostRows];  // what the sums so far are multiplied by
  alignas(64) float block_max[kMostRows];
};

// scores[m, r] = k[m] . q[r] for panels [begin, end) of kM keys, times `factor` -inf where hidden; the maxima of each
// row, times `factor`.
template <bool kMasked, class U>
void score_block(const U* k, const FwdTile<U>& tile, int64_t Du, Range panels, int64_t groups, float factor,
                 const Bounds& bounds, RowState& state) {
  for (int64_t r = 0; r < groups * kV * kLanes; r += kLanes)
    store(state.block_max + r, VecF(-std::numeric_limits<float>::infinity()));
  const VecF hidden(factor < 0.0F ? std::numeric_limits<float>::infinity() : -std::numeric_limits<float>::infinity());
  for (int64_t p = panels.begin; p < panels.end; ++p)
    for (int64_t r = 0; r < groups * kV * kLanes; r += kV * kLanes) {
      VecF acc[kM][kV], top[kV];
      multiply<kV>(k + p * kM * Du, 1, Du, tile.q + r, kRows<U>, Du, acc);
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) top[v] = load(state.block_max + r + v * kLanes);
      for_each_acc<kV>([&](int m, int v) {
        VecF s = acc[m][v];
        if constexpr (kMasked) s = bounds.seen(VecF(static_cast<float>(p * kM + m)), r + v * kLanes, s, hidden);
        top[v] = max(top[v], s * VecF(factor));
        store(tile.scores + (p * kM + m) * kRows<U> + r + v * kLanes, s);
      });
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) store(state.block_max + r + v * kLanes, top[v]);
    }
}

// Replaces scores by weights 2^(factor score - max) as units across keys; updates max, sum and alpha. True where alpha
// is 1 for every row.
template <class U>
bool soften_block(const FwdTile<U>& tile, Range panels, int64_t groups, float factor, RowState& state) {
  constexpr int kPer = kPerUnit<U>;
  U* weights = reinterpret_cast<U*>(tile.scores);
  VecF changed(0.0F);
  for (int64_t r = 0; r < groups * kV * kLanes; r += kLanes) {
    const VecF old_max = load(state.max + r);
    const VecF new_max = max(old_max, load(state.block_max + r));
    store(state.max + r, new_max);
    // finite where no key was seen yet, so that -inf - max is -inf and not NaN
    const VecF top = max(new_max, VecF(-std::numeric_limits<float>::max()));
    const VecF alpha = exp2_flush(old_max - top);
    const VecF minus_top = VecF(0.0F) - top;
    store(state.alpha + r, alpha);
    changed = max(changed, VecF(1.0F) - alpha);
    VecF total[2] = {VecF(0.0F), VecF(0.0F)};
    for (int64_t j = panels.begin * kM; j < panels.end * kM; j += 2) {
      const VecF even = exp2_flush(fma(load(tile.scores + j * kRows<U> + r), VecF(factor), minus_top));
      const VecF odd = exp2_flush(fma(load(tile.scores + (j + 1) * kRows<U> + r), VecF(factor), minus_top));
      total[0] = total[0] + even;
      total[1] = total[1] + odd;
      if constexpr (kPer == 2) {
        store_pairs(weights + j / 2 * kRows<U> + r, even, odd);
      } else {
        store(weights + j * kRows<U> + r, even);
        store(weights + (j + 1) * kRows<U> + r, odd);
      }
    }
    store(state.sum + r, fma(load(state.sum + r), alpha, total[0] + total[1]));
  }
  return max(changed) == 0.0F;
}

enum class Before { kNothing, kSame, kRescale };

// out[d, r] = out[d, r] * alpha[r] + sum over keys of v[key, d] weights[key, r]
template <class U>
void add_block(const U* v_panels, const FwdTile<U>& tile, int64_t D, Range panels, int64_t groups, Before before,
               const RowState& state) {
  constexpr int kPer = kPerUnit<U>;
  const int64_t first = panels.begin * kM / kPer, count = (panels.end - panels.begin) * kM / kPer;
  const U* weights = reinterpret_cast<const U*>(tile.scores) + first * kRows<U>;
  for (int64_t d = 0; d < D; d += kM)
    for (int64_t r = 0; r < groups * kV * kLanes; r += kV * kLanes) {
      float* out = tile.out + d * kRows<U> + r;
      VecF acc[kM][kV];
      multiply<kV>(v_panels + d * (kKeys / kPer) + first * kM, kM, 1, weights + r, kRows<U>, count, acc);
      if (before == Before::kRescale) {
        VecF alpha[kV];
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) alpha[v] = load(state.alpha + r + v * kLanes);
        for_each_acc<kV>(
            [&](int m, int v) { acc[m][v] = fma(load(out + m * kRows<U> + v * kLanes), alpha[v], acc[m][v]); });
      } else if (before == Before::kSame) {
        for_each_acc<kV>([&](int m, int v) { acc[m][v] = load(out + m * kRows<U> + v * kLanes) + acc[m][v]; });
      }
      for_each_acc<kV>([&](int m, int v) { store(out + m * kRows<U> + v * kLanes, acc[m][v]); });
    }
}

template <class T, class U>
void fwd_tile(const AttentionSizes& sizes, const Head& head, int64_t index, const U* k_pack, const U* v_pack,
              const FwdTile<U>& tile, const Rows<T>& q, const Rows<T>& out, const Tensor& lse) {
  const int64_t D = sizes.D, Du = D / kPerUnit<U>, block_units = kKeys * Du;
  const int64_t first = index * kRows<U>, n = std::min(kRows<U>, sizes.rows(head) - first);
  const int64_t groups = blocks_of(n, kV * kLanes);
  pack_transposed<T>([&](int64_t r) { return query_row(q, sizes, head, first + r); }, n, D,
                     reinterpret_cast<U*>(tile.buffer), tile.q);

  RowState state;
  for (int64_t r = 0; r < kRows<U>; ++r) {
    state.max[r] = -std::numeric_limits<float>::infinity();
    state.sum[r] = 0.0F;
  }
  const float factor = exponent_factor(sizes.scale);
  Range common;
  const Range seen = sizes.keys_of_tile(head, index, &common);
  Before before = Before::kNothing;
  Bounds bounds;
  for (int64_t key = seen.begin / kKeys * kKeys; key < seen.end; key += kKeys) {
    const Range panels = {std::max<int64_t>(seen.begin - key, 0) / kM, blocks_of(std::min(seen.end - key, kKeys), kM)};
    const U* k_block = k_pack + (head.slot + key / kKeys) * block_units;
    const U* v_block = v_pack + (head.slot + key / kKeys) * block_units;
    if (key + panels.begin * kM >= common.begin && key + panels.end * kM <= common.end) {
      score_block<false>(k_block, tile, Du, panels, groups, factor, bounds, state);
    } else {
      bounds.set(sizes, head, index, key);
      score_block<true>(k_block, tile, Du, panels, groups, factor, bounds, state);
    }
    const bool same = soften_block(tile, panels, groups, factor, state);
    if (before != Before::kNothing) before = same ? Before::kSame : Before::kRescale;
    add_block(v_block, tile, D, panels, groups, before, state);
    before = Before::kSame;
  }

  if (before == Before::kNothing) std::memset(tile.out, 0, static_cast<size_t>(D * kRows<U>) * sizeof(float));
  for (int64_t r = 0; r < n; ++r) {
    // a row that saw no key has sum 0; a NaN stays
    state.alpha[r] = state.sum[r] == 0.0F ? 0.0F : 1.0F / state.sum[r];
    *lse_of(lse, sizes, head, first + r) = lse_from(state.max[r], state.sum[r]);
  }
  unpack_transposed<T, U>(tile.out, state.alpha, n, D, tile.buffer,
                          [&](int64_t r) { return query_row(out, sizes, head, first + r); });
}

template <class T>
void fwd(const AttentionSizes& sizes, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
         const Tensor& out, const Tensor& lse) {
  using U = typename UnitOf<T>::type;
  const int64_t D = sizes.D, block_units = kKeys * D / kPerUnit<U>;
  const auto few = [&](const Head& head) { return sizes.rows(head) <= kFewRows; };
  const auto blocks = [&](const Head& head) { return few(head) ? 0 : blocks_of(head.S, kKeys); };
  const std::vector<Wave> waves =
      waves_of(heads_of(sizes, q, k, cu_seqlens), kWaveBytes, blocks,
               [&](const Head& head) { return 2 * blocks(head) * block_units * static_cast<int64_t>(sizeof(U)); });
  const int64_t slots = largest(waves).slots;
  const Scratch<U> k_pack(slots * block_units), v_pack(slots * block_units);
  const int64_t tile_floats = std::max(FwdTile<U>::floats(D), attention_few_scratch(D));
  const Scratch<float> tiles(max_threads() * tile_floats);
  const Rows<T> q_rows(q), k_rows(k), v_rows(v), out_rows(out);

  for (const Wave& wave : waves) {
    run_in_order(wave, blocks, [&](const Head& head, int64_t index, int64_t thread) {
      const int64_t key = index * kKeys, keys = std::min(kKeys, head.S - key), at = (head.slot + index) * block_units;
      const FwdTile<U> tile(tiles.data() + thread * tile_floats, D);
      const auto row_of = [&](const Rows<T>& x) {
        return [&, key](int64_t j) -> const T* { return x.row(head.batch, head.k_begin + key + j, head.group); };
      };
      pack_rows<T>(row_of(k_rows), keys, D, k_pack.data() + at);
      pack_panels<T>(row_of(v_rows), keys, D, reinterpret_cast<U*>(tile.buffer), v_pack.data() + at);
    });
    run_in_order(
        wave, [&](const Head& head) { return sizes.tiles(head); },
        [&](const Head& head, int64_t index, int64_t thread) {
          float* scratch = tiles.data() + thread * tile_floats;
          if (few(head))
            fwd_few<T>(sizes, head, scratch, q_rows, k_rows, v_rows, out_rows, lse);
          else
            fwd_tile<T, U>(sizes, head, index, k_pack.data(), v_pack.data(), FwdTile<U>(scratch, D), q_rows, out_rows,
                           lse);
        });
  }
}

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                   bool causal, int64_t window, const Tensor& out, const Tensor& lse) {
  with_dtype(q.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int64_t kTileRows = kRows<typename UnitOf<T>::type>;
    fwd<T>(attention_sizes(q, k, scale, causal, window, kTileRows), q, k, v, cu_seqlens, out, lse);
  });
}

void attention_few(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t window, const Tensor& out,
                   const Tensor& lse, float* scratch) {
  with_dtype(q.dtype, [&](auto tag) {
    using T = decltype(tag);
    const AttentionSizes sizes = attention_sizes(q, k, scale, true, window, kMostRows);
    const Head head = {0, 0, 0, 1, 0, k.size[1]};
    fwd_few<T>(sizes, head, scratch, Rows<T>(q), Rows<T>(k), Rows<T>(v), Rows<T>(out), lse);
  });
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA

#endif
