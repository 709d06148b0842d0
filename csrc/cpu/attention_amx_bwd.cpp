// The backward of attention in bfloat16 and float32 on the matrix registers of Intel's server processors: dq, dk, dv,
// all overwritten. Weights are recomputed from lse, their gradients use delta = rowsum(dout out); both are float32, and
// rounded to bfloat16, or taken in three parts, before they are multiplied. dk and dv of a block of keys are summed in
// float32 by the one task that owns the block, over rows in order; dq as attention_plan.h's run_bwd says; each is
// rounded once. No atomics on numbers. Scratch: packed q, dout and the float32 dq; never T x S. Design and derivation:
// docs/ops/attention.md.
#include <atomic>
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
template <class T>
struct RowTile {
  static constexpr int kN = kParts<T>;
  Parts<kN> q_along, dout_along;    // right blocks [kRowBlocks][Dp / kSide], sums along D
  Parts<kN> q_across, dout_across;  // right blocks [Dp / kSide][kRowBlocks], sums over rows
  float* lse2;                      // [kTileRows] lse * log2(e); +inf for a row that sees no key or lies past the end
  float* lse2_rest;                 // [kTileRows] lse log2(e) - lse2, without which all weights of a row err alike
  float* delta;                     // [kTileRows] sum_d dout out
  bf16* packs;                      // the four, one after the other
  int64_t part;

  static int64_t floats(int64_t Dp) { return 2 * kN * kTileRows * Dp + 3 * kTileRows; }
  RowTile(float* base, int64_t Dp) : packs(reinterpret_cast<bf16*>(base)), part(kTileRows * Dp) {
    Parts<kN>* const all[4] = {&q_along, &dout_along, &q_across, &dout_across};
    for (int i = 0; i < 4; ++i) *all[i] = {packs + i * kN * part, part};
    lse2 = base + 2 * kN * part;
    lse2_rest = lse2 + kTileRows;
    delta = lse2_rest + kTileRows;
  }
};

// What a thread needs for one block of keys, and for a tile of rows against it.
template <class T>
struct KeyBlock {
  static constexpr int kN = kParts<T>;
  static constexpr int64_t kPart = kKeys * kTileRows;  // of p and ds
  bf16 *k_along, *v_along;                             // left blocks [kN][kPanels][Dp / kSide]
  bf16* k_across;                                      // left blocks [kN][Dp / kSide][kPanels] of k transposed
  bf16 *p_rows, *ds_rows;                              // left blocks [kN][kPanels][kRowBlocks]: sums over rows
  bf16* ds_keys;                                       // right blocks [kN][kRowBlocks][kPanels]: sums over keys
  float *dk, *dv;                                      // sums [kPanels][Dp / kSide]
  float *scores, *dp, *own;                            // a sum each
  float* buffer;                                       // of a group
  int64_t part;                                        // of k and v

  static int64_t floats(int64_t Dp) {
    return kN * 3 * (kKeys * Dp + kPart) / 2 + 2 * kKeys * Dp + 3 * kBlock + Group<T>::floats(Dp);
  }
  KeyBlock(float* base, int64_t Dp) : part(kKeys * Dp) {
    k_along = reinterpret_cast<bf16*>(base);
    v_along = k_along + kN * part;
    k_across = v_along + kN * part;
    p_rows = k_across + kN * part;
    ds_rows = p_rows + kN * kPart;
    ds_keys = ds_rows + kN * kPart;
    dk = reinterpret_cast<float*>(ds_keys + kN * kPart);
    dv = dk + kKeys * Dp;
    scores = dv + kKeys * Dp;
    dp = scores + kBlock;
    own = dp + kBlock;
    buffer = own + kBlock;
  }
};

template <class T>
struct BwdTensors {
  Rows<T> dout, q, k, v, out, dq, dk, dv;
  const Tensor& lse;
};

