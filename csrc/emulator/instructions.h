// The instructions of csrc/cuda/ptx.cuh, executed by the calling thread of an emulated block.
#pragma once

#include <cstdint>

#include "pointer.h"
#include "semantics.h"

namespace llama_fast::emulator {

void mma_m16n8k16(Half type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]);
void ldmatrix(int count, bool transposed, uint32_t* r, uint32_t address);
void stmatrix(int count, bool transposed, uint32_t address, const uint32_t* r);

// 16 bytes, of which the first `source_bytes` are read and the rest are 0; readable in shared memory once waited for.
void cp_async_16(uint32_t destination, GlobalAddress source, uint32_t source_bytes);
void cp_async_commit_group();
void cp_async_wait_group(int pending);

uint32_t cvt_f16x2(Half type, float high, float low);

}  // namespace llama_fast::emulator
