// What both directions of attention on matrix registers share: rows packed into blocks (simd_amx.h), and sums out of
// them. Included inside the ISA regions of attention_amx_fwd.cpp and attention_amx_bwd.cpp, after attention_tile.h; no
// include guard.
//
// A tile of rows and a block of keys are whole numbers of blocks of kSide; what lies past the last row, key or column
// of the head is zero. Dp is D rounded up to kSide. Of float32 there are three packs, one a part.

namespace llama_fast::cpu::LF_ISA {
namespace {

using Pair = uint32_t;  // two bfloat16 that follow each other in a sum

// to[p part + d] = part p of from[d] for d < D, and zeros up to Dp.
LF_INLINE void split_row(const float* from, int64_t D, int64_t Dp, int64_t part, bf16* to, Largest& largest) {
  for (int64_t d = 0; d < Dp; d += 16, to += 16) {
    VecF x = d + 16 <= D ? load(from + d) : load_n(from + d, std::max<int64_t>(D - d, 0));
    largest.see(x);
#pragma GCC unroll 3
    for (int p = 0; p < kParts<float>; ++p) store_part(to + p * part, x);
  }
}

// kSide rows of T as bfloat16 [Dp], or as the parts of it.
template <class T>
struct Group {
  const bf16* rows[kParts<T>][kSide];

