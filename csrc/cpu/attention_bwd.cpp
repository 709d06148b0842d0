// The backward of attention on the CPU: dq, dk, dv, all overwritten.
// Weights are recomputed from lse, their gradients use delta = rowsum(dout out); both are float32, and rounded to T
// before they are multiplied where the processor multiplies bfloat16 pairs, and nowhere else. dk and dv of a key block
// are summed in float32 by the one task that owns the block, over rows in order; dq is summed in float32 over the
// blocks of a part in order, then over the parts in order; each is rounded once. The number of parts depends on the
// number of threads, nothing else does. No atomics. Scratch: packed q, dout and the float32 dq, at most kWaveBytes or
// one head's; never T x S. Design and derivation: docs/ops/attention.md.
#ifndef LF_ISA

#include <type_traits>

#include "attention_plan.h"
#include "parallel.h"
#include "simd.h"

#define LF_THIS_FILE "attention_bwd.cpp"
#include "each_isa.h"

namespace llama_fast::cpu {

void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, const Tensor& cu_seqlens, double scale, bool causal, int64_t window,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv) {
#if LF_X86
  if (current_isa() == Isa::amx &&
      amx::attention_bwd(dout, q, k, v, out, lse, cu_seqlens, scale, causal, window, dq, dk, dv))
    return;
#endif
  LF_DISPATCH(attention_bwd, dout, q, k, v, out, lse, cu_seqlens, scale, causal, window, dq, dk, dv);
}

}  // namespace llama_fast::cpu

#else

#include "attention_tile.h"

namespace llama_fast::cpu::LF_ISA {
namespace {

// The packed rows of a tile, all read once for each key block that it sees.
template <class U>
struct RowTile {
  U *q_along, *dout_along;    // [Du][kRows], sums along D
  U *q_across, *dout_across;  // [kRows / kPer][Dp], sums over rows; Dp is D rounded up to kLanes
  float* lse2;                // [kRows] lse * log2(e); +inf for a row that sees no key or lies past the end
  float* lse2_rest;           // [kRows] what its rounding left, without which all weights of a row err alike
  float* delta;               // [kRows] sum_d dout out

  static int64_t floats(int64_t D) {
    return (2 * D * kRows<U> + 2 * kRows<U> * round_up(D, kLanes)) / kPerUnit<U> + 3 * kRows<U>;
  }
  RowTile(float* base, int64_t D) {
    const int64_t along = D * kRows<U> / kPerUnit<U>, across = kRows<U> * round_up(D, kLanes) / kPerUnit<U>;
    q_along = reinterpret_cast<U*>(base);
    dout_along = q_along + along;
    q_across = dout_along + along;
    dout_across = q_across + across;
    lse2 = reinterpret_cast<float*>(dout_across + across);
    lse2_rest = lse2 + kRows<U>;
    delta = lse2_rest + kRows<U>;
  }
};

// What a thread needs for one key block, and for a tile of rows against it.
template <class U>
struct KeyBlock {
  U *k_along, *v_along;  // [kKeys][Du]
  U* k_across;           // panels, see pack_panels
  float *dk, *dv;        // [kKeys][Dp]
  U *p_rows, *ds_rows;   // [kKeys][kRows / kPer]: sums over rows
  U* ds_keys;            // [kKeys / kPer][kRows]: sums over keys; ds_rows itself where a unit is one element
  float* buffer;         // four rows of Dp

