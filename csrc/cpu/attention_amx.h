// What both directions of attention on matrix registers share: packing rows of bfloat16 into blocks (simd_amx.h) and
// sums out of them. Included inside the ISA regions of attention_amx_fwd.cpp and attention_amx_bwd.cpp, after
// attention_tile.h; no include guard.
//
// A tile of rows and a block of keys are whole numbers of blocks of kSide; what lies past the last row, key or column
// of the head is zero. Dp is D rounded up to kSide, and `buffer` holds four rows of Dp units.

namespace llama_fast::cpu::LF_ISA {
namespace {

using Pair = uint32_t;  // two bfloat16 that follow each other in a sum

// to = from[0, D) and zeros up to Dp.
LF_INLINE void pad_row(const bf16* from, int64_t D, int64_t Dp, bf16* to) {
  std::memcpy(to, from, static_cast<size_t>(D) * sizeof(bf16));
  std::memset(to + D, 0, static_cast<size_t>(Dp - D) * sizeof(bf16));
}

// Pairs (rows[0], rows[1]) across the columns, and zeros up to Dp.
LF_INLINE void pad_pairs(const bf16* const (&rows)[2], int64_t D, int64_t Dp, Pair* to) {
  pack_across<bf16, Pair>(rows, D, to);
  const int64_t done = round_up(D, kLanes);
  std::memset(to + done, 0, static_cast<size_t>(Dp - done) * sizeof(Pair));
}

// to[0, kSide) = from[0, have) and zeros.
LF_INLINE void copy_side(const bf16* from, int64_t have, bf16* to) {
  if (have >= kSide) {
    std::memcpy(to, from, kSide * sizeof(bf16));
    return;
  }
  std::memset(to, 0, kSide * sizeof(bf16));
  if (have > 0) std::memcpy(to, from, static_cast<size_t>(have) * sizeof(bf16));
}

// Left blocks [n / kSide][Dp / kSide] of `n` rows, terms along D.
template <class RowAt>
LF_INLINE void pack_left(const RowAt& row_at, int64_t n, int64_t D, int64_t Dp, bf16* to) {
  for (int64_t r = 0; r < round_up(n, kSide); ++r) {
    bf16* at = to + r / kSide * kSide * Dp + r % kSide * kSide;
    const bf16* row = r < n ? row_at(r) : nullptr;
    for (int64_t d = 0; d < Dp; d += kSide, at += kBlock) copy_side(row + d, row == nullptr ? 0 : D - d, at);
  }
}

// Right blocks [n / kSide][Dp / kSide] of `n` rows that become columns, terms along D.
template <class RowAt>
LF_INLINE void pack_right(const RowAt& row_at, int64_t n, int64_t D, int64_t Dp, Pair* buffer, bf16* to) {
  const int64_t pairs = Dp / 2, row[4] = {0, pairs, 2 * pairs, 3 * pairs};
  for (int64_t r = 0; r < round_up(n, kSide); r += 4) {
    for (int64_t i = 0; i < 4; ++i) {
      bf16* at = reinterpret_cast<bf16*>(buffer + row[i]);
      if (r + i < n)
        pad_row(row_at(r + i), D, Dp, at);
      else
        std::memset(at, 0, static_cast<size_t>(Dp) * sizeof(bf16));
    }
    Pair* blocks = reinterpret_cast<Pair*>(to) + r / kSide * kSide * pairs + r % kSide / 16 * 256 + r % 16;
    for (int64_t u = 0; u < pairs; u += 4)
      transpose_4x4(buffer + u, row, blocks + u / 16 * (kBlock / 2) + u % 16 * 16, 16);
  }
}

// f(u, pairs) for each pair u of `n` rows, rounded up to whole blocks; `pairs`: Dp of them.
template <class RowAt, class F>
LF_INLINE void for_each_pair(const RowAt& row_at, int64_t n, const F& f) {
  for (int64_t r = 0; r < round_up(n, kSide); r += 2) {
    const bf16* rows[2] = {r < n ? row_at(r) : nullptr, r + 1 < n ? row_at(r + 1) : nullptr};
    f(r / 2, rows);
  }
}

// Left blocks [Dp / kSide][stride] of the transposed: columns of `n` rows become rows, terms along the rows.
template <class RowAt>
LF_INLINE void pack_left_across(const RowAt& row_at, int64_t n, int64_t D, int64_t Dp, int64_t stride, Pair* buffer,
                                bf16* to) {
  const int64_t row[4] = {0, Dp, 2 * Dp, 3 * Dp};
  for_each_pair(row_at, n, [&](int64_t u, const bf16* const(&rows)[2]) {
    pad_pairs(rows, D, Dp, buffer + row[u % 4]);
    if (u % 4 != 3) return;
    const int64_t first = u - 3;
    Pair* blocks = reinterpret_cast<Pair*>(to) + first / 16 * (kBlock / 2) + first % 16;
    for (int64_t d = 0; d < Dp; d += 4)
      transpose_4x4(buffer + d, row, blocks + d / kSide * stride * (kBlock / 2) + d % kSide * 16, 16);
  });
}

// Right blocks [Dp / kSide][stride]: columns along D, terms along the rows.
template <class RowAt>
LF_INLINE void pack_right_across(const RowAt& row_at, int64_t n, int64_t D, int64_t Dp, int64_t stride, Pair* buffer,
                                 bf16* to) {
  for_each_pair(row_at, n, [&](int64_t u, const bf16* const(&rows)[2]) {
    pad_pairs(rows, D, Dp, buffer);
    Pair* blocks = reinterpret_cast<Pair*>(to) + u / 16 * (kBlock / 2) + u % 16 * 16;
    for (int64_t d = 0; d < Dp; d += 16)
      std::memcpy(blocks + d / kSide * stride * (kBlock / 2) + d % kSide / 16 * 256, buffer + d, 16 * sizeof(Pair));
  });
}

// Row r of the output, r < n, is column r of the sums [Dp / kSide][stride], times factor(r).
template <class Factor, class RowAt>
LF_INLINE void unpack_columns(const float* sums, int64_t stride, int64_t n, int64_t D, int64_t Dp, float* buffer,
                              const Factor& factor, const RowAt& row_at) {
  const int64_t row[4] = {0, 16, 32, 48};
  for (int64_t r = 0; r < n; r += 4) {
    const float* from = sums + r / kSide * kBlock + r % kSide / 16 * kSumTile + r % 16;
    for (int64_t d = 0; d < D; d += 4)
      transpose_4x4(from + d / kSide * stride * kBlock + d % kSide / 16 * 2 * kSumTile + d % 16 * 16, row, buffer + d,
                    Dp);
    for (int64_t i = 0; i < 4 && r + i < n; ++i) write_row(buffer + i * Dp, VecF(factor(r + i)), D, row_at(r + i));
  }
}

// Row r of the output, r < n, is `factor` times row r of the sums [..][Dp / kSide].
template <class RowAt>
LF_INLINE void unpack_rows(const float* sums, int64_t n, int64_t D, int64_t Dp, float factor, float* buffer,
                           const RowAt& row_at) {
  for (int64_t r = 0; r < n; ++r) {
    const float* from = sums + r / kSide * kSide * Dp + r % kSide / 16 * 2 * kSumTile + r % 16 * 16;
    for (int64_t d = 0; d < Dp; d += 16) store(buffer + d, load(from + d / kSide * kBlock + d % kSide / 16 * kSumTile));
    write_row(buffer, VecF(factor), D, row_at(r));
  }
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA
