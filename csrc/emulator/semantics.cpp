#include "semantics.h"

#include <cstring>

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
struct Place {
  int row, column;
};
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

void mma_m16n8k16(Half type, const uint32_t* const a[32], const uint32_t* const b[32], float* const d[32]) {
  float A[16][16], B[16][8], D[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int half = 0; half < 2; ++half) {
      const auto [row, column] = place(lane, half);
      for (int i = 0; i < 4; ++i)
        A[row + 8 * (i & 1)][column + 8 * (i >> 1)] = half_to_float(type, half_of(a[lane][i], half));
      for (int i = 0; i < 2; ++i) B[column + 8 * i][row] = half_to_float(type, half_of(b[lane][i], half));
      for (int i = 0; i < 2; ++i) D[row + 8 * i][column] = d[lane][2 * i + half];
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i)
      for (int half = 0; half < 2; ++half) {
        const auto [row, column] = place(lane, half);
        d[lane][2 * i + half] = D[row + 8 * i][column];
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

}  // namespace llama_fast::emulator