  static int64_t floats(int64_t D) {
    return 3 * kKeys * D + 2 * kKeys * round_up(D, kLanes) + 3 * kKeys * kRows<U> + 4 * round_up(D, kLanes);
  }
  KeyBlock(float* base, int64_t D) {
    const int64_t kPer = kPerUnit<U>, Dp = round_up(D, kLanes);
    k_along = reinterpret_cast<U*>(base);
    v_along = k_along + kKeys * D / kPer;
    k_across = v_along + kKeys * D / kPer;
    p_rows = k_across + kKeys * D / kPer;
    ds_rows = p_rows + kKeys * kRows<U> / kPer;
    ds_keys = kPer == 1 ? ds_rows : ds_rows + kKeys * kRows<U> / kPer;
    dk = reinterpret_cast<float*>(ds_keys + kKeys * kRows<U> / kPer);
    dv = dk + kKeys * Dp;
    buffer = dv + kKeys * Dp;
  }
};

template <class T>
struct BwdTensors {
  Rows<T> dout, q, k, v, out, dq, dk, dv;
  const Tensor& lse;
};

template <class T, class U>
void pack_tile(const AttentionSizes& sizes, const Head& head, int64_t index, const BwdTensors<T>& x, U* buffer,
               const RowTile<U>& tile) {
  constexpr int kPer = kPerUnit<U>;
  const int64_t D = sizes.D, Dp = round_up(D, kLanes);
  const int64_t first = index * kRows<U>, n = std::min(kRows<U>, sizes.rows(head) - first);
  const auto q_row = [&](int64_t r) -> const T* { return query_row(x.q, sizes, head, first + r); };
  const auto dout_row = [&](int64_t r) -> const T* { return query_row(x.dout, sizes, head, first + r); };
  pack_transposed<T>(q_row, n, D, buffer, tile.q_along);
  pack_transposed<T>(dout_row, n, D, buffer, tile.dout_along);
  for (int64_t r = 0; r < round_up(n, kPer); r += kPer) {
    const T *q_rows[kPer], *dout_rows[kPer];
    for (int i = 0; i < kPer; ++i) {
      q_rows[i] = r + i < n ? q_row(r + i) : nullptr;
      dout_rows[i] = r + i < n ? dout_row(r + i) : nullptr;
    }
    pack_across<T>(q_rows, D, tile.q_across + r / kPer * Dp);
    pack_across<T>(dout_rows, D, tile.dout_across + r / kPer * Dp);
  }
  for (int64_t r = 0; r < kRows<U>; ++r) {
    tile.lse2[r] = std::numeric_limits<float>::infinity();
    tile.lse2_rest[r] = tile.delta[r] = 0.0F;
    if (r >= n) continue;
    const int64_t row = first + r;
    const float lse = *lse_of(x.lse, sizes, head, row);
    if (lse != -std::numeric_limits<float>::infinity()) {
      const double exact = static_cast<double>(lse) * 1.4426950408889634;
      tile.lse2[r] = static_cast<float>(exact);
      tile.lse2_rest[r] = std::isfinite(lse) ? static_cast<float>(exact - static_cast<double>(tile.lse2[r])) : 0.0F;
    }
    tile.delta[r] = dot_rows(dout_row(r), query_row(x.out, sizes, head, row), D);
  }
}

// p = 2^(factor s - lse2) and ds = p (dout v - delta) of a tile for the keys of `panels`, as units both ways.
template <bool kMasked, class U>
void weigh_block(const KeyBlock<U>& block, const RowTile<U>& tile, int64_t Du, Range panels, int64_t groups,
                 float factor, const Bounds& bounds) {
  constexpr int kPer = kPerUnit<U>;
  alignas(64) float p[kM][kV * kLanes];
  for (int64_t j = panels.begin * kM; j < panels.end * kM; j += kM)
    for (int64_t r = 0; r < groups * kV * kLanes; r += kV * kLanes) {
      VecF acc[kM][kV];
      multiply<kV>(block.k_along + j * Du, 1, Du, tile.q_along + r, kRows<U>, Du, acc);
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) {
        const VecF minus_lse2 = VecF(0.0F) - load(tile.lse2 + r + v * kLanes);
        const VecF rest = load(tile.lse2_rest + r + v * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          VecF weight = exp2_flush(fma(acc[m][v], VecF(factor), minus_lse2) - rest);
          if constexpr (kMasked)
            weight = bounds.seen(VecF(static_cast<float>(j + m)), r + v * kLanes, weight, VecF(0.0F));
          store(p[m] + v * kLanes, weight);
          store_along(block.p_rows + ((j + m) * kRows<U> + r + v * kLanes) / kPer, weight);
        }
      }
      multiply<kV>(block.v_along + j * Du, 1, Du, tile.dout_along + r, kRows<U>, Du, acc);
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) {
        const VecF delta = load(tile.delta + r + v * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          acc[m][v] = load(p[m] + v * kLanes) * (acc[m][v] - delta);
          store_along(block.ds_rows + ((j + m) * kRows<U> + r + v * kLanes) / kPer, acc[m][v]);
        }
        if constexpr (kPer == 2) {
#pragma GCC unroll 8
          for (int m = 0; m < kM; m += 2)
            store_pairs(block.ds_keys + (j + m) / 2 * kRows<U> + r + v * kLanes, acc[m][v], acc[m + 1][v]);
        }
      }
    }
}

