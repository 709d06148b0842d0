// The forward of attention in bfloat16 and float32 on the matrix registers of Intel's server processors: out [B,T,H,D]
// T and lse [B,H,T] float32, both overwritten. Scores, their exponentials, the sums and the accumulator of out are
// float32; in bfloat16 the weights are rounded to it before they multiply v; in float32 all operands are three bfloat16
// whose sum they are. out is rounded once. Nothing depends on the number of threads. Scratch: packed k and v, at most
// kWaveBytes or one head's, and a tile a thread; never T x S. Design and derivation: docs/ops/attention.md.
#include <atomic>
#include <type_traits>

#include "attention_plan.h"
#include "simd.h"

#if LF_X86
LF_TARGET_BEGIN(LF_TARGET_AMX)
#define LF_ISA amx

#include "attention_tile.h"

#include "attention_amx.h"
#include "attention_few.h"

namespace llama_fast::cpu::amx {
namespace {

constexpr int64_t kWaveBytes = 32 << 20;  // packed k and v that are worked on together
template <class T>
constexpr int64_t kRowBlocks = kParts<T> == 1 ? 2 : 4;
template <class T>
constexpr int64_t kTileRows = kRowBlocks<T> * kSide;
constexpr int64_t kPanels = kKeys / kSide;  // of a block of keys, over which out is summed at a time
constexpr int64_t kChunk = 2;               // panels whose scores exist together, in the first cache
constexpr float kRise = 8.0F;  // a maximum may be passed by that much, in base two, before what was summed is rescaled

// What a thread needs for one tile.
template <class T>
struct FwdTile {
  static constexpr int kN = kParts<T>;
  static constexpr int64_t kScores = kRowBlocks<T> * kChunk * kBlock, kWeights = kRowBlocks<T> * kPanels * kBlock;

  bf16* q;                     // right blocks [kN][kRowBlocks<T>][Dp / kSide]
  bf16* weights;               // right blocks [kN][kRowBlocks<T>][kPanels]
  float* scores;               // sums [kRowBlocks<T>][kChunk]
  float* out;                  // sums [Dp / kSide][kRowBlocks<T>]
  float* own;                  // a sum
  float* buffer;               // of a group
  int64_t q_part, row_blocks;  // row_blocks: that have rows