// False where some rows are no sums of their parts.
template <class T>
bool pack_tile(const AttentionSizes& sizes, const Head& head, int64_t index, const BwdTensors<T>& x, float* buffer,
               const RowTile<T>& tile) {
  const int64_t D = sizes.D, Dp = round_up(D, kSide);
  const int64_t first = index * kTileRows, n = std::min(kTileRows, sizes.rows(head) - first);
  const auto pack = [&](const Rows<T>& of, int64_t along, int64_t across) {
    const auto row_at = [&](int64_t r) { return query_row(of, sizes, head, first + r); };
    return for_each_group<T>(row_at, n, D, Dp, buffer, [&](const Group<T>& group, int64_t r) {
      for (int p = 0; p < kParts<T>; ++p) {
        bf16* to = tile.packs + p * tile.part;
        pack_right(group.rows[p], Dp, to + along * kParts<T> * tile.part + r * Dp);
        pack_right_across(group.rows[p], Dp, kRowBlocks, to + across * kParts<T> * tile.part + r / kSide * kBlock);
      }
    });
  };
  const bool q_fits = pack(x.q, 0, 2), dout_fits = pack(x.dout, 1, 3);
  for (int64_t r = 0; r < kTileRows; ++r) {
    tile.lse2[r] = std::numeric_limits<float>::infinity();
    tile.lse2_rest[r] = tile.delta[r] = 0.0F;
    if (r >= n) continue;
    const float lse = *lse_of(x.lse, sizes, head, first + r);
    if (lse != -std::numeric_limits<float>::infinity()) {
      const double exact = static_cast<double>(lse) * 1.4426950408889634;
      tile.lse2[r] = static_cast<float>(exact);
      if (std::isfinite(lse)) tile.lse2_rest[r] = static_cast<float>(exact - static_cast<double>(tile.lse2[r]));
    }
    tile.delta[r] = dot_rows(query_row(x.dout, sizes, head, first + r), query_row(x.out, sizes, head, first + r), D);
  }
  return q_fits && dout_fits;
}

// p = 2^(factor s - lse2) and ds = p (dp - delta) of row block `r` for the keys of panel `p`, both ways.
template <bool kMasked, class T>
void weigh(const KeyBlock<T>& block, const RowTile<T>& tile, int64_t panel, int64_t r, float factor,
           const Bounds& bounds) {
  constexpr int kN = kParts<T>;
  constexpr int64_t kPart = KeyBlock<T>::kPart;
  bf16* p_rows = block.p_rows + (panel * kRowBlocks + r) * kBlock;
  bf16* ds_rows = block.ds_rows + (panel * kRowBlocks + r) * kBlock;
  Pair* ds_keys = reinterpret_cast<Pair*>(block.ds_keys + (r * kPanels + panel) * kBlock);
  VecF minus_lse2[2], rest[2], delta[2];
  for (int half = 0; half < 2; ++half) {
    minus_lse2[half] = VecF(0.0F) - load(tile.lse2 + r * kSide + 16 * half);
    rest[half] = load(tile.lse2_rest + r * kSide + 16 * half);
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
        VecF exponent = fma(load(block.scores + at), VecF(factor), minus_lse2[half]);
        if constexpr (kN > 1) exponent = exponent - rest[half];
        p[i][half] = exp2_for<T>(exponent);
        if constexpr (kMasked)
          p[i][half] = bounds.seen(VecF(static_cast<float>(panel * kSide + key + i)), r * kSide + 16 * half, p[i][half],
                                   VecF(0.0F));
        ds[i][half] = p[i][half] * (load(block.dp + at) - delta[half]);
      }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      store_side<kN>(p_rows + (key + i) * kSide, kPart, p[i][0], p[i][1]);
      store_side<kN>(ds_rows + (key + i) * kSide, kPart, ds[i][0], ds[i][1]);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
      store_pairs<kN>(ds_keys + half * 256 + key / 2 * 16, kPart / 2, ds[0][half], ds[1][half]);
  }
}

