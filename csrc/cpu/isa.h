// The instruction sets that the CPU kernels are compiled for, and which one runs.
#pragma once

#include "../ops.h"

// Whether instructions that the processor may lack are done in C++, Intel's matrix registers (simd_amx.h) and ARM's
// vectors (simd_neon_software.h): in a library for the sanitizers, which do not see what assembly reads and writes.
#if !defined(LF_SOFTWARE)
#define LF_SOFTWARE 0
#endif

#if defined(__x86_64__)
#define LF_X86 1
#else
#define LF_X86 0
#endif
#if defined(__aarch64__)
#define LF_NEON 1
#define LF_SOFTWARE_NEON 0
#else
#define LF_NEON LF_SOFTWARE
#define LF_SOFTWARE_NEON LF_SOFTWARE
#endif
// Before version 16 (Apple's 15) clang has the intrinsics of bfloat16 only in files that are compiled for them alone.
#if !LF_NEON
#define LF_NEON_BF16 0
#elif LF_SOFTWARE_NEON || !defined(__clang__)
#define LF_NEON_BF16 1
#elif defined(__apple_build_version__)
#define LF_NEON_BF16 (__clang_major__ >= 15)
#else
#define LF_NEON_BF16 (__clang_major__ >= 16)
#endif

namespace llama_fast::cpu {

// From least to most capable: a processor that runs one runs all before it.
enum class Isa : int {
  portable,
#if LF_NEON
  neon,  // every ARM64 processor
#endif
#if LF_NEON_BF16
  neonbf16,  // with its dot products of bfloat16
#endif
#if LF_X86
  avx2,
  avx512,
  avx512bf16,
  amx,  // avx512bf16 with the matrix registers of Intel's servers; what has no kernel of its own runs avx512bf16's
#endif
};

Isa current_isa();

// Calls `fn(...)` in the namespace of the instruction set in use.
#if LF_X86
#define LF_X86_CASES(fn, ...)           \
  case Isa::amx:                        \
  case Isa::avx512bf16:                 \
    return avx512bf16::fn(__VA_ARGS__); \
  case Isa::avx512:                     \
    return avx512::fn(__VA_ARGS__);     \
  case Isa::avx2:                       \
    return avx2::fn(__VA_ARGS__);
#else
#define LF_X86_CASES(fn, ...)
#endif
#if LF_NEON
#define LF_NEON_CASES(fn, ...) \
  case Isa::neon:              \
    return neon::fn(__VA_ARGS__);
#else
#define LF_NEON_CASES(fn, ...)
#endif
#if LF_NEON_BF16
#define LF_NEON_BF16_CASES(fn, ...) \
  case Isa::neonbf16:               \
    return neonbf16::fn(__VA_ARGS__);
#else
#define LF_NEON_BF16_CASES(fn, ...)
#endif
#define LF_DISPATCH(fn, ...)            \
  switch (current_isa()) {              \
    LF_X86_CASES(fn, __VA_ARGS__)       \
    LF_NEON_BF16_CASES(fn, __VA_ARGS__) \
    LF_NEON_CASES(fn, __VA_ARGS__)      \
    case Isa::portable:                 \
      return portable::fn(__VA_ARGS__); \
  }

}  // namespace llama_fast::cpu
