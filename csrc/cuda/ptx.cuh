// PTX instructions that run on sm_80 and newer: one a function, named as in the PTX ISA, operands in PTX's order. With
// ptx_sm90.cuh the only files with asm. Above each stands its section of the PTX ISA and the oldest architecture. In an
// emulated build the same function executes the instruction's meaning (csrc/emulator/instructions.h).
//
// Shared addresses are 32 bits (shared_address of device.cuh). T is bf16 or f16; two of them fill a 32-bit register,
// the first in its lower half.
#pragma once

#include <type_traits>

#include "device.cuh"

#ifdef LLAMA_FAST_EMULATE
#include "../emulator/instructions.h"
#endif

namespace llama_fast::cuda::ptx {

#ifdef LLAMA_FAST_EMULATE
template <class T>
constexpr emulator::Half kHalf = std::is_same_v<T, bf16> ? emulator::Half::bf16 : emulator::Half::f16;
#endif

// ---- matrix units ---------------------------------------------------------------------------------------------------

// "Multiply-and-Accumulate Instruction: mma", sm_80. d = a b + c: a [16, 16] by rows, b [16, 8] by columns, d and c
// [16, 8] f32. Lane l, with g = l / 4 and t = l % 4, holds
//   a[i]: rows g + 8 (i % 2), columns 2t + 8 (i / 2) and the next;  b[i]: rows 2t + 8i and the next, column g;
//   d[i]: row g + 8 (i / 2), column 2t + i % 2.
template <class T>
LLAMA_FAST_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    const float (&c)[4]) {
#ifdef LLAMA_FAST_EMULATE
  emulator::mma_m16n8k16(kHalf<T>, d, a, b, c);
#else
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
        "%12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
        "%12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#endif
}

// "Warp-level matrix load instruction: ldmatrix", sm_75. Matrix m of 8 x 8 halves has its row i of 16 bytes at the
// address that lane 8m + i gives. Lane l receives of each matrix row l / 4, columns 2 (l % 4) and the next; with .trans
// of the transposed matrix. x1 and x2 read the addresses of the first 8 and 16 lanes.
LLAMA_FAST_DEVICE void ldmatrix_x1(uint32_t (&r)[1], uint32_t address) {
#ifdef LLAMA_FAST_EMULATE
  emulator::ldmatrix(1, false, r, address);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
#endif
}
LLAMA_FAST_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
#ifdef LLAMA_FAST_EMULATE
  emulator::ldmatrix(2, false, r, address);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
#endif
}
LLAMA_FAST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
#ifdef LLAMA_FAST_EMULATE
  emulator::ldmatrix(4, false, r, address);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}
LLAMA_FAST_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address) {
#ifdef LLAMA_FAST_EMULATE
  emulator::ldmatrix(2, true, r, address);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
#endif
}
LLAMA_FAST_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
#ifdef LLAMA_FAST_EMULATE
  emulator::ldmatrix(4, true, r, address);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

// "Warp-level matrix store instruction: stmatrix", sm_90. The inverse of ldmatrix.
LLAMA_FAST_DEVICE void stmatrix_x2(uint32_t address, const uint32_t (&r)[2]) {
#ifdef LLAMA_FAST_EMULATE
  emulator::stmatrix(2, false, address, r);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]), "r"(r[1])
               : "memory");
#endif
}
LLAMA_FAST_DEVICE void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
#ifdef LLAMA_FAST_EMULATE
  emulator::stmatrix(4, false, address, r);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}
