// PTX instructions of sm_90 and sm_90a, in the manner of ptx.cuh: mbarriers, the tensor memory accelerator (TMA), the
// fences between them and the threads, and what a warp-specialised kernel needs besides. wgmma: ptx_wgmma.cuh.
#pragma once

#include "ptx.cuh"

#ifdef LLAMA_FAST_EMULATE
#include "../emulator/hopper.h"
#else
#include <cuda.h>
#endif

namespace llama_fast::cuda::ptx {

// A tensor in global memory and the box of it that a copy moves, encoded on the host (tensor_map.cuh). A kernel takes
// it as `const __grid_constant__` parameter, or in a struct that is one.
#ifdef LLAMA_FAST_EMULATE
using TensorMap = emulator::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// ---- mbarrier: 8 bytes of shared memory -----------------------------------------------------------------------------

// "mbarrier.init", sm_80. A phase ends after `count` arrivals and as many bytes as were expected.
LLAMA_FAST_DEVICE void mbarrier_init(uint32_t address, int count) {
#ifdef LLAMA_FAST_EMULATE
  emulator::mbarrier_init(address, count);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
#endif
}

// "fence.mbarrier_init", sm_90. By the thread that initialised them, before a barrier after which others use them.
LLAMA_FAST_DEVICE void fence_mbarrier_init() {
#ifdef LLAMA_FAST_EMULATE
  emulator::fence_mbarrier_init();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// "mbarrier.arrive", sm_80.
LLAMA_FAST_DEVICE void mbarrier_arrive(uint32_t address) {
#ifdef LLAMA_FAST_EMULATE
  emulator::mbarrier_arrive(address, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
#endif
}

// "mbarrier.arrive.expect_tx", sm_90. Expects `bytes` more in this phase, then arrives.
LLAMA_FAST_DEVICE void mbarrier_arrive_expect_tx(uint32_t address, int bytes) {
#ifdef LLAMA_FAST_EMULATE
  emulator::mbarrier_arrive(address, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
#endif
}

// "mbarrier.try_wait", sm_90, until it succeeds: returns when the phase of this parity has ended. The first is phase 0;
// a wait for parity 1 on a fresh barrier returns at once.
LLAMA_FAST_DEVICE void mbarrier_wait(uint32_t address, uint32_t parity) {
#ifdef LLAMA_FAST_EMULATE
  emulator::mbarrier_wait(address, parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT_%=;\n"
      "}" ::"r"(address),
      "r"(parity)
      : "memory");
#endif
}

// "membar, fence": fence.proxy.async, sm_90. What this thread wrote to shared memory with ordinary stores becomes
// visible to TMA and wgmma, which the same thread, or others after a barrier, start from here on.
LLAMA_FAST_DEVICE void fence_proxy_async() {
#ifdef LLAMA_FAST_EMULATE
  emulator::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The same between global memory and the copies of TMA.
LLAMA_FAST_DEVICE void fence_proxy_async_global() {
#ifndef LLAMA_FAST_EMULATE
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// ---- TMA: one thread starts a copy ----------------------------------------------------------------------------------

// "prefetch.tensormap", sm_90. The map's own bytes, into the cache.
LLAMA_FAST_DEVICE void prefetch_tensormap(const TensorMap& map) {
#ifdef LLAMA_FAST_EMULATE
  (void)map;
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// "cp.async.bulk.tensor", sm_90, global to shared. The box whose first element has the coordinates c0 (fastest), c1,
// ...; elements outside the tensor are 0. Adds the box's bytes, those included, to the mbarrier's phase. The
// destination is aligned to 128 bytes, with the 128-byte swizzle to 1024.
LLAMA_FAST_DEVICE void tma_load_2d(uint32_t destination, const TensorMap& map, uint32_t mbarrier, int c0, int c1) {
#ifdef LLAMA_FAST_EMULATE
  emulator::tma_load(destination, map, mbarrier, {c0, c1});
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          destination),
      "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1)
      : "memory");
#endif
}
LLAMA_FAST_DEVICE void tma_load_3d(uint32_t destination, const TensorMap& map, uint32_t mbarrier, int c0, int c1,
                                   int c2) {
#ifdef LLAMA_FAST_EMULATE
  emulator::tma_load(destination, map, mbarrier, {c0, c1, c2});
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(destination),
      "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
#endif
}
LLAMA_FAST_DEVICE void tma_load_4d(uint32_t destination, const TensorMap& map, uint32_t mbarrier, int c0, int c1,
                                   int c2, int c3) {
#ifdef LLAMA_FAST_EMULATE
  emulator::tma_load(destination, map, mbarrier, {c0, c1, c2, c3});
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(destination),
      "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#endif
}

// "cp.async.bulk.tensor", sm_90, shared to global; elements outside the tensor are left out. Part of this thread's next
// bulk group.
LLAMA_FAST_DEVICE void tma_store_2d(const TensorMap& map, uint32_t source, int c0, int c1) {
#ifdef LLAMA_FAST_EMULATE
  emulator::tma_store(map, source, {c0, c1});
#else
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(source),
               "r"(c0), "r"(c1)
               : "memory");
#endif
}
LLAMA_FAST_DEVICE void tma_store_3d(const TensorMap& map, uint32_t source, int c0, int c1, int c2) {
#ifdef LLAMA_FAST_EMULATE
  emulator::tma_store(map, source, {c0, c1, c2});
#else
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
#endif
}
LLAMA_FAST_DEVICE void tma_store_4d(const TensorMap& map, uint32_t source, int c0, int c1, int c2, int c3) {
#ifdef LLAMA_FAST_EMULATE
  emulator::tma_store(map, source, {c0, c1, c2, c3});
#else
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
#endif
}

// "cp.async.bulk", sm_90. `bytes`, a multiple of 16, between addresses aligned to 16.
LLAMA_FAST_DEVICE void bulk_load(uint32_t destination, GlobalAddress source, uint32_t bytes, uint32_t mbarrier) {
#ifdef LLAMA_FAST_EMULATE
  emulator::bulk_load(destination, source, bytes, mbarrier);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(mbarrier)
      : "memory");
#endif
}
LLAMA_FAST_DEVICE void bulk_store(GlobalAddress destination, uint32_t source, uint32_t bytes) {
#ifdef LLAMA_FAST_EMULATE
  emulator::bulk_store(destination, source, bytes, false);
#else
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(source), "r"(bytes)
               : "memory");
#endif
}
// "cp.reduce.async.bulk", sm_90. Adds f32, each addition atomic.
LLAMA_FAST_DEVICE void bulk_reduce_add_f32(GlobalAddress destination, uint32_t source, uint32_t bytes) {
#ifdef LLAMA_FAST_EMULATE
  emulator::bulk_store(destination, source, bytes, true);
#else
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(destination),
               "r"(source), "r"(bytes)
               : "memory");
#endif
}

// "cp.async.bulk.commit_group" and "cp.async.bulk.wait_group", sm_90. The wait returns when at most the newest kPending
// groups of this thread are unfinished; with _read, when their shared memory may be overwritten.
LLAMA_FAST_DEVICE void bulk_commit_group() {
#ifdef LLAMA_FAST_EMULATE
  emulator::bulk_commit_group();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
template <int kPending>
LLAMA_FAST_DEVICE void bulk_wait_group() {
#ifdef LLAMA_FAST_EMULATE
  emulator::bulk_wait_group(kPending, false);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}
template <int kPending>
LLAMA_FAST_DEVICE void bulk_wait_group_read() {
#ifdef LLAMA_FAST_EMULATE
  emulator::bulk_wait_group(kPending, true);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- warps ----------------------------------------------------------------------------------------------------------

// "setmaxnreg", sm_90a. By every warp of a warpgroup; kCount is a multiple of 8, 24 to 256.
template <int kCount>
LLAMA_FAST_DEVICE void setmaxnreg_inc() {
#ifdef LLAMA_FAST_EMULATE
  emulator::set_max_registers(kCount, true);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
LLAMA_FAST_DEVICE void setmaxnreg_dec() {
#ifdef LLAMA_FAST_EMULATE
  emulator::set_max_registers(kCount, false);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// "elect.sync", sm_90. True in one lane of the warp.
LLAMA_FAST_DEVICE bool elect_sync() {
#ifdef LLAMA_FAST_EMULATE
  return emulator::elect_sync(~0u);
#else
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
#endif
}

}  // namespace llama_fast::cuda::ptx

#include "ptx_wgmma.cuh"
