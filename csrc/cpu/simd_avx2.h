// VecF for AVX2 with FMA and F16C: eight lanes. No include guard: see simd.h.

namespace llama_fast::cpu::LF_ISA {

struct VecF {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  static constexpr bool kFuses = true;
  __m256 v;

  VecF() = default;
  LF_INLINE VecF(__m256 raw) : v(raw) {}
  LF_INLINE VecF(float x) : v(_mm256_set1_ps(x)) {}
};

LF_INLINE VecF operator+(VecF a, VecF b) { return _mm256_add_ps(a.v, b.v); }
LF_INLINE VecF operator-(VecF a, VecF b) { return _mm256_sub_ps(a.v, b.v); }
LF_INLINE VecF operator*(VecF a, VecF b) { return _mm256_mul_ps(a.v, b.v); }
LF_INLINE VecF operator/(VecF a, VecF b) { return _mm256_div_ps(a.v, b.v); }
LF_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
LF_INLINE VecF max(VecF a, VecF b) { return _mm256_max_ps(a.v, b.v); }
LF_INLINE VecF min(VecF a, VecF b) { return _mm256_min_ps(a.v, b.v); }
LF_INLINE float sum(VecF a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
LF_INLINE float max(VecF a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

LF_INLINE __m128i bf16_bits(VecF a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}

LF_INLINE VecF load(const float* p) { return _mm256_loadu_ps(p); }
LF_INLINE VecF load(const bf16* p) {
  const __m128i u = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(u), 16));
}
LF_INLINE VecF load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
template <class T>
LF_INLINE VecF load_n(const T* p, int64_t n, float fill = 0.0F) {
  alignas(32) float lanes[8];
  for (int64_t i = 0; i < 8; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return _mm256_load_ps(lanes);
}

LF_INLINE void store(float* p, VecF a) { _mm256_storeu_ps(p, a.v); }
LF_INLINE void store(bf16* p, VecF a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bf16_bits(a)); }
LF_INLINE void store(f16* p, VecF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
template <class T>
LF_INLINE void store_n(T* p, VecF a, int64_t n) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, a.v);
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(lanes[i]);
}
LF_INLINE void stream(float* p, VecF a) { _mm256_stream_ps(p, a.v); }
LF_INLINE void stream(bf16* p, VecF a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), bf16_bits(a)); }
LF_INLINE void stream(f16* p, VecF a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
LF_INLINE void stream_fence() { _mm_sfence(); }

LF_INLINE VecF rounded(VecF a, float) { return a; }
LF_INLINE VecF rounded(VecF a, bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16_bits(a)), 16));
}
LF_INLINE VecF rounded(VecF a, f16) { return _mm256_cvtph_ps(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT)); }

LF_INLINE VecF load_twice(const float* p) {
  const __m256i pairs = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), pairs);
}
LF_INLINE VecF rotate_pairs(VecF x, VecF c, VecF s) {
  return _mm256_fmaddsub_ps(x.v, c.v, _mm256_mul_ps(_mm256_permute_ps(x.v, 0xb1), s.v));
}

constexpr bool kScalesByAnyPower = false;
LF_INLINE VecF scale_by_power_of_two(VecF x, VecF n) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x.v, _mm256_castsi256_ps(bits));
}
LF_INLINE VecF round(VecF x) { return _mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

}  // namespace llama_fast::cpu::LF_ISA
