// What the matrix instructions compute, as plain functions of the 32 lanes' or 128 threads' registers: the tables of
// the PTX ISA, each written down here once. The fibers (instructions.cpp, hopper.cpp) and the PTX interpreter call
// these.
#pragma once

#include <cstdint>

namespace llama_fast::emulator {

enum class Half { bf16, f16 };

float half_to_float(Half type, uint16_t bits);
// Round to nearest even.
uint16_t float_to_half(Half type, float value);

// Where a thread's registers lie in the matrices of mma.m16n8k16 (lanes 0 to 31) and of wgmma (threads 0 to 127, whose
// warps have 16 rows each): of A [M, 16] and B [16, 8] the half `half` of register i, of D [M, N] the float i.
struct Place {
  int row, column;
};
Place fragment_a(int thread, int i, int half);
Place fragment_b(int lane, int i, int half);
Place fragment_d(int thread, int i);

// mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}: d = a b + d. a[lane][4], b[lane][2], d[lane][4].
void mma_m16n8k16(Half type, const uint32_t* const a[32], const uint32_t* const b[32], float* const d[32]);

// ldmatrix.m8n8.x<count>: row i of matrix m is 8 halves at rows[8 m + i]; r[lane][count].
void ldmatrix(int count, bool transposed, const uint16_t* const rows[32], uint32_t* const r[32]);
// stmatrix.m8n8.x<count>: the inverse.
void stmatrix(int count, bool transposed, uint16_t* const rows[32], const uint32_t* const r[32]);

// How 16-byte chunks are permuted within 8 rows of shared memory: by an exclusive or on the address.
enum class Swizzle { none, bytes32, bytes64, bytes128 };
int swizzle_width(Swizzle s);  // 16 for none
uint32_t swizzled(Swizzle s, uint32_t address);

// wgmma's "Matrix descriptor format". Offsets in bytes.
struct MatrixDescriptor {
  uint32_t start, leading, stride, base_offset;
  Swizzle swizzle;
};
MatrixDescriptor decode(uint64_t descriptor);
// Shared address of the 8 halves that begin at element (mn, k): 8 consecutive k, or with `mn_major` 8 consecutive mn.
uint32_t chunk_address(const MatrixDescriptor& d, int mn, int k, bool mn_major);

// c[64, n] += a[64, 16] b[16, n]; where !accumulate, c = a b.
void multiply_64xNx16(int n, bool accumulate, const float* a, const float* b, float* c);

}  // namespace llama_fast::emulator