LLAMA_FAST_DEVICE void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4]) {
#ifdef LLAMA_FAST_EMULATE
  emulator::stmatrix(4, true, address, r);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

// "cp.async", sm_80. 16 bytes from global to shared memory past L1, both addresses aligned to 16. Of the source only
// the first `source_bytes` are read; the rest of the destination becomes 0. With source_bytes = 0 the source may be
// anything.
LLAMA_FAST_DEVICE void cp_async_16(uint32_t destination, GlobalAddress source, uint32_t source_bytes = 16) {
#ifdef LLAMA_FAST_EMULATE
  emulator::cp_async_16(destination, source, source_bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(source_bytes)
               : "memory");
#endif
}

// "cp.async.commit_group", sm_80.
LLAMA_FAST_DEVICE void cp_async_commit_group() {
#ifdef LLAMA_FAST_EMULATE
  emulator::cp_async_commit_group();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// "cp.async.wait_group", sm_80. Returns when at most the newest kPending groups of this thread are in flight. What
// other threads copied is seen after a barrier only.
template <int kPending>
LLAMA_FAST_DEVICE void cp_async_wait_group() {
#ifdef LLAMA_FAST_EMULATE
  emulator::cp_async_wait_group(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- memory ---------------------------------------------------------------------------------------------------------

// "ld.global.nc", sm_70 for the hint. 16 bytes that no thread writes during the kernel; aligned to 16.
LLAMA_FAST_DEVICE uint4 ld_global_nc_v4(GlobalAddress address) {
#ifdef LLAMA_FAST_EMULATE
  return emulator::GlobalSpace::load<uint4>(address.value, "ld.global.nc", emulator::Use::constant);
#else
  uint4 d;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "l"(address));
  return d;
#endif
}
// The same, for data read once: leaves no line in L1.
LLAMA_FAST_DEVICE uint4 ld_global_nc_no_allocate_v4(GlobalAddress address) {
#ifdef LLAMA_FAST_EMULATE
  return emulator::GlobalSpace::load<uint4>(address.value, "ld.global.nc", emulator::Use::constant);
#else
  uint4 d;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "l"(address));
  return d;
#endif
}
// "ld.global", sm_20. 16 bytes that this kernel may write.
LLAMA_FAST_DEVICE uint4 ld_global_v4(GlobalAddress address) {
#ifdef LLAMA_FAST_EMULATE
  return emulator::GlobalSpace::load<uint4>(address.value);
#else
  uint4 d;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "l"(address)
               : "memory");
  return d;
#endif
}
// "st.global", sm_20; aligned to 16.
LLAMA_FAST_DEVICE void st_global_v4(GlobalAddress address, const uint4& b) {
#ifdef LLAMA_FAST_EMULATE
  emulator::GlobalSpace::store(address.value, b);
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w)
               : "memory");
#endif
}
// The same, for data that is not read again soon: the first to leave the caches.
LLAMA_FAST_DEVICE void st_global_cs_v4(GlobalAddress address, const uint4& b) {
#ifdef LLAMA_FAST_EMULATE
  emulator::GlobalSpace::store(address.value, b);
#else
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w)
               : "memory");
#endif
}

// "ld.shared" and "st.shared", sm_20.
LLAMA_FAST_DEVICE uint32_t ld_shared(uint32_t address) {
#ifdef LLAMA_FAST_EMULATE
  return emulator::SharedSpace::load<uint32_t>(address);
#else
  uint32_t d;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(d) : "r"(address) : "memory");
  return d;
#endif
}
LLAMA_FAST_DEVICE uint2 ld_shared_v2(uint32_t address) {
#ifdef LLAMA_FAST_EMULATE
  return emulator::SharedSpace::load<uint2>(address);
#else
  uint2 d;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "r"(address) : "memory");
  return d;
#endif
}
LLAMA_FAST_DEVICE uint4 ld_shared_v4(uint32_t address) {
#ifdef LLAMA_FAST_EMULATE
  return emulator::SharedSpace::load<uint4>(address);
#else
  uint4 d;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "r"(address)
               : "memory");
  return d;
#endif
}
LLAMA_FAST_DEVICE void st_shared(uint32_t address, uint32_t b) {
#ifdef LLAMA_FAST_EMULATE
  emulator::SharedSpace::store(address, b);
#else
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(b) : "memory");
#endif
}
LLAMA_FAST_DEVICE void st_shared_v4(uint32_t address, const uint4& b) {
#ifdef LLAMA_FAST_EMULATE
  emulator::SharedSpace::store(address, b);
#else
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w)
               : "memory");
