// What matrix products on VecF need: units, the dot product of units, transposes, a compare-and-select and a lean 2^x.
// No include guard: see simd.h.
//
// A unit is the four bytes that one lane of a dot product takes at a time: a float, or, where LF_NATIVE_BF16 is 1, a
// pair of bfloat16 (uint32_t, the lower index in the lower half) multiplied and summed in float32: the functions on
// those stand with their VecF.

namespace llama_fast::cpu::LF_ISA {

// How T is kept for dot products, and how many elements a unit has.
template <class T>
struct UnitOf {
  using type = float;
};
template <class U>
constexpr int kPerUnit = 1;

LF_INLINE VecF load_units(const float* p) { return load(p); }
LF_INLINE VecF broadcast_unit(const float* p) { return VecF(*p); }
LF_INLINE VecF dot(VecF a, VecF b, VecF c) { return fma(a, b, c); }
// Units of successive lanes of `a`: kLanes / kPerUnit of them.
LF_INLINE void store_along(float* p, VecF a) { store(p, a); }

#if defined(LF_NATIVE_BF16) && LF_NATIVE_BF16
template <>
struct UnitOf<bf16> {
  using type = uint32_t;
};
template <>
inline constexpr int kPerUnit<uint32_t> = 2;

LF_INLINE void store_along(uint32_t* p, VecF a) { store(reinterpret_cast<bf16*>(p), a); }
#endif

// a < b ? x : y, per lane; y where a or b is NaN.
LF_INLINE VecF select_less(VecF a, VecF b, VecF x, VecF y) { return VecF(a.v < b.v ? x.v : y.v); }

// 2^x for x <= 127, within 1 ulp; exactly 0 below 2^-125.5, so that no subnormal arises; NaN for NaN.
// x = n + r with |r| <= 1/2: the sum with 1.5 * 2^23 + 126 rounds x to n and leaves n + 126, the exponent of 2^(n-1),
// in the low bits. The polynomial is minimax for 2 * 2^r in relative error.
LF_INLINE VecF exp2_flush(VecF x) {
  const VecF magic(12582912.0F + 126.0F);
  x = max(VecF(-126.0F), x);  // the order of the operands keeps a NaN
  const VecF t = x + magic;
  const VecF r = x - (t - magic);
  VecF p = fma(VecF(0.000306916239953F), r, VecF(0.00267998624383F));
  p = fma(p, r, VecF(0.0192369779143F));
  p = fma(p, r, VecF(0.111006575539F));
  p = fma(p, r, VecF(0.480452937813F));
  p = fma(p, r, VecF(1.38629441147F));
  p = fma(p, r, VecF(2.00000000111F));
  using Bits = decltype(t.v < t.v);
  using Raw = decltype(t.v);
  return p * VecF((Raw)((Bits)t.v << 23));
}

// Lanes I of a and, counted on, of b. g++ 11 has no __builtin_shufflevector, clang has no __builtin_shuffle.
template <int... I, class V>
LF_INLINE V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  using Lanes = decltype(a == b);  // integers of the same size
  return __builtin_shuffle(a, b, Lanes{I...});
#endif
}

// Rows become columns, eight of each: three rounds in which the lanes of rows i and i + 4 take turns.
template <class V>
LF_INLINE void transpose_8x8(V (&a)[8]) {
  V b[8];
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) {
      b[2 * i] = shuffle<0, 8, 1, 9, 2, 10, 3, 11>(a[i], a[i + 4]);
      b[2 * i + 1] = shuffle<4, 12, 5, 13, 6, 14, 7, 15>(a[i], a[i + 4]);
    }
    for (int i = 0; i < 8; ++i) a[i] = b[i];
  }
}

// to[c * to_stride + r] = from[row[r] + c] for four rows and four columns of units.
template <class U>
LF_INLINE void transpose_4x4(const U* from, const int64_t (&row)[4], U* to, int64_t to_stride) {
  typedef U Quad __attribute__((vector_size(16)));
  Quad a[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&a[i], from + row[i], 16);
  const Quad b0 = shuffle<0, 4, 1, 5>(a[0], a[1]), b1 = shuffle<0, 4, 1, 5>(a[2], a[3]);
  const Quad b2 = shuffle<2, 6, 3, 7>(a[0], a[1]), b3 = shuffle<2, 6, 3, 7>(a[2], a[3]);
  const Quad c[4] = {shuffle<0, 1, 4, 5>(b0, b1), shuffle<2, 3, 6, 7>(b0, b1), shuffle<0, 1, 4, 5>(b2, b3),
                     shuffle<2, 3, 6, 7>(b2, b3)};
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * to_stride, &c[i], 16);
}

}  // namespace llama_fast::cpu::LF_ISA
