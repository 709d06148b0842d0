// What both directions of attention share: the register-blocked product and the packing of rows into its operands.
// Included inside the ISA regions of attention_fwd.cpp and attention_bwd.cpp; no include guard.
//
// A product is C[kM, kV vectors] += sum_n a[m, n] b[n, lane]: `a` is broadcast, `b` loaded, both in units (simd_dot.h).
// Operands along D (`Du = D / kPer` units a row) are kept as they come, a row after the other; an operand whose sum
// runs over rows has, in one unit, kPer successive rows of a column.

namespace llama_fast::cpu::LF_ISA {
namespace {

constexpr int kLanes = VecF::kLanes;
// kM x kV accumulators in half of the registers, enough to hide the latency of two products a cycle, of four with 32.
constexpr int kM = kLanes == 16 ? 8 : 4;
constexpr int kV = VecF::kRegisters / 2 / kM;

// scale * log2(e), by which scores become exponents of two. Never 0: a hidden score of -inf must stay -inf.
LF_INLINE float exponent_factor(double scale) {
  const auto factor = static_cast<float>(scale * 1.4426950408889634);
  return factor == 0.0F ? std::numeric_limits<float>::min() : factor;
}

// Rows of a tile. Sixty-four rows of scores beside the packed rows overflow the first cache in float32: with 32 the
// forward at D = 128 runs at 210 GFLOP/s on a core of Zen 5 instead of 182.
template <class U>
constexpr int64_t kRows = kPerUnit<U> == 2 ? 64 : 32;

// acc += a b over `count` units, one after the other.
template <int NV, class U>
LF_INLINE void multiply_chain(const U* a, int64_t a_n, int64_t a_m, const U* b, int64_t b_n, int64_t count,
                              VecF (&acc)[kM][NV]) {
#pragma GCC unroll 1
  for (int64_t n = 0; n < count; ++n) {
    decltype(load_units(b)) b_vec[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) b_vec[v] = load_units(b + n * b_n + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const auto a_vec = broadcast_unit(a + n * a_n + m * a_m);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] = dot(b_vec[v], a_vec, acc[m][v]);
    }
  }
}

// f(m, v) for each accumulator.
template <int NV, class F>
LF_INLINE void for_each_acc(const F& f) {
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) f(m, v);
}

// acc = a b over `count` units. In float32 the sum is cut into chains of kChain, whose sums are added: the rounding
// error of a chain grows with its length, and the longest operands would have more of it than eager PyTorch.
template <int NV, class U>
LF_INLINE void multiply(const U* a, int64_t a_n, int64_t a_m, const U* b, int64_t b_n, int64_t count,
                        VecF (&acc)[kM][NV]) {
  constexpr int64_t kChain = VecF::kFuses ? 16 : 4;  // without fused multiply-adds each step rounds twice
  for_each_acc<NV>([&](int m, int v) { acc[m][v] = VecF(0.0F); });
  if (kPerUnit<U> == 2 || count <= kChain) {
    multiply_chain<NV>(a, a_n, a_m, b, b_n, count, acc);
    return;
  }
  VecF total[kM][NV];
  for_each_acc<NV>([&](int m, int v) { total[m][v] = VecF(0.0F); });
  for (int64_t n = 0; n < count; n += kChain) {
    for_each_acc<NV>([&](int m, int v) { acc[m][v] = VecF(0.0F); });
    multiply_chain<NV>(a + n * a_n, a_n, a_m, b + n * b_n, b_n, std::min(kChain, count - n), acc);
    for_each_acc<NV>([&](int m, int v) { total[m][v] = total[m][v] + acc[m][v]; });
  }
  for_each_acc<NV>([&](int m, int v) { acc[m][v] = total[m][v]; });
}

