// VecF for ARM64's Advanced SIMD: four lanes; LF_NATIVE_BF16 is 1 where the bfloat16 instructions may be used.
// No include guard: see simd.h.

namespace llama_fast::cpu::LF_ISA {

struct VecF {
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 32;
  static constexpr bool kFuses = true;
  float32x4_t v;

  VecF() = default;
  LF_INLINE VecF(float32x4_t raw) : v(raw) {}
  LF_INLINE VecF(float x) : v(vdupq_n_f32(x)) {}
};

LF_INLINE VecF operator+(VecF a, VecF b) { return vaddq_f32(a.v, b.v); }
LF_INLINE VecF operator-(VecF a, VecF b) { return vsubq_f32(a.v, b.v); }
LF_INLINE VecF operator*(VecF a, VecF b) { return vmulq_f32(a.v, b.v); }
LF_INLINE VecF operator/(VecF a, VecF b) { return vdivq_f32(a.v, b.v); }
LF_INLINE VecF fma(VecF a, VecF b, VecF c) { return vfmaq_f32(c.v, a.v, b.v); }
// FMAX and FMIN would give NaN where either is NaN.
LF_INLINE VecF max(VecF a, VecF b) { return vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v); }
LF_INLINE VecF min(VecF a, VecF b) { return vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v); }
LF_INLINE float sum(VecF a) { return vaddvq_f32(a.v); }
LF_INLINE float max(VecF a) {
  const VecF pairs = max(a, VecF(vextq_f32(a.v, a.v, 2)));
  return vgetq_lane_f32(max(pairs, VecF(vextq_f32(pairs.v, pairs.v, 1))).v, 0);
}

LF_INLINE uint16x4_t bf16_bits(VecF a) {
#if LF_NATIVE_BF16
  return vreinterpret_u16_bf16(vcvt_bf16_f32(a.v));
#else
  const uint32x4_t u = vreinterpretq_u32_f32(a.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint16x4_t rounded = vshrn_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  const uint16x4_t quiet = vorr_u16(vshrn_n_u32(u, 16), vdup_n_u16(0x40));
  return vbsl_u16(vmovn_u32(vceqq_f32(a.v, a.v)), rounded, quiet);
#endif
}
LF_INLINE VecF from_bf16_bits(uint16x4_t u) { return vreinterpretq_f32_u32(vshll_n_u16(u, 16)); }
LF_INLINE uint16x4_t f16_bits(VecF a) { return vreinterpret_u16_f16(vcvt_f16_f32(a.v)); }
LF_INLINE VecF from_f16_bits(uint16x4_t u) { return vcvt_f32_f16(vreinterpret_f16_u16(u)); }

LF_INLINE VecF load(const float* p) { return vld1q_f32(p); }
LF_INLINE VecF load(const bf16* p) { return from_bf16_bits(vld1_u16(&p->bits)); }
LF_INLINE VecF load(const f16* p) { return from_f16_bits(vld1_u16(&p->bits)); }
template <class T>
LF_INLINE VecF load_n(const T* p, int64_t n, float fill = 0.0F) {
  alignas(16) float lanes[4];
  for (int64_t i = 0; i < 4; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return vld1q_f32(lanes);
}

LF_INLINE void store(float* p, VecF a) { vst1q_f32(p, a.v); }
LF_INLINE void store(bf16* p, VecF a) { vst1_u16(&p->bits, bf16_bits(a)); }
LF_INLINE void store(f16* p, VecF a) { vst1_u16(&p->bits, f16_bits(a)); }
template <class T>
LF_INLINE void store_n(T* p, VecF a, int64_t n) {
  alignas(16) float lanes[4];
  vst1q_f32(lanes, a.v);
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(lanes[i]);
}
// These processors see by themselves that whole lines are written, and do not read them first.
template <class T>
LF_INLINE void stream(T* p, VecF a) {
  store(p, a);
}
LF_INLINE void stream_fence() {}

LF_INLINE VecF rounded(VecF a, float) { return a; }
LF_INLINE VecF rounded(VecF a, bf16) { return from_bf16_bits(bf16_bits(a)); }
LF_INLINE VecF rounded(VecF a, f16) { return from_f16_bits(f16_bits(a)); }

LF_INLINE VecF load_twice(const float* p) {
  const float32x2_t two = vld1_f32(p);
  return vcombine_f32(vzip1_f32(two, two), vzip2_f32(two, two));
}
LF_INLINE VecF rotate_pairs(VecF x, VecF c, VecF s) {
  const uint32x4_t minus_even = vreinterpretq_u32_u64(vdupq_n_u64(0x80000000U));
  const float32x4_t turned = vmulq_f32(vrev64q_f32(x.v), s.v);
  return vfmaq_f32(vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(turned), minus_even)), x.v, c.v);
}

constexpr bool kScalesByAnyPower = false;
LF_INLINE VecF scale_by_power_of_two(VecF x, VecF n) {
  const int32x4_t bits = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127)), 23);
  return vmulq_f32(x.v, vreinterpretq_f32_s32(bits));
}
LF_INLINE VecF round(VecF x) { return vrndnq_f32(x.v); }

#if LF_NATIVE_BF16
struct VecPairs {
  uint32x4_t v;
};
// One pair, which a product takes out of its lane: broadcasting it would be an instruction more.
struct OnePair {
  uint32x2_t v;
};
LF_INLINE VecPairs load_units(const uint32_t* p) { return {vld1q_u32(p)}; }
LF_INLINE OnePair broadcast_unit(const uint32_t* p) { return {uint32x2_t{*p, 0}}; }
// Rounds to odd; subnormal bfloat16 count as zero.
LF_INLINE VecF dot(VecPairs a, VecPairs b, VecF c) {
  return vbfdotq_f32(c.v, vreinterpretq_bf16_u32(a.v), vreinterpretq_bf16_u32(b.v));
}
LF_INLINE VecF dot(VecPairs a, OnePair b, VecF c) {
  return vbfdotq_lane_f32(c.v, vreinterpretq_bf16_u32(a.v), vreinterpret_bf16_u32(b.v), 0);
}
LF_INLINE void store_pairs(uint32_t* p, VecF even, VecF odd) {
  const uint16x4x2_t halves = {{bf16_bits(even), bf16_bits(odd)}};
  vst2_u16(reinterpret_cast<uint16_t*>(p), halves);
}
#endif

}  // namespace llama_fast::cpu::LF_ISA
