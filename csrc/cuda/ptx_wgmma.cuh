// wgmma: the products of a warpgroup, four consecutive warps of which the first one's number is a multiple of 4;
// sm_90a. ISA: "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions". In the manner of ptx.cuh.
#pragma once

#include "ptx.cuh"

#ifdef LLAMA_FAST_EMULATE
#include "../emulator/hopper.h"
#endif

namespace llama_fast::cuda::ptx {

// "Matrix descriptor format", for the 128-byte swizzle. Rows of 128 bytes, 8 of them an atom of 1024 bytes at a
// multiple of 1024. Operand with k along the row: `stride` is from 8 rows of M or N to the next 8, `leading` is not
// used. Operand with k down the rows (transposed): `stride` is from 8 rows of k to the next 8, `leading` from 64
// columns of M or N to the next 64. Bytes. The next 16 k of a row are at a start address 32 bytes on.
LLAMA_FAST_DEVICE uint64_t matrix_descriptor(uint32_t start, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((start & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

// "wgmma.fence". Before the first wgmma, and before one whose registers (d or a) were touched since the last.
LLAMA_FAST_DEVICE void wgmma_fence() {
#ifdef LLAMA_FAST_EMULATE
  emulator::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// "wgmma.commit_group".
LLAMA_FAST_DEVICE void wgmma_commit_group() {
#ifdef LLAMA_FAST_EMULATE
  emulator::wgmma_commit_group();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// "wgmma.wait_group". Returns when at most the newest kPending groups are in flight. Until then the registers d and a
// of a wgmma must not be touched, nor its shared memory overwritten.
template <int kPending>
LLAMA_FAST_DEVICE void wgmma_wait_group() {
#ifdef LLAMA_FAST_EMULATE
  emulator::wgmma_wait_group(kPending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// No instruction: keeps the compiler from moving uses of an accumulator over the wait (or a fence) that stands before.
template <int kCount>
LLAMA_FAST_DEVICE void wgmma_use(float (&d)[kCount]) {
#ifdef LLAMA_FAST_EMULATE
  emulator::wgmma_use(d);
#else
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

#ifndef LLAMA_FAST_EMULATE
// clang-format off
// Operands %t0 to %t9, and the elements of d that they stand for.
#define LLAMA_FAST_R_2(t) "%" #t "0, %" #t "1"
#define LLAMA_FAST_R_4(t) LLAMA_FAST_R_2(t) ", %" #t "2, %" #t "3"
#define LLAMA_FAST_R_6(t) LLAMA_FAST_R_4(t) ", %" #t "4, %" #t "5"
#define LLAMA_FAST_R_8(t) LLAMA_FAST_R_6(t) ", %" #t "6, %" #t "7"
#define LLAMA_FAST_R_10(t) LLAMA_FAST_R_8(t) ", %" #t "8, %" #t "9"
#define LLAMA_FAST_R10 LLAMA_FAST_R_10()
#define LLAMA_FAST_R20 LLAMA_FAST_R10 ", " LLAMA_FAST_R_10(1)
#define LLAMA_FAST_R30 LLAMA_FAST_R20 ", " LLAMA_FAST_R_10(2)
#define LLAMA_FAST_R40 LLAMA_FAST_R30 ", " LLAMA_FAST_R_10(3)
#define LLAMA_FAST_R50 LLAMA_FAST_R40 ", " LLAMA_FAST_R_10(4)
#define LLAMA_FAST_R60 LLAMA_FAST_R50 ", " LLAMA_FAST_R_10(5)
#define LLAMA_FAST_R70 LLAMA_FAST_R60 ", " LLAMA_FAST_R_10(6)
#define LLAMA_FAST_R80 LLAMA_FAST_R70 ", " LLAMA_FAST_R_10(7)
#define LLAMA_FAST_R90 LLAMA_FAST_R80 ", " LLAMA_FAST_R_10(8)
#define LLAMA_FAST_R100 LLAMA_FAST_R90 ", " LLAMA_FAST_R_10(9)
#define LLAMA_FAST_R110 LLAMA_FAST_R100 ", " LLAMA_FAST_R_10(10)
#define LLAMA_FAST_R120 LLAMA_FAST_R110 ", " LLAMA_FAST_R_10(11)
#define LLAMA_FAST_D_2(t) "+f"(d[t##0]), "+f"(d[t##1])
#define LLAMA_FAST_D_4(t) LLAMA_FAST_D_2(t), "+f"(d[t##2]), "+f"(d[t##3])
#define LLAMA_FAST_D_6(t) LLAMA_FAST_D_4(t), "+f"(d[t##4]), "+f"(d[t##5])
#define LLAMA_FAST_D_8(t) LLAMA_FAST_D_6(t), "+f"(d[t##6]), "+f"(d[t##7])
#define LLAMA_FAST_D_10(t) LLAMA_FAST_D_8(t), "+f"(d[t##8]), "+f"(d[t##9])
#define LLAMA_FAST_D10 LLAMA_FAST_D_10()
#define LLAMA_FAST_D20 LLAMA_FAST_D10, LLAMA_FAST_D_10(1)
#define LLAMA_FAST_D30 LLAMA_FAST_D20, LLAMA_FAST_D_10(2)
#define LLAMA_FAST_D40 LLAMA_FAST_D30, LLAMA_FAST_D_10(3)
#define LLAMA_FAST_D50 LLAMA_FAST_D40, LLAMA_FAST_D_10(4)
#define LLAMA_FAST_D60 LLAMA_FAST_D50, LLAMA_FAST_D_10(5)
#define LLAMA_FAST_D70 LLAMA_FAST_D60, LLAMA_FAST_D_10(6)
#define LLAMA_FAST_D80 LLAMA_FAST_D70, LLAMA_FAST_D_10(7)
#define LLAMA_FAST_D90 LLAMA_FAST_D80, LLAMA_FAST_D_10(8)
#define LLAMA_FAST_D100 LLAMA_FAST_D90, LLAMA_FAST_D_10(9)
#define LLAMA_FAST_D110 LLAMA_FAST_D100, LLAMA_FAST_D_10(10)
#define LLAMA_FAST_D120 LLAMA_FAST_D110, LLAMA_FAST_D_10(11)
#define LLAMA_FAST_LIST(...) (__VA_ARGS__)
#define LLAMA_FAST_UNPACK(...) __VA_ARGS__
// X(N, registers of d in the text, d as operands, numbers of the operands after d)
#define LLAMA_FAST_WGMMA_SIZES(X) \
  X(8, LLAMA_FAST_R_4(), LLAMA_FAST_LIST(LLAMA_FAST_D_4()), 4, 5, 6, 7, 8, 9, 10) \
  X(16, LLAMA_FAST_R_8(), LLAMA_FAST_LIST(LLAMA_FAST_D_8()), 8, 9, 10, 11, 12, 13, 14) \
  X(32, LLAMA_FAST_R10 ", " LLAMA_FAST_R_6(1), LLAMA_FAST_LIST(LLAMA_FAST_D10, LLAMA_FAST_D_6(1)), 16, 17, 18, 19, 20, 21, 22) \
  X(48, LLAMA_FAST_R20 ", " LLAMA_FAST_R_4(2), LLAMA_FAST_LIST(LLAMA_FAST_D20, LLAMA_FAST_D_4(2)), 24, 25, 26, 27, 28, 29, 30) \
  X(64, LLAMA_FAST_R30 ", " LLAMA_FAST_R_2(3), LLAMA_FAST_LIST(LLAMA_FAST_D30, LLAMA_FAST_D_2(3)), 32, 33, 34, 35, 36, 37, 38) \
  X(80, LLAMA_FAST_R40, LLAMA_FAST_LIST(LLAMA_FAST_D40), 40, 41, 42, 43, 44, 45, 46) \
  X(96, LLAMA_FAST_R40 ", " LLAMA_FAST_R_8(4), LLAMA_FAST_LIST(LLAMA_FAST_D40, LLAMA_FAST_D_8(4)), 48, 49, 50, 51, 52, 53, 54) \
  X(112, LLAMA_FAST_R50 ", " LLAMA_FAST_R_6(5), LLAMA_FAST_LIST(LLAMA_FAST_D50, LLAMA_FAST_D_6(5)), 56, 57, 58, 59, 60, 61, 62) \
  X(128, LLAMA_FAST_R60 ", " LLAMA_FAST_R_4(6), LLAMA_FAST_LIST(LLAMA_FAST_D60, LLAMA_FAST_D_4(6)), 64, 65, 66, 67, 68, 69, 70) \
  X(144, LLAMA_FAST_R70 ", " LLAMA_FAST_R_2(7), LLAMA_FAST_LIST(LLAMA_FAST_D70, LLAMA_FAST_D_2(7)), 72, 73, 74, 75, 76, 77, 78) \
  X(160, LLAMA_FAST_R80, LLAMA_FAST_LIST(LLAMA_FAST_D80), 80, 81, 82, 83, 84, 85, 86) \
  X(176, LLAMA_FAST_R80 ", " LLAMA_FAST_R_8(8), LLAMA_FAST_LIST(LLAMA_FAST_D80, LLAMA_FAST_D_8(8)), 88, 89, 90, 91, 92, 93, 94) \
  X(192, LLAMA_FAST_R90 ", " LLAMA_FAST_R_6(9), LLAMA_FAST_LIST(LLAMA_FAST_D90, LLAMA_FAST_D_6(9)), 96, 97, 98, 99, 100, 101, 102) \
  X(224, LLAMA_FAST_R110 ", " LLAMA_FAST_R_2(11), LLAMA_FAST_LIST(LLAMA_FAST_D110, LLAMA_FAST_D_2(11)), 112, 113, 114, 115, 116, 117, 118) \
  X(256, LLAMA_FAST_R120 ", " LLAMA_FAST_R_8(12), LLAMA_FAST_LIST(LLAMA_FAST_D120, LLAMA_FAST_D_8(12)), 128, 129, 130, 131, 132, 133, 134)
// clang-format on
#endif

// "wgmma.mma_async", both operands in shared memory: d[64, N] = a[64, 16] b[16, N] + (scale_d ? d : 0). A thread holds
// of d, with w = warp % 4, g = lane / 4 and t = lane % 4, in d[i]: row 16w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2t +
// i % 2.
template <class T, int kN, bool kTransA, bool kTransB>
LLAMA_FAST_DEVICE void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, int scale_d) {
#ifdef LLAMA_FAST_EMULATE
  emulator::wgmma(kHalf<T>, kN, d, nullptr, a, b, scale_d != 0, kTransA, kTransB);
#else
#define LLAMA_FAST_WGMMA(N, type, R, D, a_, b_, scale_, ta_, tb_)                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #scale_ ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N  \
               "k16.f32." type "." type " {" R "}, %" #a_ ", %" #b_ ", p, 1, 1, %" #ta_ ", %" #tb_ ";\n}" \
               : LLAMA_FAST_UNPACK D                                                                      \
               : "l"(a), "l"(b), "r"(scale_d), "n"(kTransA), "n"(kTransB))
#define LLAMA_FAST_WGMMA_CASE(N, R, D, o0, o1, o2, o3, o4, o5, o6) \
  if constexpr (kN == N && std::is_same_v<T, bf16>)                \
    LLAMA_FAST_WGMMA(N, "bf16", R, D, o0, o1, o2, o3, o4);         \
  else if constexpr (kN == N)                                      \
    LLAMA_FAST_WGMMA(N, "f16", R, D, o0, o1, o2, o3, o4);          \
  else
  LLAMA_FAST_WGMMA_SIZES(LLAMA_FAST_WGMMA_CASE)
  static_assert(kN < 0, "LLAMA_FAST_WGMMA_SIZES lacks this N");
#undef LLAMA_FAST_WGMMA_CASE
#undef LLAMA_FAST_WGMMA
#endif
}

// The same with a in registers: of rows g and g + 8 of the warp's 16, as in mma_m16n8k16.
template <class T, int kN, bool kTransB>
LLAMA_FAST_DEVICE void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int scale_d) {
#ifdef LLAMA_FAST_EMULATE
  emulator::wgmma(kHalf<T>, kN, d, a, 0, b, scale_d != 0, false, kTransB);
#else
#define LLAMA_FAST_WGMMA(N, type, R, D, a0_, a1_, a2_, a3_, b_, scale_, tb_)                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #scale_ ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
               "k16.f32." type "." type " {" R "}, {%" #a0_ ", %" #a1_ ", %" #a2_ ", %" #a3_ "}, %" #b_  \
               ", p, 1, 1, %" #tb_ ";\n}"                                                                \
               : LLAMA_FAST_UNPACK D                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(kTransB))
#define LLAMA_FAST_WGMMA_CASE(N, R, D, o0, o1, o2, o3, o4, o5, o6) \
  if constexpr (kN == N && std::is_same_v<T, bf16>)                \
    LLAMA_FAST_WGMMA(N, "bf16", R, D, o0, o1, o2, o3, o4, o5, o6); \
  else if constexpr (kN == N)                                      \
    LLAMA_FAST_WGMMA(N, "f16", R, D, o0, o1, o2, o3, o4, o5, o6);  \
  else
  LLAMA_FAST_WGMMA_SIZES(LLAMA_FAST_WGMMA_CASE)
  static_assert(kN < 0, "LLAMA_FAST_WGMMA_SIZES lacks this N");
#undef LLAMA_FAST_WGMMA_CASE
#undef LLAMA_FAST_WGMMA
#endif
}

}  // namespace llama_fast::cuda::ptx