// c[kM, columns] += a b over `count` units, columns a multiple of kLanes.
template <class U>
LF_INLINE void accumulate(const U* a, int64_t a_n, int64_t a_m, const U* b, int64_t b_n, int64_t count, float* c,
                          int64_t c_m, int64_t columns) {
  const auto step = [&](int64_t column, auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    VecF acc[kM][NV];
    multiply<NV>(a, a_n, a_m, b + column, b_n, count, acc);
    for_each_acc<NV>([&](int m, int v) {
      float* to = c + m * c_m + column + v * kLanes;
      store(to, load(to) + acc[m][v]);
    });
  };
  int64_t column = 0;
  for (; column + kV * kLanes <= columns; column += kV * kLanes) step(column, std::integral_constant<int, kV>{});
  for (; column < columns; column += kLanes) step(column, std::integral_constant<int, 1>{});
}

// A strided tensor [B, T, H, D] of T.
template <class T>
struct Rows {
  T* data;
  int64_t batch_stride, token_stride, head_stride;

  explicit Rows(const Tensor& x)
      : data(x.ptr<T>()), batch_stride(x.stride[0]), token_stride(x.stride[1]), head_stride(x.stride[2]) {}
  LF_INLINE T* row(int64_t batch, int64_t token, int64_t head) const {
    return data + batch * batch_stride + token * token_stride + head * head_stride;
  }
};

// Row r of a head of q, out or their gradients.
template <class T>
LF_INLINE T* query_row(const Rows<T>& x, const AttentionSizes& sizes, const Head& head, int64_t r) {
  return x.row(head.batch, head.q_begin + r / sizes.rep, head.group * sizes.rep + r % sizes.rep);
}

// lse of row r of a head.
LF_INLINE float* lse_of(const Tensor& lse, const AttentionSizes& sizes, const Head& head, int64_t r) {
  return lse.ptr<float>() + head.batch * lse.stride[0] + (head.group * sizes.rep + r % sizes.rep) * lse.stride[1] +
         (head.q_begin + r / sizes.rep) * lse.stride[2];
}

// lse from the maximum of a row, in base two, and the sum of its exponentials.
LF_INLINE float lse_from(float max, float sum) {
  return static_cast<float>(static_cast<double>(max) * 0.6931471805599453 + std::log(sum));
}

template <class A, class B>
constexpr bool kSame = std::is_same<A, B>::value;

// to[0, D) as units along D.
template <class T, class U>
LF_INLINE void pack_row(const T* from, int64_t D, U* to) {
  if constexpr (kSame<T, float> || kPerUnit<U> == 2) {
    std::memcpy(to, from, static_cast<size_t>(D) * sizeof(T));
  } else {
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) store(to + d, load(from + d));
    if (d < D) store_n(to + d, load_n(from + d, D - d), D - d);
  }
}

// `rows` units across D columns: rows from[0] .. from[kPer - 1] of T; a null row counts as zeros. `to` holds D rounded
// up to kLanes units, those past D zero.
template <class T, class U>
LF_INLINE void pack_across(const T* const* from, int64_t D, U* to) {
  for (int64_t d = 0; d < D; d += kLanes) {
    VecF row[kPerUnit<U>];
    for (int i = 0; i < kPerUnit<U>; ++i)
      row[i] = from[i] == nullptr ? VecF(0.0F) : (d + kLanes <= D ? load(from[i] + d) : load_n(from[i] + d, D - d));
    if constexpr (kPerUnit<U> == 2)
      store_pairs(to + d, row[0], row[1]);
    else
      store(to + d, row[0]);
  }
}

// to[u * kRows + r] = unit u of row r, for n rows and Du units; `n` is rounded up to whole groups with zeros.
// `buffer` holds four rows of units.
template <class T, class U, class RowAt>
LF_INLINE void pack_transposed(const RowAt& row_at, int64_t n, int64_t D, U* buffer, U* to) {
  const int64_t Du = D / kPerUnit<U>, end = round_up(n, kV * kLanes);
  const int64_t row[4] = {0, Du, 2 * Du, 3 * Du};
  for (int64_t r = 0; r < end; r += 4) {
    for (int64_t i = 0; i < 4; ++i) {
      if (r + i < n)
        pack_row<T>(row_at(r + i), D, buffer + row[i]);
      else
        std::memset(buffer + row[i], 0, static_cast<size_t>(Du) * sizeof(U));
    }
    for (int64_t u = 0; u < Du; u += 4) transpose_4x4(buffer + u, row, to + u * kRows<U> + r, kRows<U>);
  }
}