// Everything that one block of keys takes part in: dk and dv of its keys, and its share of dq, sums [Dp / kSide]
// [kRowBlocks] of each tile. False where some keys or values are no sums of their parts.
template <class T>
bool bwd_block(const AttentionSizes& sizes, const Head& head, int64_t index, const BwdTensors<T>& x,
               const KeyBlock<T>& block, float* rows, float* dq) {
  const Tiles tiles;
  constexpr int kN = kParts<T>;
  constexpr int64_t kPart = KeyBlock<T>::kPart;
  const int64_t D = sizes.D, Dp = round_up(D, kSide), columns = Dp / kSide, part = block.part;
  const int64_t key = index * kKeys, keys = std::min(kKeys, head.S - key);
  const auto row_of = [&](const Rows<T>& of) {
    return [&](int64_t j) { return of.row(head.batch, head.k_begin + key + j, head.group); };
  };
  const auto pack = [&](const Rows<T>& of, const auto& to) {
    return for_each_group<T>(row_of(of), keys, D, Dp, block.buffer, [&](const Group<T>& group, int64_t r) {
      for (int p = 0; p < kN; ++p) to(group.rows[p], p * part, r);
    });
  };
  const bool k_fits = pack(x.k, [&](SideRows rows_of_k, int64_t at, int64_t r) {
    pack_left(rows_of_k, Dp, block.k_along + at + r * Dp);
    pack_left_across(rows_of_k, Dp, kPanels, block.k_across + at + r / kSide * kBlock);
  });
  const bool v_fits = pack(
      x.v, [&](SideRows rows_of_v, int64_t at, int64_t r) { pack_left(rows_of_v, Dp, block.v_along + at + r * Dp); });
  const Parts<kN> k_along = {block.k_along, part}, v_along = {block.v_along, part}, k_across = {block.k_across, part};
  const Parts<kN> p_rows = {block.p_rows, kPart}, ds_rows = {block.ds_rows, kPart}, ds_keys = {block.ds_keys, kPart};
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
    const RowTile<T> tile(rows + t * RowTile<T>::floats(Dp), Dp);
    const float* next = rows + (t + 1) * RowTile<T>::floats(Dp);  // read while this tile is worked on
    const int64_t share = RowTile<T>::floats(Dp) / (kPanels * kRowBlocks);
    const int64_t row_blocks = blocks_of(std::min(kTileRows, sizes.rows(head) - t * kTileRows), kSide);
    const bool masked = key + panels.begin * kSide < common.begin || key + panels.end * kSide > common.end;
    if (masked) bounds.set(sizes, head, t, key);
    for (int64_t p = panels.begin; p < panels.end; ++p)
      for (int64_t r = 0; r < row_blocks; ++r) {
        multiply_blocks<false>(k_along + p * kSide * Dp, tile.q_along + r * kSide * Dp, columns, block.scores);
        multiply_blocks<false>(v_along + p * kSide * Dp, tile.dout_along + r * kSide * Dp, columns, block.dp);
        if constexpr (kN > 1)
          fetch_ahead(next + (p * kRowBlocks + r) * share, share * static_cast<int64_t>(sizeof(float)));
        if (masked)
          weigh<true>(block, tile, p, r, factor, bounds);
        else
          weigh<false>(block, tile, p, r, factor, bounds);
      }
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t p = panels.begin; p < panels.end; ++p) {
        const int64_t from = p * kRowBlocks * kBlock, to = (p * columns + c) * kBlock, at = c * kRowBlocks * kBlock;
        add_product<true>(p_rows + from, tile.dout_across + at, row_blocks, block.dv + to, block.own);
        add_product<true>(ds_rows + from, tile.q_across + at, row_blocks, block.dk + to, block.own);
      }
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < row_blocks; ++r)
        add_product<true>(k_across + (c * kPanels + panels.begin) * kBlock,
                          ds_keys + (r * kPanels + panels.begin) * kBlock, panels.end - panels.begin,
                          dq + ((t * columns + c) * kRowBlocks + r) * kBlock, block.own);
  }
  unpack_rows(block.dk, keys, D, Dp, static_cast<float>(sizes.scale), row_of(x.dk));
  unpack_rows(block.dv, keys, D, Dp, 1.0F, row_of(x.dv));
  return k_fits && v_fits;
}

template <class T>
bool bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
         const Tensor& cu_seqlens, double scale, bool causal, int64_t window, const Tensor& dq, const Tensor& dk,
         const Tensor& dv) {
  using R = Rows<T>;
  const BwdTensors<T> x = {R(dout), R(q), R(k), R(v), R(out), R(dq), R(dk), R(dv), lse};
  const AttentionSizes sizes = attention_sizes(q, k, scale, causal, window, kTileRows);
  const int64_t D = sizes.D, Dp = round_up(D, kSide), block_floats = KeyBlock<T>::floats(Dp);
  const Scratch<float> scratch(max_threads() * block_floats);
  const auto block_of = [&](int64_t thread) { return KeyBlock<T>(scratch.data() + thread * block_floats, Dp); };
  std::atomic<bool> fits{true};
  run_bwd(
      sizes, heads_of(sizes, q, k, cu_seqlens), kKeys, RowTile<T>::floats(Dp), kTileRows * Dp,
      [&](const Head& head, int64_t index, int64_t thread, float* rows) {
        if (!pack_tile<T>(sizes, head, index, x, block_of(thread).buffer, RowTile<T>(rows, Dp))) fits = false;
      },
      [&](const Head& head, int64_t index, int64_t thread, float* rows, float* dq_sums) {
        if (!bwd_block<T>(sizes, head, index, x, block_of(thread), rows, dq_sums)) fits = false;
      },
      [&](const Head& head, int64_t index, int64_t, const float* dq_sums) {
        const int64_t first = index * kTileRows;
        unpack_columns(
            dq_sums, kRowBlocks, std::min(kTileRows, sizes.rows(head) - first), D,
            [&](int64_t) { return static_cast<float>(sizes.scale); },
            [&](int64_t r) { return query_row(x.dq, sizes, head, first + r); });
      });
  return fits;
}

}  // namespace

bool attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, const Tensor& cu_seqlens, double scale, bool causal, int64_t window,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  if (q.dtype == DType::bf16) return bwd<bf16>(dout, q, k, v, out, lse, cu_seqlens, scale, causal, window, dq, dk, dv);
  return q.dtype == DType::f32 && bwd<float>(dout, q, k, v, out, lse, cu_seqlens, scale, causal, window, dq, dk, dv);
}

}  // namespace llama_fast::cpu::amx

#undef LF_ISA
LF_TARGET_END
#endif