  static int64_t floats(int64_t Dp) {
    return kN * (kTileRows<T> * Dp + kWeights) / 2 + kScores + kTileRows<T> * Dp + kBlock + Group<T>::floats(Dp);
  }
  FwdTile(float* base, int64_t Dp, int64_t rows)
      : q(reinterpret_cast<bf16*>(base)),
        weights(q + kN * kTileRows<T> * Dp),
        scores(reinterpret_cast<float*>(weights + kN * kWeights)),
        out(scores + kScores),
        own(out + kTileRows<T> * Dp),
        buffer(own + kBlock),
        q_part(kTileRows<T> * Dp),
        row_blocks(blocks_of(rows, kSide)) {}
  // The scores of rows [16 vector, 16 vector + 16) in panel `panel` of the chunk and its keys [16 half, 16 half + 16).
  float* scores_of(int64_t vector, int64_t panel, int64_t half) const {
    return scores + (vector / 2 * kChunk + panel) * kBlock + (2 * half + vector % 2) * kSumTile;
  }
};

struct RowState {
  alignas(64) float top[kMostRows];    // what the exponents are relative to, in base two; -inf before the first key
  alignas(64) float sum[kMostRows];    // of 2^(score - top)
  alignas(64) float alpha[kMostRows];  // what the sums so far are multiplied by
};

// Scores of `count` panels from `first` on -inf where hidden.
template <class T>
void hide(const FwdTile<T>& tile, int64_t first, int64_t count, const Bounds& bounds) {
  const VecF hidden(-std::numeric_limits<float>::infinity());
  for (int64_t vector = 0; vector < 2 * tile.row_blocks; ++vector)
    for (int64_t key = 0; key < count * kSide; ++key) {
      float* s = tile.scores_of(vector, key / kSide, key % kSide / 16) + key % 16 * 16;
      store(s, bounds.seen(VecF(static_cast<float>(first * kSide + key)), 16 * vector, load(s), hidden));
    }
}

// Raises top, and sets alpha, where a score of `count` panels passes it by more than kRise; true if any does.
template <class T>
bool raise_top(const FwdTile<T>& tile, int64_t count, float factor, RowState& state) {
  VecF rise(0.0F);
  for (int64_t vector = 0; vector < 2 * tile.row_blocks; ++vector) {
    VecF most[4];
    for (VecF& m : most) m = VecF(-std::numeric_limits<float>::infinity());
    for (int64_t half = 0; half < 2 * count; ++half) {
      const float* s = tile.scores_of(vector, half / 2, half % 2);
#pragma GCC unroll 4
      for (int key = 0; key < 16; key += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) most[i] = max(most[i], load(s + (key + i) * 16));
    }
    const VecF top = load(state.top + 16 * vector), limit = top + VecF(kRise);
    const VecF found = max(max(most[0], most[1]), max(most[2], most[3])) * VecF(factor);
    const VecF raised = select_greater(found, limit, found, top);
    const VecF alpha = select_greater(found, limit, exp2_for<T>(top - raised), VecF(1.0F));
    rise = max(rise, select_greater(found, limit, VecF(1.0F), VecF(0.0F)));
    store(state.top + 16 * vector, raised);
    store(state.alpha + 16 * vector, alpha);
    store(state.sum + 16 * vector, load(state.sum + 16 * vector) * alpha);
  }
  return max(rise) > 0.0F;
}

// weights = 2^(factor score - top) of `count` panels, the first of which is `first` in its block of keys, and their
// sums.
template <class T>
void soften(const FwdTile<T>& tile, int64_t first, int64_t count, float factor, RowState& state) {
  constexpr int kN = kParts<T>;
  constexpr int64_t kPart = FwdTile<T>::kWeights / 2;  // pairs
  for (int64_t vector = 0; vector < 2 * tile.row_blocks; ++vector) {
    // finite where no key was seen yet, so that -inf - top is -inf and not NaN
    const VecF top = max(load(state.top + 16 * vector), VecF(-std::numeric_limits<float>::max()));
    const VecF minus_top = VecF(0.0F) - top;
    VecF total[2] = {VecF(0.0F), VecF(0.0F)};
    for (int64_t half = 0; half < 2 * count; ++half) {
      const float* s = tile.scores_of(vector, half / 2, half % 2);
      bf16* block = tile.weights + (vector / 2 * kPanels + first + half / 2) * kBlock + vector % 2 * kTileElements;
      Pair* to = reinterpret_cast<Pair*>(block) + half % 2 * 8 * 16;
#pragma GCC unroll 4
      for (int key = 0; key < 16; key += 4) {
        VecF weight[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) weight[i] = exp2_for<T>(fma(load(s + (key + i) * 16), VecF(factor), minus_top));
        total[0] = total[0] + (weight[0] + weight[2]);
        total[1] = total[1] + (weight[1] + weight[3]);
        store_pairs<kN>(to + key / 2 * 16, kPart, weight[0], weight[1]);
        store_pairs<kN>(to + (key / 2 + 1) * 16, kPart, weight[2], weight[3]);
      }
    }
    store(state.sum + 16 * vector, load(state.sum + 16 * vector) + (total[0] + total[1]));
  }
}

template <class T>
void rescale(const FwdTile<T>& tile, int64_t columns, const RowState& state) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t vector = 0; vector < 2 * tile.row_blocks; ++vector) {
      const VecF alpha = load(state.alpha + 16 * vector);
      for (int half = 0; half < 2; ++half) {
        float* at = tile.out + (c * kRowBlocks<T> + vector / 2) * kBlock + (2 * half + vector % 2) * kSumTile;
        for (int64_t i = 0; i < kSumTile; i += 16) store(at + i, load(at + i) * alpha);
      }
    }
}

// out += v^T weights over panels [first, last) of a block of keys.
template <bool kAdd, class T, int kN>
void add_panels(const FwdTile<T>& tile, Parts<kN> v_block, int64_t columns, int64_t first, int64_t last) {
  const Parts<kN> weights = {tile.weights, FwdTile<T>::kWeights};
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < tile.row_blocks; ++r)
      add_product<kAdd>(v_block + (c * kPanels + first) * kBlock, weights + (r * kPanels + first) * kBlock,
                        last - first, tile.out + (c * kRowBlocks<T> + r) * kBlock, tile.own);
}

