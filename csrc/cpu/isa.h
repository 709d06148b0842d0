// The instruction sets that the CPU kernels are compiled for, and which one runs.
#pragma once

#include "../ops.h"

#if defined(__x86_64__)
#define LF_X86 1
#else
#define LF_X86 0
#endif

// Whether simd_amx.h does the work of the matrix registers itself: in a library for the sanitizers.
#if !defined(LF_SOFTWARE_TILES)
#define LF_SOFTWARE_TILES 0
#endif

namespace llama_fast::cpu {

// From least to most capable: a processor that runs one runs all before it. amx is avx512bf16 with the matrix registers
// of Intel's server processors; what has no kernel of its own for it runs avx512bf16's.
enum class Isa : int { portable, avx2, avx512, avx512bf16, amx };

Isa current_isa();

// Calls `fn(...)` in the namespace of the instruction set in use.
#if LF_X86
#define LF_DISPATCH(fn, ...)              \
  switch (current_isa()) {                \
    case Isa::amx:                        \
    case Isa::avx512bf16:                 \
      return avx512bf16::fn(__VA_ARGS__); \
    case Isa::avx512:                     \
      return avx512::fn(__VA_ARGS__);     \
    case Isa::avx2:                       \
      return avx2::fn(__VA_ARGS__);       \
    case Isa::portable:                   \
      return portable::fn(__VA_ARGS__);   \
  }
#else
#define LF_DISPATCH(fn, ...) return portable::fn(__VA_ARGS__)
#endif

}  // namespace llama_fast::cpu
