// The backward of attention in bfloat16 on the matrix registers of Intel's server processors: dq, dk, dv, all
// overwritten. Weights are recomputed from lse, their gradients use delta = rowsum(dout out); both are float32, and
// rounded to bfloat16 before they are multiplied. dk and dv of a block of keys are summed in float32 by the one task
// that owns the block, over rows in order; dq as attention_plan.h's run_bwd says; each is rounded once. No atomics.
// Scratch: packed q, dout and the float32 dq; never T x S. Design and derivation: docs/ops/attention.md.
#include <type_traits>

#include "attention_plan.h"
#include "simd.h"

#if LF_X86
LF_TARGET_BEGIN(LF_TARGET_AMX)
#define LF_ISA amx

#include "attention_tile.h"

#include "attention_amx.h"

namespace llama_fast::cpu::amx {
namespace {

constexpr int64_t kRowBlocks = 4, kTileRows = kRowBlocks * kSide;
constexpr int64_t kPanels = kKeys / kSide;

// The packed rows of a tile, all read once for each block of keys that it sees.
struct RowTile {
  bf16 *q_along, *dout_along;    // right blocks [kRowBlocks][Dp / kSide], sums along D
  bf16 *q_across, *dout_across;  // right blocks [Dp / kSide][kRowBlocks], sums over rows
  float* lse2;                   // [kTileRows] lse * log2(e); +inf for a row that sees no key or lies past the end
  float* delta;                  // [kTileRows] sum_d dout out

  static int64_t floats(int64_t Dp) { return 2 * kTileRows * Dp + 2 * kTileRows; }
  RowTile(float* base, int64_t Dp)
      : q_along(reinterpret_cast<bf16*>(base)),
        dout_along(q_along + kTileRows * Dp),
        q_across(dout_along + kTileRows * Dp),
        dout_across(q_across + kTileRows * Dp),
        lse2(base + 2 * kTileRows * Dp),
        delta(lse2 + kTileRows) {}
};

// What a thread needs for one block of keys, and for a tile of rows against it.
struct KeyBlock {
  bf16 *k_along, *v_along;  // left blocks [kPanels][Dp / kSide]
  bf16* k_across;           // left blocks [Dp / kSide][kPanels] of k transposed
  bf16 *p_rows, *ds_rows;   // left blocks [kPanels][kRowBlocks]: sums over rows
  bf16* ds_keys;            // right blocks [kRowBlocks][kPanels]: sums over keys
  float *dk, *dv;           // sums [kPanels][Dp / kSide]
  float *scores, *dp;       // a sum each
  float* buffer;            // four rows of Dp units