// to[0, D) = by * from
template <class T>
LF_INLINE void write_row(const float* from, VecF by, int64_t D, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) store(to + d, load(from + d) * by);
  if (d < D) store_n(to + d, load_n(from + d, D - d) * by, D - d);
}

// sum_d a[d] b[d]
template <class T>
LF_INLINE float dot_rows(const T* a, const T* b, int64_t D) {
  VecF total(0.0F);
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) total = fma(load(a + d), load(b + d), total);
  if (d < D) total = fma(load_n(a + d, D - d), load_n(b + d, D - d), total);
  return sum(total);
}

// Row r of the output, r < n, is column r of from[D, kRows], times factor[r]. `buffer` holds four rows of D.
template <class T, class U, class RowAt>
LF_INLINE void unpack_transposed(const float* from, const float* factor, int64_t n, int64_t D, float* buffer,
                                 const RowAt& row_at) {
  for (int64_t r = 0; r < n; r += 4) {
    for (int64_t d = 0; d < D; d += 4) {
      const int64_t row[4] = {d * kRows<U>, (d + 1) * kRows<U>, (d + 2) * kRows<U>, (d + 3) * kRows<U>};
      transpose_4x4(from + r, row, buffer + d, D);
    }
    for (int64_t i = 0; i < 4 && r + i < n; ++i) write_row(buffer + i * D, VecF(factor[r + i]), D, row_at(r + i));
  }
}

// A block of up to kKeys keys whose sum runs over keys: panels[D / kM][kKeys / kPer][kM] of units. Keys from `keys` to
// the next multiple of kM are zeros. `buffer` holds D units rounded up to kLanes.
template <class T, class U, class RowAt>
LF_INLINE void pack_panels(const RowAt& row_at, int64_t keys, int64_t D, U* buffer, U* panels) {
  constexpr int kPer = kPerUnit<U>;
  for (int64_t j = 0; j < round_up(keys, kM); j += kPer) {
    const T* rows[kPer];
    for (int i = 0; i < kPer; ++i) rows[i] = j + i < keys ? row_at(j + i) : nullptr;
    pack_across<T>(rows, D, buffer);
    for (int64_t d = 0; d < D; d += kM)
      std::memcpy(panels + d * (kKeys / kPer) + j / kPer * kM, buffer + d, kM * sizeof(U));
  }
}

// A block of up to kKeys keys whose sum runs along D: [kKeys][Du] units, with zeros as in pack_panels.
template <class T, class U, class RowAt>
LF_INLINE void pack_rows(const RowAt& row_at, int64_t keys, int64_t D, U* to) {
  const int64_t Du = D / kPerUnit<U>;
  for (int64_t j = 0; j < keys; ++j) pack_row<T>(row_at(j), D, to + j * Du);
  std::memset(to + keys * Du, 0, static_cast<size_t>((round_up(keys, kM) - keys) * Du) * sizeof(U));
}

// The bounds of the keys that each row of a tile sees, as floats relative to a key block; a row past the last one has
// those of the last.
struct Bounds {
  alignas(64) float begin[kMostRows];
  alignas(64) float end[kMostRows];

  void set(const AttentionSizes& sizes, const Head& head, int64_t tile, int64_t key) {
    const int64_t last = sizes.rows(head) - 1;
    for (int64_t r = 0; r < sizes.tile_rows; ++r) {
      const Range keys = sizes.mask.keys_of(std::min(tile * sizes.tile_rows + r, last) / sizes.rep, head.T, head.S);
      begin[r] = static_cast<float>(std::clamp<int64_t>(keys.begin - key, -1, kKeys));
      end[r] = static_cast<float>(std::clamp<int64_t>(keys.end - key, -1, kKeys));
    }
  }
  // x where the lanes from row r see the key, else `hidden`.
  LF_INLINE VecF seen(VecF key, int64_t r, VecF x, VecF hidden) const {
    return select_less(key, load(begin + r), hidden, select_less(key, load(end + r), x, hidden));
  }
};

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA
