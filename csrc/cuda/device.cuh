// What a kernel is written in, on the device and in an emulated build (docs/emulator.md). The only file, with ptx.cuh,
// ptx_sm90.cuh and launch.cuh, that knows which of the two it is: the kernels have no #if for it.
//
//   Global<T>  pointer to global memory: T* on the device, checked when emulated. Kernel parameters have this type.
//   Shared<T>  pointer to shared memory, likewise.
//   LLAMA_FAST_SHARED(T, name, n)     in a kernel: Shared<T> name, an array of n elements. Not initialised.
//   LLAMA_FAST_DYNAMIC_SHARED(name)   in a kernel: Shared<char> name, the launch's dynamic shared memory, 1024-byte
//                                     aligned (what TMA's and wgmma's 128-byte swizzle needs).
//   pointer_cast<U>(p)                reinterpret_cast for either kind of pointer.
//   shared_address(p)                 the 32-bit address that the instructions of ptx.cuh take.
//
// An emulated p[i] is a proxy: write `T v = p[i]`, not `auto v = p[i]`.
#pragma once

#include <cstdint>
#include <cstring>

#include "../dispatch.h"

#ifdef LLAMA_FAST_EMULATE
#include "../emulator/cuda.h"
#else
#include <cuda_runtime.h>
#endif

#define LLAMA_FAST_DEVICE __device__ __forceinline__

namespace llama_fast::cuda {

#ifdef LLAMA_FAST_EMULATE

template <class T>
using Global = emulator::Global<T>;
template <class T>
using Shared = emulator::Shared<T>;
using GlobalAddress = emulator::GlobalAddress;

template <class U, class Space, class T>
emulator::Pointer<Space, U> pointer_cast(emulator::Pointer<Space, T> p) {
  return emulator::Pointer<Space, U>(p.address(), 0);
}
template <class T>
uint32_t shared_address(Shared<T> p) {
  return p.address();
}

#define LLAMA_FAST_SHARED(T, name, n)                                                                                 \
  static const char name##_declaration = 0;                                                                           \
  const ::llama_fast::cuda::Shared<T> name(                                                                           \
      ::llama_fast::emulator::static_shared(&name##_declaration, sizeof(T) * (n), alignof(T) > 16 ? alignof(T) : 16), \
      0)
#define LLAMA_FAST_DYNAMIC_SHARED(name) const ::llama_fast::cuda::Shared<char> name(0, 0)

#else

template <class T>
using Global = T*;
template <class T>
using Shared = T*;
using GlobalAddress = const void*;

template <class U, class T>
LLAMA_FAST_DEVICE U* pointer_cast(T* p) {
  return reinterpret_cast<U*>(p);
}
template <class T>
LLAMA_FAST_DEVICE uint32_t shared_address(const T* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

#define LLAMA_FAST_SHARED(T, name, n) __shared__ __align__(16) T name[n]
#define LLAMA_FAST_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) char name[]

#endif

// The bits of a value, as another type of the same size.
template <class To, class From>
LLAMA_FAST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace llama_fast::cuda
