// What simd_neon.h uses of ARM's intrinsics, done in C++: a library for the sanitizers has these kernels on every
// processor. Lanes count from the lowest. Source of the meanings: Arm Architecture Reference Manual for A-profile
// (DDI 0487), chapter C7.
#pragma once

namespace llama_fast::cpu {

typedef float float32x2_t __attribute__((vector_size(8)));
typedef float float32x4_t __attribute__((vector_size(16)));
typedef uint16_t uint16x4_t __attribute__((vector_size(8)));
typedef uint32_t uint32x2_t __attribute__((vector_size(8)));
typedef uint32_t uint32x4_t __attribute__((vector_size(16)));
typedef uint64_t uint64x2_t __attribute__((vector_size(16)));
typedef int32_t int32x4_t __attribute__((vector_size(16)));
struct float16x4_t {
  uint16x4_t bits;
};
struct bfloat16x4_t {
  uint16x4_t bits;
};
struct bfloat16x8_t {
  uint32x4_t pairs;
};
struct uint16x4x2_t {
  uint16x4_t val[2];
};

template <class To, class From>
LF_INLINE To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "another size");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
template <class V, class T>
LF_INLINE V read_vector(const T* p) {
  V x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
// f(lane) in each lane.
template <class V, class F>
LF_INLINE V by_lane(const F& f) {
  V x;
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(x[0])); ++i) x[i] = f(i);
  return x;
}