// False where the rows of q are no sums of their parts.
template <class T>
bool fwd_tile(const AttentionSizes& sizes, const Head& head, int64_t index, Parts<kParts<T>> k_pack,
              Parts<kParts<T>> v_pack, float* scratch, const Rows<T>& q, const Rows<T>& out, const Tensor& lse) {
  constexpr int kN = kParts<T>;
  const Tiles tiles;
  const int64_t D = sizes.D, Dp = round_up(D, kSide), columns = Dp / kSide, block = kKeys * Dp;
  const int64_t first = index * kTileRows<T>, n = std::min(kTileRows<T>, sizes.rows(head) - first);
  const FwdTile<T> tile(scratch, Dp, n);
  const Parts<kN> q_pack = {tile.q, tile.q_part};
  const bool fits =
      for_each_group<T>([&](int64_t r) { return query_row(q, sizes, head, first + r); }, n, D, Dp, tile.buffer,
                        [&](const Group<T>& group, int64_t r) {
                          for (int p = 0; p < kN; ++p) pack_right(group.rows[p], Dp, tile.q + p * tile.q_part + r * Dp);
                        });
  float factor = exponent_factor(sizes.scale);
  if (factor < 0.0F) {  // the maximum of a row is its largest score
    factor = -factor;
    for (int64_t i = 0; i < kN * kTileRows<T> * Dp; ++i) tile.q[i].bits ^= 0x8000;
  }

  RowState state;
  for (int64_t r = 0; r < kTileRows<T>; ++r) {
    state.top[r] = -std::numeric_limits<float>::infinity();
    state.sum[r] = 0.0F;
  }
  Range common;
  const Range seen = sizes.keys_of_tile(head, index, &common);
  Bounds bounds;
  bool empty = true;
  for (int64_t key = seen.begin / kKeys * kKeys; key < seen.end; key += kKeys) {
    const Range panels = {std::max<int64_t>(seen.begin - key, 0) / kSide,
                          blocks_of(std::min(seen.end - key, kKeys), kSide)};
    const Parts<kN> k_block = k_pack + (head.slot + key / kKeys) * block;
    const Parts<kN> v_block = v_pack + (head.slot + key / kKeys) * block;
    if (key + panels.begin * kSide < common.begin || key + panels.end * kSide > common.end)
      bounds.set(sizes, head, index, key);
    int64_t added = panels.begin;
    const auto add_until = [&](int64_t last) {
      if (empty)
        add_panels<false>(tile, v_block, columns, added, last);
      else
        add_panels<true>(tile, v_block, columns, added, last);
      added = last;
      empty = false;
    };
    for (int64_t p = panels.begin; p < panels.end; p += kChunk) {
      const int64_t count = std::min(kChunk, panels.end - p);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t r = 0; r < tile.row_blocks; ++r) {
          // in parts k and v of a head pass the second cache: the panel after this chunk, and this one's v
          if constexpr (kN > 1) {
            for (int64_t c = r; c < columns; c += tile.row_blocks)
              for (int part = 0; part < kN; ++part) {
                fetch_ahead(k_block[part] + ((p + i + kChunk) * columns + c) * kBlock, kBlock * sizeof(bf16));
                fetch_ahead(v_block[part] + (c * kPanels + p + i) * kBlock, kBlock * sizeof(bf16));
              }
          }
          multiply_blocks<false>(k_block + (p + i) * kSide * Dp, q_pack + r * kSide * Dp, columns,
                                 tile.scores + (r * kChunk + i) * kBlock);
        }
      if (key + p * kSide < common.begin || key + (p + count) * kSide > common.end) hide(tile, p, count, bounds);
      if (raise_top(tile, count, factor, state)) {
        if (added < p) add_until(p);
        if (!empty) rescale(tile, columns, state);
      }
      soften(tile, p, count, factor, state);
    }
    add_until(panels.end);
  }

  if (empty) std::memset(tile.out, 0, static_cast<size_t>(kTileRows<T> * Dp) * sizeof(float));
  for (int64_t r = 0; r < n; ++r) {
    // a row that saw no key has sum 0; a NaN stays
    state.alpha[r] = state.sum[r] == 0.0F ? 0.0F : 1.0F / state.sum[r];
    *lse_of(lse, sizes, head, first + r) = lse_from(state.top[r], state.sum[r]);
  }
  unpack_columns(
      tile.out, kRowBlocks<T>, n, D, [&](int64_t r) { return state.alpha[r]; },
      [&](int64_t r) { return query_row(out, sizes, head, first + r); });
  return fits;
}

template <class T>
bool fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale, bool causal,
         int64_t window, const Tensor& out, const Tensor& lse) {
  constexpr int kN = kParts<T>;
  const AttentionSizes sizes = attention_sizes(q, k, scale, causal, window, kTileRows<T>);
  const int64_t D = sizes.D, Dp = round_up(D, kSide), block = kKeys * Dp;
  const auto few = [&](const Head& head) { return sizes.rows(head) <= kFewRows; };
  const auto blocks = [&](const Head& head) { return few(head) ? 0 : blocks_of(head.S, kKeys); };
  const std::vector<Wave> waves =
      waves_of(heads_of(sizes, q, k, cu_seqlens), kWaveBytes, blocks,
               [&](const Head& head) { return kN * 2 * blocks(head) * block * static_cast<int64_t>(sizeof(bf16)); });
  const int64_t part = largest(waves).slots * block;
  const Scratch<bf16> k_pack(kN * part), v_pack(kN * part);
  const int64_t tile_floats = round_up(std::max(FwdTile<T>::floats(Dp), attention_few_scratch(D)), 16);
  const Scratch<float> tiles(max_threads() * tile_floats);
  const Rows<T> q_rows(q), k_rows(k), v_rows(v), out_rows(out);
  std::atomic<bool> fits{true};

  for (const Wave& wave : waves) {
    run_in_order(wave, blocks, [&](const Head& head, int64_t index, int64_t thread) {
      const int64_t key = index * kKeys, keys = std::min(kKeys, head.S - key);
      const int64_t at = (head.slot + index) * block;
      float* buffer = tiles.data() + thread * tile_floats;
      const auto pack = [&](const Rows<T>& x, const auto& to) {
        const auto row_at = [&](int64_t j) { return x.row(head.batch, head.k_begin + key + j, head.group); };
        return for_each_group<T>(row_at, keys, D, Dp, buffer, [&](const Group<T>& group, int64_t r) {
          for (int p = 0; p < kN; ++p) to(group.rows[p], p * part + at, r);
        });
      };
      const bool k_fits =
          pack(k_rows, [&](SideRows rows, int64_t to, int64_t r) { pack_left(rows, Dp, k_pack.data() + to + r * Dp); });
      const bool v_fits = pack(v_rows, [&](SideRows rows, int64_t to, int64_t r) {
        pack_left_across(rows, Dp, kPanels, v_pack.data() + to + r / kSide * kBlock);
      });
      if (!k_fits || !v_fits) fits = false;
    });
    run_in_order(
        wave, [&](const Head& head) { return sizes.tiles(head); },
        [&](const Head& head, int64_t index, int64_t thread) {
          float* scratch = tiles.data() + thread * tile_floats;
          if (few(head))
            fwd_few<T>(sizes, head, scratch, q_rows, k_rows, v_rows, out_rows, lse);
          else if (!fwd_tile<T>(sizes, head, index, {k_pack.data(), part}, {v_pack.data(), part}, scratch, q_rows,
                                out_rows, lse))
            fits = false;
        });
    if (!fits) return false;
  }
  return true;
}

}  // namespace

bool attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                   bool causal, int64_t window, const Tensor& out, const Tensor& lse) {
  if (q.dtype == DType::bf16) return fwd<bf16>(q, k, v, cu_seqlens, scale, causal, window, out, lse);
  return q.dtype == DType::f32 && fwd<float>(q, k, v, cu_seqlens, scale, causal, window, out, lse);
}

}  // namespace llama_fast::cpu::amx

#undef LF_ISA
LF_TARGET_END
#endif