  static int64_t floats(int64_t Dp) {
    return 3 * kKeys * Dp / 2 + 3 * kKeys * kTileRows / 2 + 2 * kKeys * Dp + 2 * kBlock + 4 * Dp;
  }
  KeyBlock(float* base, int64_t Dp) {
    k_along = reinterpret_cast<bf16*>(base);
    v_along = k_along + kKeys * Dp;
    k_across = v_along + kKeys * Dp;
    p_rows = k_across + kKeys * Dp;
    ds_rows = p_rows + kKeys * kTileRows;
    ds_keys = ds_rows + kKeys * kTileRows;
    dk = reinterpret_cast<float*>(ds_keys + kKeys * kTileRows);
    dv = dk + kKeys * Dp;
    scores = dv + kKeys * Dp;
    dp = scores + kBlock;
    buffer = dp + kBlock;
  }
};

struct BwdTensors {
  Rows<bf16> dout, q, k, v, out, dq, dk, dv;
  const Tensor& lse;
};

void pack_tile(const AttentionSizes& sizes, const Head& head, int64_t index, const BwdTensors& x, Pair* buffer,
               const RowTile& tile) {
  const int64_t D = sizes.D, Dp = round_up(D, kSide);
  const int64_t first = index * kTileRows, n = std::min(kTileRows, sizes.rows(head) - first);
  const auto q_row = [&](int64_t r) -> const bf16* { return query_row(x.q, sizes, head, first + r); };
  const auto dout_row = [&](int64_t r) -> const bf16* { return query_row(x.dout, sizes, head, first + r); };
  pack_right(q_row, n, D, Dp, buffer, tile.q_along);
  pack_right(dout_row, n, D, Dp, buffer, tile.dout_along);
  pack_right_across(q_row, n, D, Dp, kRowBlocks, buffer, tile.q_across);
  pack_right_across(dout_row, n, D, Dp, kRowBlocks, buffer, tile.dout_across);
  for (int64_t r = 0; r < kTileRows; ++r) {
    tile.lse2[r] = std::numeric_limits<float>::infinity();
    tile.delta[r] = 0.0F;
    if (r >= n) continue;
    const float lse = *lse_of(x.lse, sizes, head, first + r);
    if (lse != -std::numeric_limits<float>::infinity())
      tile.lse2[r] = static_cast<float>(static_cast<double>(lse) * 1.4426950408889634);
    tile.delta[r] = dot_rows(dout_row(r), query_row(x.out, sizes, head, first + r), D);
  }
}

// p = 2^(factor s - lse2) and ds = p (dp - delta) of row block `r` for the keys of panel `p`, both ways.
template <bool kMasked>
void weigh(const KeyBlock& block, const RowTile& tile, int64_t panel, int64_t r, float factor, const Bounds& bounds) {
  bf16* p_rows = block.p_rows + (panel * kRowBlocks + r) * kBlock;
  bf16* ds_rows = block.ds_rows + (panel * kRowBlocks + r) * kBlock;
  Pair* ds_keys = reinterpret_cast<Pair*>(block.ds_keys + (r * kPanels + panel) * kBlock);
  VecF minus_lse2[2], delta[2];
  for (int half = 0; half < 2; ++half) {
    minus_lse2[half] = VecF(0.0F) - load(tile.lse2 + r * kSide + 16 * half);
    delta[half] = load(tile.delta + r * kSide + 16 * half);
  }
#pragma GCC unroll 1
  for (int64_t key = 0; key < kSide; key += 2) {
    VecF p[2][2], ds[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t at = (key / 16 * 2 + half) * kSumTile + (key % 16 + i) * 16;
        p[i][half] = exp2_for_half(fma(load(block.scores + at), VecF(factor), minus_lse2[half]));
        if constexpr (kMasked)
          p[i][half] = bounds.seen(VecF(static_cast<float>(panel * kSide + key + i)), r * kSide + 16 * half, p[i][half],
                                   VecF(0.0F));
        ds[i][half] = p[i][half] * (load(block.dp + at) - delta[half]);
      }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      store_side(p_rows + (key + i) * kSide, p[i][0], p[i][1]);
      store_side(ds_rows + (key + i) * kSide, ds[i][0], ds[i][1]);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) store_pairs(ds_keys + half * 256 + key / 2 * 16, ds[0][half], ds[1][half]);
  }
}

// Everything that one block of keys takes part in: dk and dv of its keys, and its share of dq, sums [Dp / kSide]
// [kRowBlocks] of each tile.
void bwd_block(const AttentionSizes& sizes, const Head& head, int64_t index, const BwdTensors& x, const KeyBlock& block,
               float* rows, float* dq) {
  const Tiles tiles;
  const int64_t D = sizes.D, Dp = round_up(D, kSide), columns = Dp / kSide;
  const int64_t key = index * kKeys, keys = std::min(kKeys, head.S - key);
  const auto row_of = [&](const Rows<bf16>& of) {
    return [&](int64_t j) { return of.row(head.batch, head.k_begin + key + j, head.group); };
  };
  pack_left(row_of(x.k), keys, D, Dp, block.k_along);
  pack_left(row_of(x.v), keys, D, Dp, block.v_along);
  pack_left_across(row_of(x.k), keys, D, Dp, kPanels, reinterpret_cast<Pair*>(block.buffer), block.k_across);
  std::fill_n(block.dk, kKeys * Dp, 0.0F);
  std::fill_n(block.dv, kKeys * Dp, 0.0F);

  const float factor = exponent_factor(sizes.scale);
  const Range queries = sizes.mask.queries_of({key, key + keys}, head.T, head.S);
  Bounds bounds;
  for (int64_t t = queries.begin * sizes.rep / kTileRows; t < blocks_of(queries.end * sizes.rep, kTileRows); ++t) {
    Range common;
    const Range seen = sizes.keys_of_tile(head, t, &common);
    const Range panels = {std::max<int64_t>(seen.begin - key, 0) / kSide,
                          blocks_of(std::min(seen.end - key, keys), kSide)};
    if (panels.empty()) continue;
    const RowTile tile(rows + t * RowTile::floats(Dp), Dp);
    const int64_t row_blocks = blocks_of(std::min(kTileRows, sizes.rows(head) - t * kTileRows), kSide);
    const bool masked = key + panels.begin * kSide < common.begin || key + panels.end * kSide > common.end;
    if (masked) bounds.set(sizes, head, t, key);
    for (int64_t p = panels.begin; p < panels.end; ++p)
      for (int64_t r = 0; r < row_blocks; ++r) {
        multiply_blocks<false>(block.k_along + p * kSide * Dp, tile.q_along + r * kSide * Dp, columns, block.scores);
        multiply_blocks<false>(block.v_along + p * kSide * Dp, tile.dout_along + r * kSide * Dp, columns, block.dp);
        if (masked)
          weigh<true>(block, tile, p, r, factor, bounds);
        else
          weigh<false>(block, tile, p, r, factor, bounds);
      }
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t p = panels.begin; p < panels.end; ++p) {
        const int64_t from = p * kRowBlocks * kBlock, to = (p * columns + c) * kBlock, at = c * kRowBlocks * kBlock;
        multiply_blocks<true>(block.p_rows + from, tile.dout_across + at, row_blocks, block.dv + to);
        multiply_blocks<true>(block.ds_rows + from, tile.q_across + at, row_blocks, block.dk + to);
      }
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < row_blocks; ++r)
        multiply_blocks<true>(block.k_across + (c * kPanels + panels.begin) * kBlock,
                              block.ds_keys + (r * kPanels + panels.begin) * kBlock, panels.end - panels.begin,
                              dq + ((t * columns + c) * kRowBlocks + r) * kBlock);
  }
  unpack_rows(block.dk, keys, D, Dp, static_cast<float>(sizes.scale), block.buffer, row_of(x.dk));
  unpack_rows(block.dv, keys, D, Dp, 1.0F, block.buffer, row_of(x.dv));
}

}  // namespace