LF_INLINE float32x4_t vaddq_f32(float32x4_t a, float32x4_t b) { return a + b; }
LF_INLINE float32x4_t vsubq_f32(float32x4_t a, float32x4_t b) { return a - b; }
LF_INLINE float32x4_t vmulq_f32(float32x4_t a, float32x4_t b) { return a * b; }
LF_INLINE float32x4_t vdivq_f32(float32x4_t a, float32x4_t b) { return a / b; }
LF_INLINE float32x4_t vfmaq_f32(float32x4_t c, float32x4_t a, float32x4_t b) {
  return by_lane<float32x4_t>([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
LF_INLINE float32x4_t vrndnq_f32(float32x4_t a) {
  return by_lane<float32x4_t>([&](int i) { return std::nearbyint(a[i]); });
}
LF_INLINE float vaddvq_f32(float32x4_t a) { return (a[0] + a[1]) + (a[2] + a[3]); }
LF_INLINE uint32x4_t vcgtq_f32(float32x4_t a, float32x4_t b) { return same_bits<uint32x4_t>(a > b); }
LF_INLINE uint32x4_t vcltq_f32(float32x4_t a, float32x4_t b) { return same_bits<uint32x4_t>(a < b); }
LF_INLINE uint32x4_t vceqq_f32(float32x4_t a, float32x4_t b) { return same_bits<uint32x4_t>(a == b); }

LF_INLINE uint32x4_t vaddq_u32(uint32x4_t a, uint32x4_t b) { return a + b; }
LF_INLINE int32x4_t vaddq_s32(int32x4_t a, int32x4_t b) { return a + b; }
LF_INLINE uint32x4_t vandq_u32(uint32x4_t a, uint32x4_t b) { return a & b; }
LF_INLINE uint32x4_t veorq_u32(uint32x4_t a, uint32x4_t b) { return a ^ b; }
LF_INLINE uint16x4_t vorr_u16(uint16x4_t a, uint16x4_t b) { return a | b; }
LF_INLINE uint16x4_t vbsl_u16(uint16x4_t mask, uint16x4_t a, uint16x4_t b) { return (mask & a) | (~mask & b); }
LF_INLINE float32x4_t vbslq_f32(uint32x4_t mask, float32x4_t a, float32x4_t b) {
  return same_bits<float32x4_t>((mask & same_bits<uint32x4_t>(a)) | (~mask & same_bits<uint32x4_t>(b)));
}
LF_INLINE int32x4_t vshlq_n_s32(int32x4_t a, int n) { return same_bits<int32x4_t>(same_bits<uint32x4_t>(a) << n); }
LF_INLINE uint32x4_t vshrq_n_u32(uint32x4_t a, int n) { return a >> n; }
LF_INLINE uint32x4_t vshll_n_u16(uint16x4_t a, int n) {
  return by_lane<uint32x4_t>([&](int i) { return static_cast<uint32_t>(a[i]) << n; });
}
LF_INLINE uint16x4_t vmovn_u32(uint32x4_t a) {
  return by_lane<uint16x4_t>([&](int i) { return static_cast<uint16_t>(a[i]); });
}
LF_INLINE uint16x4_t vshrn_n_u32(uint32x4_t a, int n) { return vmovn_u32(a >> n); }

LF_INLINE float32x4_t vdupq_n_f32(float x) { return float32x4_t{x, x, x, x}; }
LF_INLINE int32x4_t vdupq_n_s32(int32_t x) { return int32x4_t{x, x, x, x}; }
LF_INLINE uint16x4_t vdup_n_u16(uint16_t x) { return uint16x4_t{x, x, x, x}; }
LF_INLINE uint32x4_t vdupq_n_u32(uint32_t x) { return uint32x4_t{x, x, x, x}; }
LF_INLINE uint64x2_t vdupq_n_u64(uint64_t x) { return uint64x2_t{x, x}; }
LF_INLINE float vgetq_lane_f32(float32x4_t a, int i) { return a[i]; }
LF_INLINE float32x4_t vextq_f32(float32x4_t a, float32x4_t b, int n) {
  return by_lane<float32x4_t>([&](int i) { return i + n < 4 ? a[i + n] : b[i + n - 4]; });
}
LF_INLINE float32x4_t vrev64q_f32(float32x4_t a) { return float32x4_t{a[1], a[0], a[3], a[2]}; }
LF_INLINE float32x2_t vzip1_f32(float32x2_t a, float32x2_t b) { return float32x2_t{a[0], b[0]}; }
LF_INLINE float32x2_t vzip2_f32(float32x2_t a, float32x2_t b) { return float32x2_t{a[1], b[1]}; }
LF_INLINE float32x4_t vcombine_f32(float32x2_t low, float32x2_t high) {
  return float32x4_t{low[0], low[1], high[0], high[1]};
}

LF_INLINE uint32x4_t vreinterpretq_u32_f32(float32x4_t a) { return same_bits<uint32x4_t>(a); }
LF_INLINE uint32x4_t vreinterpretq_u32_u64(uint64x2_t a) { return same_bits<uint32x4_t>(a); }
LF_INLINE float32x4_t vreinterpretq_f32_u32(uint32x4_t a) { return same_bits<float32x4_t>(a); }
LF_INLINE float32x4_t vreinterpretq_f32_s32(int32x4_t a) { return same_bits<float32x4_t>(a); }
LF_INLINE uint16x4_t vreinterpret_u16_f16(float16x4_t a) { return a.bits; }
LF_INLINE float16x4_t vreinterpret_f16_u16(uint16x4_t a) { return {a}; }
LF_INLINE uint16x4_t vreinterpret_u16_bf16(bfloat16x4_t a) { return a.bits; }
LF_INLINE bfloat16x4_t vreinterpret_bf16_u32(uint32x2_t a) { return {same_bits<uint16x4_t>(a)}; }
LF_INLINE bfloat16x8_t vreinterpretq_bf16_u32(uint32x4_t a) { return {a}; }

LF_INLINE int32x4_t vcvtq_s32_f32(float32x4_t a) {
  return by_lane<int32x4_t>([&](int i) { return static_cast<int32_t>(a[i]); });
}
LF_INLINE float32x4_t vcvt_f32_f16(float16x4_t a) {
  return by_lane<float32x4_t>([&](int i) { return to_float(f16{a.bits[i]}); });
}
LF_INLINE float16x4_t vcvt_f16_f32(float32x4_t a) {
  return {by_lane<uint16x4_t>([&](int i) { return from_float<f16>(a[i]).bits; })};
}
LF_INLINE bfloat16x4_t vcvt_bf16_f32(float32x4_t a) {
  return {by_lane<uint16x4_t>([&](int i) { return from_float<bf16>(a[i]).bits; })};
}

LF_INLINE float32x2_t vld1_f32(const float* p) { return read_vector<float32x2_t>(p); }
LF_INLINE float32x4_t vld1q_f32(const float* p) { return read_vector<float32x4_t>(p); }
LF_INLINE uint16x4_t vld1_u16(const uint16_t* p) { return read_vector<uint16x4_t>(p); }
LF_INLINE uint32x4_t vld1q_u32(const uint32_t* p) { return read_vector<uint32x4_t>(p); }
LF_INLINE void vst1q_f32(float* p, float32x4_t a) { std::memcpy(p, &a, sizeof(a)); }
LF_INLINE void vst1_u16(uint16_t* p, uint16x4_t a) { std::memcpy(p, &a, sizeof(a)); }
LF_INLINE void vst2_u16(uint16_t* p, uint16x4x2_t a) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) p[2 * i + j] = a.val[j][i];
}

// a + b rounded to odd: toward zero, and the last bit is set where that was inexact.
inline float add_to_odd(double a, double b) {
  const double sum = a + b, part = sum - a, lost = (a - (sum - part)) + (b - part);
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  auto rounded = static_cast<float>(sum);
  const double above = (static_cast<double>(rounded) - sum) - lost;  // rounded - (a + b)
  if (above == 0.0 || !std::isfinite(rounded)) return rounded;
  if ((above > 0.0) == (rounded > 0.0)) rounded = std::nextafterf(rounded, 0.0F);
  return same_bits<float>(same_bits<uint32_t>(rounded) | 1U);
}
// Both products, their sum, and that added to c, each rounded to odd; subnormal numbers count as zero.
inline float dot_of_pairs(float c, uint32_t a, uint32_t b) {
  const auto number = [](uint32_t bits) {
    return (bits & 0x7f800000U) == 0 ? 0.0 : static_cast<double>(same_bits<float>(bits));
  };
  const double first = number(a << 16) * number(b << 16);
  const double second = number(a & 0xffff0000U) * number(b & 0xffff0000U);
  return add_to_odd(c, add_to_odd(first, second));
}
LF_INLINE float32x4_t vbfdotq_f32(float32x4_t c, bfloat16x8_t a, bfloat16x8_t b) {
  return by_lane<float32x4_t>([&](int i) { return dot_of_pairs(c[i], a.pairs[i], b.pairs[i]); });
}
LF_INLINE float32x4_t vbfdotq_lane_f32(float32x4_t c, bfloat16x8_t a, bfloat16x4_t b, int lane) {
  const uint32_t pair = same_bits<uint32x2_t>(b.bits)[lane];
  return by_lane<float32x4_t>([&](int i) { return dot_of_pairs(c[i], a.pairs[i], pair); });
}

}  // namespace llama_fast::cpu