  static constexpr int64_t floats(int64_t Dp) { return kParts<T> * kSide * Dp / 2; }  // that it needs
};

// Rows [first, first + kSide) of `n`: where they are, or, in parts or filled up with zeros, in `buffer`.
template <class T, class RowAt>
LF_INLINE void take_rows(const RowAt& row_at, int64_t first, int64_t n, int64_t D, int64_t Dp, float* buffer,
                         Group<T>& group, Largest& largest) {
  const int64_t part = kSide * Dp;
  bf16* to = reinterpret_cast<bf16*>(buffer);
  for (int64_t r = 0; r < kSide; ++r, to += Dp) {
    constexpr int64_t kAhead = 8;  // rows: in tensors of many heads each lies in a page of its own
    if (first + r + kAhead < n) fetch_ahead(row_at(first + r + kAhead), D * static_cast<int64_t>(sizeof(T)));
    const T* row = first + r < n ? row_at(first + r) : nullptr;
    for (int p = 0; p < kParts<T>; ++p) group.rows[p][r] = to + p * part;
    if (row == nullptr) {
      for (int p = 0; p < kParts<T>; ++p) std::memset(to + p * part, 0, static_cast<size_t>(Dp) * sizeof(bf16));
    } else if constexpr (kSame<T, float>) {
      split_row(row, D, Dp, part, to, largest);
    } else if (D == Dp) {
      group.rows[0][r] = row;
    } else {
      std::memcpy(to, row, static_cast<size_t>(D) * sizeof(bf16));
      std::memset(to + D, 0, static_cast<size_t>(Dp - D) * sizeof(bf16));
    }
  }
}

// f(group, r) for rows [r, r + kSide), r = 0, kSide, ... below n. False where the parts of some do not add up to them.
template <class T, class RowAt, class F>
LF_INLINE bool for_each_group(const RowAt& row_at, int64_t n, int64_t D, int64_t Dp, float* buffer, const F& f) {
  Largest largest;
  Group<T> group;
  for (int64_t r = 0; r < n; r += kSide) {
    take_rows<T>(row_at, r, n, D, Dp, buffer, group, largest);
    f(group, r);
  }
  return largest.fits();
}

using SideRows = const bf16* const (&)[kSide];

LF_INLINE void half_of(SideRows rows, int64_t half, const void* (&to)[16]) {
  for (int64_t r = 0; r < 16; ++r) to[r] = rows[16 * half + r];
}

// Left blocks [Dp / kSide]: rows as they are, terms along D.
LF_INLINE void pack_left(SideRows rows, int64_t Dp, bf16* to) {
  for (int64_t r = 0; r < kSide; ++r)
    for (int64_t d = 0; d < Dp; d += kSide) store_pairs(to + d * kSide + r * kSide, load_pairs(rows[r] + d));
}

// Right blocks [Dp / kSide]: rows become columns, terms along D.
LF_INLINE void pack_right(SideRows rows, int64_t Dp, bf16* to) {
  for (int64_t half = 0; half < 2; ++half) {
    const void* of_half[16];
    half_of(rows, half, of_half);
    for (int64_t d = 0; d < Dp; d += kSide)
      transpose_16x16(of_half, 2 * d, [&](int64_t u, VecPairs pairs) {
        store_pairs(to + d * kSide + half * kTileElements + u * kSide, pairs);
      });
  }
}

// Left blocks [Dp / kSide], `stride` apart: columns become rows, terms along the rows.
LF_INLINE void pack_left_across(SideRows rows, int64_t Dp, int64_t stride, bf16* to) {
  const void *upper[16], *lower[16];
  half_of(rows, 0, upper);
  half_of(rows, 1, lower);
  for (int64_t d = 0; d < Dp; d += kSide, to += stride * kBlock) {
    VecPairs column[16];  // pairs along D of the upper rows
    transpose_16x16(upper, 2 * d, [&](int64_t u, VecPairs pairs) { column[u] = pairs; });
    transpose_16x16(lower, 2 * d, [&](int64_t u, VecPairs pairs) {
      store_pairs(to + 2 * u * kSide, unzip<0>(column[u], pairs));
      store_pairs(to + (2 * u + 1) * kSide, unzip<1>(column[u], pairs));
    });
  }
}

// Right blocks [Dp / kSide], `stride` apart: columns along D, terms along the rows.
LF_INLINE void pack_right_across(SideRows rows, int64_t Dp, int64_t stride, bf16* to) {
  for (int64_t d = 0; d < Dp; d += kSide, to += stride * kBlock)
    for (int64_t r = 0; r < kSide; r += 2) {
      const VecPairs even = load_pairs(rows[r] + d), odd = load_pairs(rows[r + 1] + d);
      store_pairs(to + r / 2 * kSide, zip<0>(even, odd));
      store_pairs(to + kTileElements + r / 2 * kSide, zip<1>(even, odd));
    }
}

// sum += left right, or sum = left right with kAdd false. In parts the product is summed for itself first, in `own`:
// each instruction rounds the sum that it adds to.
template <bool kAdd, int kN>
LF_INLINE void add_product(Parts<kN> left, Parts<kN> right, int64_t count, float* sum, float* own) {
  if constexpr (kAdd && kN > 1) {
    multiply_blocks<false>(left, right, count, own);
    for (int64_t i = 0; i < kBlock; i += 16) store(sum + i, load(sum + i) + load(own + i));
  } else {
    multiply_blocks<kAdd>(left, right, count, sum);
  }
}

// to[d, d + 16) of D = x
template <class T>
LF_INLINE void write_some(T* to, int64_t d, int64_t D, VecF x) {
  if (d + 16 <= D)
    store(to + d, x);
  else if (d < D)
    store_n(to + d, x, D - d);
}

// Row r of the output, r < n, is column r of the sums [Dp / kSide][stride], times factor(r).
template <class Factor, class RowAt>
LF_INLINE void unpack_columns(const float* sums, int64_t stride, int64_t n, int64_t D, const Factor& factor,
                              const RowAt& row_at) {
  for (int64_t r = 0; r < n; r += 16)
    for (int64_t d = 0; d < D; d += 16) {
      const float* tile = sums + (d / kSide * stride + r / kSide) * kBlock + (d / 16 % 2 * 2 + r / 16 % 2) * kSumTile;
      const void* rows[16];
      for (int64_t i = 0; i < 16; ++i) rows[i] = tile + 16 * i;
      transpose_16x16(rows, 0, [&](int64_t i, VecPairs column) {
        if (r + i < n) write_some(row_at(r + i), d, D, as_floats(column) * VecF(factor(r + i)));
      });
    }
}

// Row r of the output, r < n, is `factor` times row r of the sums [..][Dp / kSide].
template <class RowAt>
LF_INLINE void unpack_rows(const float* sums, int64_t n, int64_t D, int64_t Dp, float factor, const RowAt& row_at) {
  for (int64_t r = 0; r < n; ++r) {
    const float* from = sums + r / kSide * kSide * Dp + r % kSide / 16 * 2 * kSumTile + r % 16 * 16;
    for (int64_t d = 0; d < D; d += 16)
      write_some(row_at(r), d, D, load(from + d / kSide * kBlock + d % kSide / 16 * kSumTile) * VecF(factor));
  }
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA
