// The matrix registers of Intel's server processors (AMX), products of blocks on them, what turns blocks around, and a
// 2^x as exact as bfloat16 needs. No include guard: see simd.h.
//
// A float32 number is multiplied as three bfloat16 whose sum it is, 24 bits in eights; of the nine products the three
// smallest, together below 2^-24 of the whole, are left out.
//
// A block is 32 x 32: of bfloat16 as a left operand (rows along the sum) or a right one (pairs along the sum across the
// columns), 2 KB in two tiles of 16 rows of 64 bytes; of float32 as a sum, 4 KB in four tiles:
//   left   [2][16 rows][32 terms]               row m, term k:     tile m / 16, [m % 16][k]
//   right  [2][16 pairs of terms][16 columns]   term k, column n:  tile n / 16, [k / 2][n % 16], k % 2 in the pair
//   sum    [2][2][16 rows][16 columns]          row m, column n:   tile m / 16, n / 16, [m % 16][n % 16]
// Tiles without gaps: rows that lie apart would meet in few sets of the first cache.

namespace llama_fast::cpu::LF_ISA {

constexpr int64_t kSide = 32;                  // rows and columns of a block
constexpr int64_t kBlock = kSide * kSide;      // elements of a block
constexpr int64_t kTileElements = kBlock / 2;  // of bfloat16
constexpr int64_t kSumTile = kBlock / 4;       // of float32

// Of how many bfloat16 a T is the sum.
template <class T>
constexpr int kParts = 1;
template <>
inline constexpr int kParts<float> = 3;

#if LF_SOFTWARE
// The same in vectors, for the sanitizers, which do not see what instructions in assembly read and write, and for
// processors without these registers.
struct Tile {
  float rows[16][16];
};
inline Tile* tile(int t) {
  static thread_local Tile tiles[8];
  return &tiles[t];
}
// The first numbers of all pairs, and the second ones, are summed for themselves, by fused multiply-adds.
LF_INLINE void multiply_tiles(Tile* c, const Tile* a, const Tile* b) {
  const auto second = [](__m512 pairs) { return _mm512_and_ps(pairs, _mm512_castsi512_ps(_mm512_set1_epi32(-65536))); };
  const auto first = [](__m512 pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
  };
  for (int m = 0; m < 16; ++m) {
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int k = 0; k < 16; ++k) {
      const __m512 pair = _mm512_set1_ps(a->rows[m][k]), pairs = _mm512_loadu_ps(b->rows[k]);
      sums[0] = _mm512_fmadd_ps(first(pair), first(pairs), sums[0]);
      sums[1] = _mm512_fmadd_ps(second(pair), second(pairs), sums[1]);
    }
    _mm512_storeu_ps(c->rows[m], _mm512_add_ps(_mm512_loadu_ps(c->rows[m]), _mm512_add_ps(sums[0], sums[1])));
  }
}
#define LF_TILE_ZERO(t) std::memset(tile(t), 0, sizeof(Tile))
#define LF_TILE_LOAD(t, p) std::memcpy(tile(t), p, sizeof(Tile))
#define LF_TILE_STORE(t, p) std::memcpy(p, tile(t), sizeof(Tile))
#define LF_TILE_MULTIPLY(c, a, b) multiply_tiles(tile(c), tile(a), tile(b))
#define LF_TILE_CONFIGURE(config) static_cast<void>(config)
#define LF_TILE_RELEASE() static_cast<void>(0)
#else
#define LF_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t::: "memory")
#define LF_TILE_LOAD(t, p) asm volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"(p), "r"(int64_t{64}) : "memory")
#define LF_TILE_STORE(t, p) asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"(int64_t{64}) : "memory")
// c += a b, sums along pairs of bfloat16, of 16 terms each before they are added to c; subnormal numbers count as zero
#define LF_TILE_MULTIPLY(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::: "memory")
#define LF_TILE_CONFIGURE(config) asm volatile("ldtilecfg %0" ::"m"(config))
#define LF_TILE_RELEASE() asm volatile("tilerelease")
#endif

