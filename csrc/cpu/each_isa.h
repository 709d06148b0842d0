// Compiles the file that includes this once more for each instruction set, inside that set's target region.
//
// A kernel file looks like this, and defines its kernels in `namespace llama_fast::cpu::LF_ISA`:
//
//     #ifndef LF_ISA
//     #include ...                              // all headers: std ones must be seen before a target region opens,
//     #define LF_THIS_FILE "cpu/rms_norm.cpp"   // lest their inline functions be compiled for AVX-512
//     #include "each_isa.h"
//     ... entry points that call LF_DISPATCH ...
//     #else
//     namespace llama_fast::cpu::LF_ISA { ... kernels ... }
//     #endif
//
// No include guard: it is meant to be included once by every kernel file.

#define LF_ISA portable
#include LF_THIS_FILE
#undef LF_ISA

#if LF_X86
LF_TARGET_BEGIN(LF_TARGET_AVX2)
#define LF_ISA avx2
#include LF_THIS_FILE
#undef LF_ISA
LF_TARGET_END

LF_TARGET_BEGIN(LF_TARGET_AVX512)
#define LF_ISA avx512
#include LF_THIS_FILE
#undef LF_ISA
LF_TARGET_END

LF_TARGET_BEGIN(LF_TARGET_AVX512BF16)
#define LF_ISA avx512bf16
#include LF_THIS_FILE
#undef LF_ISA
LF_TARGET_END
#endif

#if LF_NEON
#define LF_ISA neon
#include LF_THIS_FILE
#undef LF_ISA
#endif

#if LF_NEON_BF16
LF_TARGET_BEGIN(LF_TARGET_NEONBF16)
#define LF_ISA neonbf16
#include LF_THIS_FILE
#undef LF_ISA
LF_TARGET_END
#endif
