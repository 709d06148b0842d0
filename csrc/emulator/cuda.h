// The part of CUDA C++ that kernels use besides csrc/cuda/ptx.cuh, for an emulated build. csrc/cuda/device.cuh includes
// it in place of cuda_runtime.h. `__shared__` is left undefined on purpose: LLAMA_FAST_SHARED is checked.
#pragma once

#include <cmath>
#include <cstring>

#include "device.h"
#include "pointer.h"
#include "types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::llama_fast::emulator::thread_index())
#define blockIdx (::llama_fast::emulator::block_index())
#define blockDim (::llama_fast::emulator::block_shape())
#define gridDim (::llama_fast::emulator::grid_shape())

inline void __syncthreads() { llama_fast::emulator::barrier(0, 0, true); }

namespace llama_fast::emulator {

// The value of lane source(lane); a lane that takes no part must not be asked.
template <class T>
T shuffle(const char* op, uint32_t mask, T value, int source) {
  struct Lane {
    T value;
    int source;
    T result;
  } mine{value, source, value};
  collective(op, mask, &mine, [](void* const* lanes) {
    for (int i = 0; i < kWarp; ++i) {
      auto* to = static_cast<Lane*>(lanes[i]);
      if (to == nullptr) continue;
      const auto* from = static_cast<const Lane*>(lanes[to->source]);
      if (from == nullptr) fail("shfl.sync: lane %d asks lane %d, which takes no part", i, to->source);
      to->result = from->value;
    }
  });
  return mine.result;
}

// Lane `to` where it lies in the same group of `width` lanes as the caller, else the caller.
inline int within(int to, int width) { return to >= 0 && to / width == lane() / width ? to : lane(); }

}  // namespace llama_fast::emulator

inline void __syncwarp(unsigned mask = ~0u) { llama_fast::emulator::syncwarp(mask); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = llama_fast::emulator::lane() / width * width;
  return llama_fast::emulator::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int to = llama_fast::emulator::lane() ^ lanes;
  return llama_fast::emulator::shuffle("__shfl_xor_sync", mask, value, llama_fast::emulator::within(to, width));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int to = llama_fast::emulator::lane() + static_cast<int>(delta);
  return llama_fast::emulator::shuffle("__shfl_down_sync", mask, value, llama_fast::emulator::within(to, width));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int to = llama_fast::emulator::lane() - static_cast<int>(delta);
  return llama_fast::emulator::shuffle("__shfl_up_sync", mask, value, llama_fast::emulator::within(to, width));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return llama_fast::emulator::ballot("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return llama_fast::emulator::ballot("__any_sync", mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return llama_fast::emulator::ballot("__all_sync", mask, predicate == 0) == 0;
}

namespace llama_fast::emulator {

template <class T, class F>
T atomic_update(Global<T> p, const char* op, F&& f) {
  T* target = static_cast<T*>(global_at(p.address(), sizeof(T), alignof(T), op, Use::atomic));
  T old, next;
  __atomic_load(target, &old, __ATOMIC_SEQ_CST);
  do next = f(old);
  while (!__atomic_compare_exchange(target, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return old;
}

inline int load_acquire(Global<const int> p) {
  const void* at = global_at(p.address(), 4, 4, "ld.acquire", Use::atomic);
  const int value = __atomic_load_n(static_cast<const int*>(at), __ATOMIC_SEQ_CST);
  global_acquire(p.address());
  return value;
}

// Gives way to the other threads of the block. Fails after so many calls of a thread that it must be waiting for ever.
void sleep();

}  // namespace llama_fast::emulator

// Atomics on global memory, relaxed and of device scope, as CUDA's.
template <class T>
T atomicAdd(llama_fast::emulator::Global<T> p, std::common_type_t<T> value) {
  return llama_fast::emulator::atomic_update(p, "atomicAdd", [value](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(llama_fast::emulator::Global<T> p, std::common_type_t<T> value) {
  return llama_fast::emulator::atomic_update(p, "atomicMax", [value](T old) { return old > value ? old : value; });
}
template <class T>
T atomicExch(llama_fast::emulator::Global<T> p, std::common_type_t<T> value) {
  return llama_fast::emulator::atomic_update(p, "atomicExch", [value](T) { return value; });
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline void __sincosf(float x, float* s, float* c) { *s = std::sin(x), *c = std::cos(x); }
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
