// The vector type of each instruction set: `VecF`, kLanes float32 lanes, with loads and stores of float32, bfloat16 and
// float16. The simd*.h files are the only ones with intrinsics.
//
// Each of the namespaces portable, avx2, avx512, avx512bf16 and amx, on ARM64 portable, neon and neonbf16, has the same
// names; a kernel file is compiled once in each but amx (each_isa.h), and the files named *_amx_* in that. The
// functions carry no `target` attribute of their own but stand in a target region.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../dispatch.h"
#include "isa.h"

#if LF_X86
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LF_INLINE inline __attribute__((always_inline))
#define LF_PRAGMA(x) _Pragma(#x)

#define LF_TARGET_AVX2 "avx2,fma,f16c"
#define LF_TARGET_AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#define LF_TARGET_AVX512BF16 "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"

#if LF_SOFTWARE_NEON
#define LF_TARGET_NEONBF16 "sse2"  // what there is in any case
#else
#define LF_TARGET_NEONBF16 "arch=armv8.2-a+bf16"
#endif

// g++ knows the instructions of the matrix registers as assembly alone, and wants no feature for them
#if defined(__clang__)
#define LF_TARGET_AMX "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"
#else
#define LF_TARGET_AMX LF_TARGET_AVX512BF16
#endif

#if defined(__clang__)
#define LF_TARGET_BEGIN(features) \
  LF_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LF_TARGET_END LF_PRAGMA(clang attribute pop)
#else
#define LF_TARGET_BEGIN(features) LF_PRAGMA(GCC push_options) LF_PRAGMA(GCC target(features))
#define LF_TARGET_END LF_PRAGMA(GCC pop_options)
#endif

namespace llama_fast::cpu {

// In its scope this thread's float32 results below 2^-126, the smallest normal one, are 0. Intel's processors take some
// 150 cycles for an instruction with a smaller one, AMD's hardly any: there nothing changes.
class FlushSubnormals {
 public:
#if LF_X86
  FlushSubnormals() : before_(_mm_getcsr()) {
    if (amd_family() == 0) _mm_setcsr(before_ | kFlushToZero);
  }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000;
  const unsigned before_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
};

// Scalar conversions, to nearest even, as every vector path does them.
LF_INLINE float to_float(float x) { return x; }

LF_INLINE float to_float(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

LF_INLINE float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude < 0x0400) {  // zero and subnormals: magnitude * 2^-24 is exact
    const float f = static_cast<float>(magnitude) * 5.9604644775390625e-08F;
    return sign != 0 ? -f : f;
  }
  const uint32_t u =
      sign | (magnitude >= 0x7c00 ? 0x7f800000 | (magnitude & 0x3ff) << 13 : (magnitude << 13) + 0x38000000);
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

template <class T>
T from_float(float x);

template <>
LF_INLINE float from_float<float>(float x) {
  return x;
}

template <>
LF_INLINE bf16 from_float<bf16>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

template <>
LF_INLINE f16 from_float<f16>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (u >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 2^16 or more
  if (u < 0x38800000) {  // subnormal: adding 0.5 leaves round(|x| 2^24) in the low bits of the sum
    float f;
    std::memcpy(&f, &u, 4);
    f += 0.5F;
    uint32_t s;
    std::memcpy(&s, &f, 4);
    return {static_cast<uint16_t>(sign | (s - 0x3f000000))};
  }
  return {static_cast<uint16_t>(sign | ((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13))};
}

}  // namespace llama_fast::cpu

#if LF_SOFTWARE_NEON
#include "simd_neon_software.h"
#endif

#define LF_ISA portable
#include "simd_portable.h"
#include "simd_math.h"
#include "simd_rows.h"
#include "simd_dot.h"
#undef LF_ISA

#if LF_X86
LF_TARGET_BEGIN(LF_TARGET_AVX2)
#define LF_ISA avx2
#include "simd_avx2.h"
#include "simd_math.h"
#include "simd_rows.h"
#include "simd_dot.h"
#undef LF_ISA
LF_TARGET_END

LF_TARGET_BEGIN(LF_TARGET_AVX512)
#define LF_ISA avx512
#define LF_NATIVE_BF16 0
#include "simd_avx512.h"
#include "simd_math.h"
#include "simd_rows.h"
#include "simd_dot.h"
#undef LF_NATIVE_BF16
#undef LF_ISA
LF_TARGET_END

LF_TARGET_BEGIN(LF_TARGET_AVX512BF16)
#define LF_ISA avx512bf16
#define LF_NATIVE_BF16 1
#include "simd_avx512.h"
#include "simd_math.h"
#include "simd_rows.h"
#include "simd_dot.h"
#undef LF_NATIVE_BF16
#undef LF_ISA
LF_TARGET_END

LF_TARGET_BEGIN(LF_TARGET_AMX)
#define LF_ISA amx
#define LF_NATIVE_BF16 1
#include "simd_avx512.h"
#include "simd_math.h"
#include "simd_rows.h"
#include "simd_dot.h"
#include "simd_amx.h"
#undef LF_NATIVE_BF16
#undef LF_ISA
LF_TARGET_END
#endif

#if LF_NEON
#define LF_ISA neon
#define LF_NATIVE_BF16 0
#include "simd_neon.h"
#include "simd_math.h"
#include "simd_rows.h"
#include "simd_dot.h"
#undef LF_NATIVE_BF16
#undef LF_ISA
#endif

#if LF_NEON_BF16
LF_TARGET_BEGIN(LF_TARGET_NEONBF16)
#define LF_ISA neonbf16
#define LF_NATIVE_BF16 1
#include "simd_neon.h"
#include "simd_math.h"
#include "simd_rows.h"
#include "simd_dot.h"
#undef LF_NATIVE_BF16
#undef LF_ISA
LF_TARGET_END
#endif
