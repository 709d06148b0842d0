// The matrix registers of Intel's server processors (AMX), products of blocks on them, and a 2^x as exact as bfloat16
// needs. No include guard: see simd.h.
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

#if LF_SOFTWARE_TILES
// The same in vectors, for the sanitizers, which do not see what instructions in assembly read and write, and for
// processors without these registers.
struct Tile {
  float rows[16][16];
};
inline Tile* tile(int t) {
  static thread_local Tile tiles[8];
  return &tiles[t];
}
LF_INLINE void multiply_tiles(Tile* c, const Tile* a, const Tile* b) {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k) {
      const auto pair = _mm512_castps_si512(_mm512_set1_ps(a->rows[m][k]));
      const auto pairs = _mm512_castps_si512(_mm512_loadu_ps(b->rows[k]));
      _mm512_storeu_ps(c->rows[m], _mm512_dpbf16_ps(_mm512_loadu_ps(c->rows[m]), (__m512bh)pair, (__m512bh)pairs));
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
// c += a b, sums along pairs of bfloat16; subnormal numbers count as zero
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

// sum = left right over `count` blocks of terms each, or sum += left right with kAdd. Two left and two right tiles make
// four sums, so that each product of tiles needs one load.
template <bool kAdd>
LF_INLINE void multiply_blocks(const bf16* left, const bf16* right, int64_t count, float* sum) {
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
  for (int64_t k = 0; k < count; ++k, left += kBlock, right += kBlock) {
    LF_TILE_LOAD(4, left);
    LF_TILE_LOAD(5, left + kTileElements);
    LF_TILE_LOAD(6, right);
    LF_TILE_LOAD(7, right + kTileElements);
    LF_TILE_MULTIPLY(0, 4, 6);
    LF_TILE_MULTIPLY(1, 4, 7);
    LF_TILE_MULTIPLY(2, 5, 6);
    LF_TILE_MULTIPLY(3, 5, 7);
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

// a > b per lane, and whether that is so in any.
LF_INLINE VecF select_greater(VecF a, VecF b, VecF x, VecF y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v);
}

// p[0, 16) and p[16, 32) = a and b as bfloat16.
LF_INLINE void store_side(bf16* p, VecF a, VecF b) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v)); }

}  // namespace llama_fast::cpu::LF_ISA
