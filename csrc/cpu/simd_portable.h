// VecF for any processor: four lanes in a GNU vector, which is SSE2 on x86-64.
// No include guard: see simd.h.

namespace llama_fast::cpu::LF_ISA {

struct VecF {
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;  // at least
  static constexpr bool kFuses = false;  // whether fma rounds once
  typedef float Raw __attribute__((vector_size(16)));
  typedef int32_t RawI __attribute__((vector_size(16)));
  Raw v;

  VecF() = default;
  LF_INLINE VecF(Raw raw) : v(raw) {}
  LF_INLINE VecF(float x) : v{x, x, x, x} {}
};

LF_INLINE VecF operator+(VecF a, VecF b) { return a.v + b.v; }
LF_INLINE VecF operator-(VecF a, VecF b) { return a.v - b.v; }
LF_INLINE VecF operator*(VecF a, VecF b) { return a.v * b.v; }
LF_INLINE VecF operator/(VecF a, VecF b) { return a.v / b.v; }
LF_INLINE VecF fma(VecF a, VecF b, VecF c) { return a.v * b.v + c.v; }
LF_INLINE VecF select(VecF::RawI mask, VecF a, VecF b) {
  return reinterpret_cast<VecF::Raw>((mask & reinterpret_cast<VecF::RawI>(a.v)) |
                                     (~mask & reinterpret_cast<VecF::RawI>(b.v)));
}
// max(a, b) and min(a, b) give b where either is NaN, as the x86 instructions do.
LF_INLINE VecF max(VecF a, VecF b) { return select(a.v > b.v, a, b); }
LF_INLINE VecF min(VecF a, VecF b) { return select(a.v < b.v, a, b); }
LF_INLINE float sum(VecF a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
LF_INLINE float max(VecF a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}

template <class T>
LF_INLINE VecF load(const T* p) {
  return VecF::Raw{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
// The first n lanes, 0 <= n <= kLanes; the others are `fill`.
template <class T>
LF_INLINE VecF load_n(const T* p, int64_t n, float fill = 0.0F) {
  VecF::Raw r{fill, fill, fill, fill};
  for (int64_t i = 0; i < n; ++i) r[i] = to_float(p[i]);
  return r;
}
template <class T>
LF_INLINE void store(T* p, VecF a) {
  for (int i = 0; i < 4; ++i) p[i] = from_float<T>(a.v[i]);
}
template <class T>
LF_INLINE void store_n(T* p, VecF a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(a.v[i]);
}
// A store that goes past the caches where the processor has one; p is aligned to the vector's size in memory.
template <class T>
LF_INLINE void stream(T* p, VecF a) {
  store(p, a);
}
// Stands between a thread's streaming stores and the end of its work.
LF_INLINE void stream_fence() {}

// To the precision of the type of the second argument.
template <class T>
LF_INLINE VecF rounded(VecF a, T) {
  return VecF::Raw{to_float(from_float<T>(a.v[0])), to_float(from_float<T>(a.v[1])), to_float(from_float<T>(a.v[2])),
                   to_float(from_float<T>(a.v[3]))};
}

// kLanes / 2 numbers, each in two neighbouring lanes.
LF_INLINE VecF load_twice(const float* p) { return VecF::Raw{p[0], p[0], p[1], p[1]}; }
// Turns the pairs (x0, x1) of neighbouring lanes: (x0 c0 - x1 s0, x1 c1 + x0 s1).
LF_INLINE VecF rotate_pairs(VecF x, VecF c, VecF s) {
  const VecF::Raw swapped{-x.v[1], x.v[0], -x.v[3], x.v[2]};
  return x.v * c.v + swapped * s.v;
}

// Whether scale_by_power_of_two takes any integral n.
constexpr bool kScalesByAnyPower = false;
// 2^n x for integral |n| <= 126 per lane.
LF_INLINE VecF scale_by_power_of_two(VecF x, VecF n) {
  const VecF::RawI bits = (__builtin_convertvector(n.v, VecF::RawI) + 127) << 23;
  return x.v * reinterpret_cast<VecF::Raw>(bits);
}
// To the nearest integer, ties to even, for |x| < 2^22.
LF_INLINE VecF round(VecF x) {
  const VecF::Raw magic{12582912.0F, 12582912.0F, 12582912.0F, 12582912.0F};
  return (x.v + magic) - magic;
}

}  // namespace llama_fast::cpu::LF_ISA
