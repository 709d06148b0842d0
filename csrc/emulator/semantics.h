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

// mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}: d = a b + d. a[lane][4], b[lane][2], d[lane][4].
void mma_m16n8k16(Half type, const uint32_t* const a[32], const uint32_t* const b[32], float* const d[32]);

// ldmatrix.m8n8.x<count>: row i of matrix m is 8 halves at rows[8 m + i]; r[lane][count].
void ldmatrix(int count, bool transposed, const uint16_t* const rows[32], uint32_t* const r[32]);
// stmatrix.m8n8.x<count>: the inverse.
void stmatrix(int count, bool transposed, uint16_t* const rows[32], const uint32_t* const r[32]);

}  // namespace llama_fast::emulator