void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, const Tensor& cu_seqlens, double scale, bool causal, int64_t window,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  using R = Rows<bf16>;
  const BwdTensors x = {R(dout), R(q), R(k), R(v), R(out), R(dq), R(dk), R(dv), lse};
  const AttentionSizes sizes = attention_sizes(q, k, scale, causal, window, kTileRows);
  const int64_t D = sizes.D, Dp = round_up(D, kSide);
  const Scratch<float> scratch(max_threads() * KeyBlock::floats(Dp));
  const auto block_of = [&](int64_t thread) { return KeyBlock(scratch.data() + thread * KeyBlock::floats(Dp), Dp); };
  run_bwd(
      sizes, heads_of(sizes, q, k, cu_seqlens), kKeys, RowTile::floats(Dp), kTileRows * Dp,
      [&](const Head& head, int64_t index, int64_t thread, float* rows) {
        pack_tile(sizes, head, index, x, reinterpret_cast<Pair*>(block_of(thread).buffer), RowTile(rows, Dp));
      },
      [&](const Head& head, int64_t index, int64_t thread, float* rows, float* dq_sums) {
        bwd_block(sizes, head, index, x, block_of(thread), rows, dq_sums);
      },
      [&](const Head& head, int64_t index, int64_t thread, const float* dq_sums) {
        const int64_t first = index * kTileRows;
        unpack_columns(
            dq_sums, kRowBlocks, std::min(kTileRows, sizes.rows(head) - first), D, Dp, block_of(thread).buffer,
            [&](int64_t) { return static_cast<float>(sizes.scale); },
            [&](int64_t r) { return query_row(x.dq, sizes, head, first + r); });
      });
}

}  // namespace llama_fast::cpu::amx

#undef LF_ISA
LF_TARGET_END
#endif