#endif
}

// "ld.acquire" of device scope, sm_70. Sees what was written before the release that it reads from.
LLAMA_FAST_DEVICE int ld_acquire_gpu(Global<const int> address) {
#ifdef LLAMA_FAST_EMULATE
  return emulator::load_acquire(address);
#else
  int d;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(d) : "l"(address) : "memory");
  return d;
#endif
}
// "red.release" of device scope, sm_70. What this thread wrote before is seen by whoever acquires the sum.
LLAMA_FAST_DEVICE void red_release_gpu_add(Global<int> address, int b) {
#ifdef LLAMA_FAST_EMULATE
  emulator::global_release(address.address());
  atomicAdd(address, b);
#else
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(b) : "memory");
#endif
}

// "nanosleep", sm_70. For a loop that waits for another block.
LLAMA_FAST_DEVICE void nanosleep(uint32_t nanoseconds) {
#ifdef LLAMA_FAST_EMULATE
  (void)nanoseconds;
  emulator::sleep();
#else
  asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds));
#endif
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// "ex2", sm_20. 2^a, at most 2 units in the last place off; ex2(-inf) = 0. Subnormals are 0.
LLAMA_FAST_DEVICE float ex2(float a) {
#ifdef LLAMA_FAST_EMULATE
  return std::exp2(a);
#else
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
  return d;
#endif
}

// "lg2", sm_20. log2(a), its absolute error below 2^-22. Subnormals are 0.
LLAMA_FAST_DEVICE float lg2(float a) {
#ifdef LLAMA_FAST_EMULATE
  return std::log2(a);
#else
  float d;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
  return d;
#endif
}

// "cvt", sm_80. Rounds both to the nearest T; `a` goes to the upper half, `b` to the lower.
template <class T>
LLAMA_FAST_DEVICE uint32_t cvt_rn_x2(float a, float b) {
#ifdef LLAMA_FAST_EMULATE
  return emulator::cvt_f16x2(kHalf<T>, a, b);
#else
  uint32_t d;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(a), "f"(b));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(a), "f"(b));
  return d;
#endif
}

// "cvt", sm_80 and sm_53. Rounds to the nearest T.
template <class T>
LLAMA_FAST_DEVICE T cvt_rn(float a) {
#ifdef LLAMA_FAST_EMULATE
  return {emulator::float_to_half(kHalf<T>, a)};
#else
  T d;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d.bits) : "f"(a));
  else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d.bits) : "f"(a));
  return d;
#endif
}

// "cvt", sm_53; for bf16 a shift. Exact.
template <class T>
LLAMA_FAST_DEVICE float cvt_f32(T a) {
#ifdef LLAMA_FAST_EMULATE
  return emulator::half_to_float(kHalf<T>, a.bits);
#else
  if constexpr (std::is_same_v<T, bf16>) {
    return __uint_as_float(static_cast<uint32_t>(a.bits) << 16);
  } else {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(a.bits));
    return d;
  }
#endif
}

// ---- barriers of some of a block's warps ----------------------------------------------------------------------------

// "bar, barrier", sm_20. Barrier `a` of 16 (0 is __syncthreads'), for `b` threads, a multiple of 32. bar.arrive does
// not wait.
LLAMA_FAST_DEVICE void bar_sync(int a, int b) {
#ifdef LLAMA_FAST_EMULATE
  emulator::barrier(a, b, true);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(a), "r"(b) : "memory");
#endif
}
LLAMA_FAST_DEVICE void bar_arrive(int a, int b) {
#ifdef LLAMA_FAST_EMULATE
  emulator::barrier(a, b, false);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(a), "r"(b) : "memory");
#endif
}

}  // namespace llama_fast::cuda::ptx
