#include "semantics.h"

#include <cstring>

// Compiled for several instruction sets; the loader takes the best that the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define LLAMA_FAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LLAMA_FAST_CLONES
#endif

namespace llama_fast::emulator {
namespace {

uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// The 8x8 matrix of halves that a warp holds with two in each lane: lane l has row l/4, columns 2 (l%4) and the next.
constexpr Place place(int lane, int half) { return {lane / 4, 2 * (lane % 4) + half}; }

uint16_t half_of(uint32_t packed, int half) { return static_cast<uint16_t>(packed >> (16 * half)); }

}  // namespace

float half_to_float(Half type, uint16_t h) {
  if (type == Half::bf16) return float_of(static_cast<uint32_t>(h) << 16);
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3FF;
  if (exponent == 31) return float_of(sign | 0x7F800000 | mantissa << 13);
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign != 0 ? -subnormal : subnormal;
}

uint16_t float_to_half(Half type, float x) {
  const uint32_t u = bits_of(x);
  if (x != x) return type == Half::bf16 ? 0x7FFF : 0x7FFF;
  if (type == Half::bf16) return static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  const uint32_t magnitude = u & 0x7FFFFFFF;
  if (magnitude >= bits_of(65520.0f)) return sign | 0x7C00;
  if (magnitude < bits_of(0x1p-14f)) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return sign | static_cast<uint16_t>(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112u << 10));
}

Place fragment_a(int thread, int i, int half) {
  const Place p = place(thread % 32, half);
  return {16 * (thread / 32) + p.row + 8 * (i & 1), p.column + 8 * (i >> 1)};
}

Place fragment_b(int lane, int i, int half) {
  const Place p = place(lane, half);
  return {p.column + 8 * i, p.row};
}

Place fragment_d(int thread, int i) {
  const Place p = place(thread % 32, i & 1);
  return {16 * (thread / 32) + p.row + 8 * (i >> 1 & 1), 8 * (i >> 2) + p.column};
}

void mma_m16n8k16(Half type, const uint32_t* const a[32], const uint32_t* const b[32], float* const d[32]) {
  float A[16][16], B[16][8], D[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        const auto [row, column] = fragment_a(lane, i, half);
        A[row][column] = half_to_float(type, half_of(a[lane][i], half));
      }
      for (int i = 0; i < 2; ++i) {
        const auto [row, column] = fragment_b(lane, i, half);
        B[row][column] = half_to_float(type, half_of(b[lane][i], half));
      }
    }
    for (int i = 0; i < 4; ++i) {
      const auto [row, column] = fragment_d(lane, i);
      D[row][column] = d[lane][i];
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const auto [row, column] = fragment_d(lane, i);
      d[lane][i] = D[row][column];
    }
}

void ldmatrix(int count, bool transposed, const uint16_t* const rows[32], uint32_t* const r[32]) {
  for (int m = 0; m < count; ++m)
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t packed = 0;
      for (int half = 0; half < 2; ++half) {
        const auto [row, column] = place(lane, half);
        const uint16_t h = transposed ? rows[8 * m + column][row] : rows[8 * m + row][column];
        packed |= static_cast<uint32_t>(h) << (16 * half);
      }
      r[lane][m] = packed;
    }
}

void stmatrix(int count, bool transposed, uint16_t* const rows[32], const uint32_t* const r[32]) {
  for (int m = 0; m < count; ++m)
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half) {
        const auto [row, column] = place(lane, half);
        (transposed ? rows[8 * m + column][row] : rows[8 * m + row][column]) = half_of(r[lane][m], half);
      }
}

int swizzle_width(Swizzle s) {
  switch (s) {
    case Swizzle::bytes32:
      return 32;
    case Swizzle::bytes64:
      return 64;
    case Swizzle::bytes128:
      return 128;
    default:
      return 16;
  }
}

uint32_t swizzled(Swizzle s, uint32_t address) {
  const uint32_t chunks = static_cast<uint32_t>(swizzle_width(s)) / 16 - 1;
  return address ^ (address >> 7 & chunks) << 4;
}

MatrixDescriptor decode(uint64_t d) {
  constexpr Swizzle kModes[] = {Swizzle::none, Swizzle::bytes128, Swizzle::bytes64, Swizzle::bytes32};
  const auto field = [d](int shift) { return static_cast<uint32_t>(d >> shift & 0x3FFF) << 4; };
  return {field(0), field(16), field(32), static_cast<uint32_t>(d >> 49 & 7), kModes[d >> 62]};
}

// "Strides" and "Canonical layouts" of "Asynchronous warpgroup level matrix shared memory layout". A row of 8 that is
// contiguous in memory is 16 bytes; w bytes hold a row of the swizzle's atom.
uint32_t chunk_address(const MatrixDescriptor& d, int mn_, int k_, bool mn_major) {
  const uint32_t mn = static_cast<uint32_t>(mn_), k = static_cast<uint32_t>(k_);
  const uint32_t w = static_cast<uint32_t>(swizzle_width(d.swizzle));
  uint32_t offset;
  if (!mn_major && d.swizzle == Swizzle::none)
    offset = mn / 8 * d.stride + mn % 8 * 16 + k / 8 * d.leading;
  else if (!mn_major)
    offset = mn / 8 * d.stride + mn % 8 * w + k * 2;
  else if (d.swizzle == Swizzle::none)
    offset = mn / 8 * d.stride + k / 8 * d.leading + k % 8 * 16;
  else
    offset = mn * 2 / w * d.leading + mn * 2 % w + k / 8 * d.stride + k % 8 * w;
  return swizzled(d.swizzle, d.start + offset);
}

LLAMA_FAST_CLONES void multiply_64xNx16(int n, bool accumulate, const float* a, const float* b, float* c) {
  for (int i = 0; i < 64; ++i) {
    float* row = c + i * n;
    if (!accumulate)
      for (int j = 0; j < n; ++j) row[j] = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const float x = a[i * 16 + k];
      for (int j = 0; j < n; ++j) row[j] += x * b[k * n + j];
    }
  }
}

}  // namespace llama_fast::emulator