// While it lives this thread has eight tiles of 16 rows of 64 bytes, and results below 2^-126 are 0, as in the
// products.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    LF_TILE_CONFIGURE(config);
  }
  ~Tiles() { LF_TILE_RELEASE(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  FlushSubnormals flush_;
};

// The tiles 0 to 3 += left right, for the left operand in tiles 4 and 5 and the right one in 6 and 7.
LF_INLINE void multiply_loaded() {
  LF_TILE_MULTIPLY(0, 4, 6);
  LF_TILE_MULTIPLY(1, 4, 7);
  LF_TILE_MULTIPLY(2, 5, 6);
  LF_TILE_MULTIPLY(3, 5, 7);
}
LF_INLINE void load_left(const bf16* block) {
  LF_TILE_LOAD(4, block);
  LF_TILE_LOAD(5, block + kTileElements);
}
LF_INLINE void load_right(const bf16* block) {
  LF_TILE_LOAD(6, block);
  LF_TILE_LOAD(7, block + kTileElements);
}

// Blocks of numbers in kN parts: part p of the first block is at `data` + p `part`.
template <int kN>
struct Parts {
  const bf16* data;
  int64_t part;

  LF_INLINE Parts operator+(int64_t n) const { return {data + n, part}; }
  LF_INLINE const bf16* operator[](int p) const { return data + p * part; }
};

// Asks for `bytes` from p on in the second cache.
LF_INLINE void fetch_ahead(const void* p, int64_t bytes) {
#pragma GCC unroll 1
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T1);
}

// sum = left right over `count` blocks of terms each, or sum += left right with kAdd. Two left and two right tiles make
// four sums, so that each product of tiles needs one load, and of numbers in three parts
// 14 for 24.
template <bool kAdd, int kN>
LF_INLINE void multiply_blocks(Parts<kN> left, Parts<kN> right, int64_t count, float* sum) {
  if constexpr (kAdd) {
    LF_TILE_LOAD(0, sum);
    LF_TILE_LOAD(1, sum + kSumTile);
    LF_TILE_LOAD(2, sum + 2 * kSumTile);
    LF_TILE_LOAD(3, sum + 3 * kSumTile);
  } else {
    LF_TILE_ZERO(0);
    LF_TILE_ZERO(1);
    LF_TILE_ZERO(2);
    LF_TILE_ZERO(3);
  }
#pragma GCC unroll 1
  for (int64_t k = 0; k < count; ++k, left = left + kBlock, right = right + kBlock) {
    if constexpr (kN == 3) {  // one operand stays each time, and the largest product comes last
      load_left(left[2]);
      load_right(right[0]);
      multiply_loaded();
      load_left(left[1]);
      multiply_loaded();
      load_right(right[1]);
      multiply_loaded();
      load_left(left[0]);
      multiply_loaded();
      load_right(right[2]);
      multiply_loaded();
      load_right(right[0]);
      multiply_loaded();
    } else {
      load_left(left[0]);
      load_right(right[0]);
      multiply_loaded();
    }
  }
  LF_TILE_STORE(0, sum);
  LF_TILE_STORE(1, sum + kSumTile);
  LF_TILE_STORE(2, sum + 2 * kSumTile);
  LF_TILE_STORE(3, sum + 3 * kSumTile);
}

#undef LF_TILE_ZERO
#undef LF_TILE_LOAD
#undef LF_TILE_STORE
#undef LF_TILE_MULTIPLY
#undef LF_TILE_CONFIGURE
#undef LF_TILE_RELEASE

// 2^x within 2.7e-6 of its value, NaN for NaN; 0 below 2^-126 while Tiles live. 2^(n + f) with
// n = floor(x) and a polynomial in f of the least relative error: half the instructions of exp2_flush.
LF_INLINE VecF exp2_for_half(VecF x) {
  const VecF f = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  VecF p = fma(VecF(0.013534153811633587F), f, VecF(0.05201148986816406F));
  p = fma(p, f, VecF(0.2414427399635315F));
  p = fma(p, f, VecF(0.6930038332939148F));
  p = fma(p, f, VecF(1.0000026226043701F));
  return _mm512_scalef_ps(p.v, x.v);
}

// 2^x as exact as the weights of attention in T need it.
template <class T>
LF_INLINE VecF exp2_for(VecF x) {
  if constexpr (kParts<T> == 1)
    return exp2_for_half(x);
  else
    return exp2_flush(x);
}

// x where a > b, else y, per lane.
LF_INLINE VecF select_greater(VecF a, VecF b, VecF x, VecF y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v);
}

// The next part of x: in the upper half of each lane, x rounded to bfloat16; and x becomes what is left of it. A number
// that rounds to infinity leaves NaN; operands are checked for it (Largest), weights and their gradients are
// then lost anyway.
LF_INLINE __m512i take_part(VecF& x) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x8000));
  x = x - VecF(_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-65536))));
  return bits;
}