// Everything that one key block takes part in: dk and dv of its keys, and its share of dq [D][kRows] of each tile.
template <class T, class U>
void bwd_block(const AttentionSizes& sizes, const Head& head, int64_t index, const BwdTensors<T>& x,
               const KeyBlock<U>& block, float* tiles, float* dq) {
  constexpr int kPer = kPerUnit<U>;
  const int64_t D = sizes.D, Dp = round_up(D, kLanes), Du = D / kPer;
  const int64_t key = index * kKeys, keys = std::min(kKeys, head.S - key);
  const auto row_of = [&](const Rows<T>& rows) {
    return [&](int64_t j) { return rows.row(head.batch, head.k_begin + key + j, head.group); };
  };
  pack_rows<T>(row_of(x.k), keys, D, block.k_along);
  pack_rows<T>(row_of(x.v), keys, D, block.v_along);
  pack_panels<T>(row_of(x.k), keys, D, reinterpret_cast<U*>(block.buffer), block.k_across);
  std::memset(block.dk, 0, static_cast<size_t>(kKeys * Dp) * sizeof(float));
  std::memset(block.dv, 0, static_cast<size_t>(kKeys * Dp) * sizeof(float));

  const float factor = exponent_factor(sizes.scale);
  const Range queries = sizes.mask.queries_of({key, key + keys}, head.T, head.S);
  Bounds bounds;
  for (int64_t t = queries.begin * sizes.rep / kRows<U>; t < blocks_of(queries.end * sizes.rep, kRows<U>); ++t) {
    Range common;
    const Range seen = sizes.keys_of_tile(head, t, &common);
    const Range panels = {std::max<int64_t>(seen.begin - key, 0) / kM, blocks_of(std::min(seen.end - key, keys), kM)};
    if (panels.empty()) continue;
    const RowTile<U> tile(tiles + t * RowTile<U>::floats(D), D);
    const int64_t n = std::min(kRows<U>, sizes.rows(head) - t * kRows<U>), groups = blocks_of(n, kV * kLanes);
    if (key + panels.begin * kM >= common.begin && key + panels.end * kM <= common.end) {
      weigh_block<false>(block, tile, Du, panels, groups, factor, bounds);
    } else {
      bounds.set(sizes, head, t, key);
      weigh_block<true>(block, tile, Du, panels, groups, factor, bounds);
    }
    for (int64_t j = panels.begin * kM; j < panels.end * kM; j += kM) {
      const int64_t at = j * kRows<U> / kPer, count = blocks_of(n, kPer);
      accumulate(block.p_rows + at, 1, kRows<U> / kPer, tile.dout_across, Dp, count, block.dv + j * Dp, Dp, Dp);
      accumulate(block.ds_rows + at, 1, kRows<U> / kPer, tile.q_across, Dp, count, block.dk + j * Dp, Dp, Dp);
    }
    const int64_t first = panels.begin * kM / kPer, count = (panels.end - panels.begin) * kM / kPer;
    for (int64_t d = 0; d < D; d += kM)
      accumulate(block.k_across + d * (kKeys / kPer) + first * kM, kM, 1, block.ds_keys + first * kRows<U>, kRows<U>,
                 count, dq + (t * D + d) * kRows<U>, kRows<U>, groups * kV * kLanes);
  }

  for (int64_t j = 0; j < keys; ++j) {
    write_row(block.dk + j * Dp, VecF(static_cast<float>(sizes.scale)), D, row_of(x.dk)(j));
    write_row(block.dv + j * Dp, VecF(1.0F), D, row_of(x.dv)(j));
  }
}

template <class T>
void bwd(const AttentionSizes& sizes, const BwdTensors<T>& x, const std::vector<Head>& heads) {
  using U = typename UnitOf<T>::type;
  const int64_t D = sizes.D;
  const Scratch<float> blocks_scratch(max_threads() * KeyBlock<U>::floats(D));
  const auto block_of = [&](int64_t thread) {
    return KeyBlock<U>(blocks_scratch.data() + thread * KeyBlock<U>::floats(D), D);
  };
  run_bwd(
      sizes, heads, kKeys, RowTile<U>::floats(D), D * kRows<U>,
      [&](const Head& head, int64_t index, int64_t thread, float* rows) {
        pack_tile<T, U>(sizes, head, index, x, reinterpret_cast<U*>(block_of(thread).buffer), RowTile<U>(rows, D));
      },
      [&](const Head& head, int64_t index, int64_t thread, float* rows, float* dq) {
        bwd_block<T, U>(sizes, head, index, x, block_of(thread), rows, dq);
      },
      [&](const Head& head, int64_t index, int64_t thread, const float* dq) {
        const int64_t first = index * kRows<U>;
        float factor[kRows<U>];
        std::fill(factor, factor + kRows<U>, static_cast<float>(sizes.scale));
        unpack_transposed<T, U>(dq, factor, std::min(kRows<U>, sizes.rows(head) - first), D, block_of(thread).buffer,
                                [&](int64_t r) { return query_row(x.dq, sizes, head, first + r); });
      });
}

void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, const Tensor& cu_seqlens, double scale, bool causal, int64_t window,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  with_dtype(q.dtype, [&](auto tag) {
    using T = decltype(tag);
    const BwdTensors<T> x = {Rows<T>(dout), Rows<T>(q),  Rows<T>(k),  Rows<T>(v), Rows<T>(out),
                             Rows<T>(dq),   Rows<T>(dk), Rows<T>(dv), lse};
    constexpr int64_t kTileRows = kRows<typename UnitOf<T>::type>;
    const AttentionSizes sizes = attention_sizes(q, k, scale, causal, window, kTileRows);
    bwd<T>(sizes, x, heads_of(sizes, q, k, cu_seqlens));
  });
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA

#endif
