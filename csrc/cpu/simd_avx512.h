// VecF for AVX-512 (F, BW, DQ, VL): sixteen lanes; LF_NATIVE_BF16 is 1 where the bfloat16 instructions may be used.
// No include guard: see simd.h.

namespace llama_fast::cpu::LF_ISA {

struct VecF {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  static constexpr bool kFuses = true;
  __m512 v;

  VecF() = default;
  LF_INLINE VecF(__m512 raw) : v(raw) {}
  LF_INLINE VecF(float x) : v(_mm512_set1_ps(x)) {}
};

LF_INLINE VecF operator+(VecF a, VecF b) { return _mm512_add_ps(a.v, b.v); }
LF_INLINE VecF operator-(VecF a, VecF b) { return _mm512_sub_ps(a.v, b.v); }
LF_INLINE VecF operator*(VecF a, VecF b) { return _mm512_mul_ps(a.v, b.v); }
LF_INLINE VecF operator/(VecF a, VecF b) { return _mm512_div_ps(a.v, b.v); }
LF_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
LF_INLINE VecF max(VecF a, VecF b) { return _mm512_max_ps(a.v, b.v); }
LF_INLINE VecF min(VecF a, VecF b) { return _mm512_min_ps(a.v, b.v); }
LF_INLINE float sum(VecF a) { return _mm512_reduce_add_ps(a.v); }
LF_INLINE float max(VecF a) { return _mm512_reduce_max_ps(a.v); }

// The lowest n lanes, 0 <= n <= 16.
LF_INLINE __mmask16 lanes(int64_t n) { return static_cast<__mmask16>((1U << n) - 1U); }

LF_INLINE __m256i bf16_bits(VecF a) {
#if LF_NATIVE_BF16
  return (__m256i)_mm512_cvtneps_pbh(a.v);  // flushes subnormals to zero
#else
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), rounded, quiet));
#endif
}
LF_INLINE __m512 from_bf16_bits(__m256i u) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16));
}

LF_INLINE VecF load(const float* p) { return _mm512_loadu_ps(p); }
LF_INLINE VecF load(const bf16* p) { return from_bf16_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
LF_INLINE VecF load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
LF_INLINE VecF load_n(const float* p, int64_t n, float fill = 0.0F) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), lanes(n), p);
}
LF_INLINE VecF load_n(const bf16* p, int64_t n, float fill = 0.0F) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(fill), lanes(n), from_bf16_bits(_mm256_maskz_loadu_epi16(lanes(n), p)));
}
LF_INLINE VecF load_n(const f16* p, int64_t n, float fill = 0.0F) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(fill), lanes(n), _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p)));
}

LF_INLINE void store(float* p, VecF a) { _mm512_storeu_ps(p, a.v); }
LF_INLINE void store(bf16* p, VecF a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bf16_bits(a)); }
LF_INLINE void store(f16* p, VecF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
LF_INLINE void store_n(float* p, VecF a, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), a.v); }
LF_INLINE void store_n(bf16* p, VecF a, int64_t n) { _mm256_mask_storeu_epi16(p, lanes(n), bf16_bits(a)); }
LF_INLINE void store_n(f16* p, VecF a, int64_t n) {
  _mm256_mask_storeu_epi16(p, lanes(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
LF_INLINE void stream(float* p, VecF a) { _mm512_stream_ps(p, a.v); }
LF_INLINE void stream(bf16* p, VecF a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bf16_bits(a)); }
LF_INLINE void stream(f16* p, VecF a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
LF_INLINE void stream_fence() { _mm_sfence(); }

LF_INLINE VecF rounded(VecF a, float) { return a; }
LF_INLINE VecF rounded(VecF a, bf16) { return from_bf16_bits(bf16_bits(a)); }
LF_INLINE VecF rounded(VecF a, f16) { return _mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT)); }

LF_INLINE VecF load_twice(const float* p) {
  const __m512i pairs = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return _mm512_permutexvar_ps(pairs, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}
LF_INLINE VecF rotate_pairs(VecF x, VecF c, VecF s) {
  return _mm512_fmaddsub_ps(x.v, c.v, _mm512_mul_ps(_mm512_permute_ps(x.v, 0xb1), s.v));
}

constexpr bool kScalesByAnyPower = true;
LF_INLINE VecF scale_by_power_of_two(VecF x, VecF n) { return _mm512_scalef_ps(x.v, n.v); }
LF_INLINE VecF round(VecF x) { return _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

#if LF_NATIVE_BF16
struct VecPairs {
  __m512i v;
};
LF_INLINE VecPairs load_units(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
LF_INLINE VecPairs broadcast_unit(const uint32_t* p) { return {_mm512_set1_epi32(static_cast<int>(*p))}; }
// c + a0 b0 + a1 b1 per lane; subnormal bfloat16 count as zero.
LF_INLINE VecF dot(VecPairs a, VecPairs b, VecF c) { return _mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v); }
// p[i] = (even[i], odd[i]), rounded to nearest even.
LF_INLINE void store_pairs(uint32_t* p, VecF even, VecF odd) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, halves));
}
#endif

}  // namespace llama_fast::cpu::LF_ISA