// p[0, 16) = the next part of x.
LF_INLINE void store_part(bf16* p, VecF& x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(take_part(x), 16)));
}

// The largest magnitude of what was packed, as the bits of a float: where it is 2^127 or more, infinite or NaN, the
// parts do not add up to the numbers.
struct Largest {
  __m512i bits;

  LF_INLINE Largest() : bits(_mm512_setzero_si512()) {}
  LF_INLINE void see(VecF x) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff));
    bits = _mm512_max_epi32(bits, magnitude);
  }
  LF_INLINE bool fits() const { return _mm512_reduce_max_epi32(bits) < 0x7f000000; }
};

LF_INLINE VecPairs load_pairs(const bf16* p) { return {_mm512_loadu_si512(p)}; }
LF_INLINE void store_pairs(bf16* p, VecPairs a) { _mm512_storeu_si512(p, a.v); }
LF_INLINE VecF as_floats(VecPairs a) { return _mm512_castsi512_ps(a.v); }

// The numbers first, first + 2, ... of a and then of b.
template <int kFirst>
LF_INLINE VecPairs unzip(VecPairs a, VecPairs b) {
  const __m512i firsts = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                                          24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return {_mm512_permutex2var_epi16(a.v, _mm512_add_epi16(firsts, _mm512_set1_epi16(kFirst)), b.v)};
}

// Pairs (a[i], b[i]) for i in [16 half, 16 half + 16).
template <int kHalf>
LF_INLINE VecPairs zip(VecPairs a, VecPairs b) {
  const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return {_mm512_permutex2var_epi16(a.v, _mm512_add_epi16(lower, _mm512_set1_epi16(16 * kHalf)), b.v)};
}

// p[0, 16) and p[16, 32) = a and b as bfloat16; of kN parts the others at p + part, p + 2 part.
template <int kN>
LF_INLINE void store_side(bf16* p, int64_t part, VecF a, VecF b) {
  if constexpr (kN == 1) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
  } else {
    const __m512i upper_halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31,
                                                  29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
#pragma GCC unroll 3
    for (int i = 0; i < kN; ++i, p += part) {
      const __m512i first = take_part(a), second = take_part(b);
      _mm512_storeu_si512(p, _mm512_permutex2var_epi16(first, upper_halves, second));
    }
  }
}

// p[i] = (even[i], odd[i]); of kN parts the others at p + part, p + 2 part.
template <int kN>
LF_INLINE void store_pairs(uint32_t* p, int64_t part, VecF even, VecF odd) {
  if constexpr (kN == 1) {
    store_pairs(p, even, odd);
  } else {
#pragma GCC unroll 3
    for (int i = 0; i < kN; ++i, p += part) {
      const __m512i low = _mm512_srli_epi32(take_part(even), 16), high = take_part(odd);
      _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, low, high));
    }
  }
}

// store(c, column) for the columns of 16 rows of 16 units of four bytes, which begin `at` bytes into each row.
template <class Store>
LF_INLINE void transpose_16x16(const void* const (&rows)[16], int64_t at, const Store& store) {
#pragma GCC unroll 4
  for (int c = 0; c < 16; c += 4, at += 16) {
    const auto quad = [&](int r) { return _mm_loadu_si128((const __m128i*)((const char*)rows[r] + at)); };
    __m512i a[4];  // of four columns: rows i, i + 4, i + 8, i + 12
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      a[i] = _mm512_castsi128_si512(quad(i));
      a[i] = _mm512_inserti32x4(a[i], quad(i + 4), 1);
      a[i] = _mm512_inserti32x4(a[i], quad(i + 8), 2);
      a[i] = _mm512_inserti32x4(a[i], quad(i + 12), 3);
    }
    const __m512i b0 = _mm512_unpacklo_epi32(a[0], a[1]), b1 = _mm512_unpacklo_epi32(a[2], a[3]);
    const __m512i b2 = _mm512_unpackhi_epi32(a[0], a[1]), b3 = _mm512_unpackhi_epi32(a[2], a[3]);
    store(c, VecPairs{_mm512_unpacklo_epi64(b0, b1)});
    store(c + 1, VecPairs{_mm512_unpackhi_epi64(b0, b1)});
    store(c + 2, VecPairs{_mm512_unpacklo_epi64(b2, b3)});
    store(c + 3, VecPairs{_mm512_unpackhi_epi64(b2, b3)});
  }
}

}  // namespace llama_fast::cpu::LF_ISA
