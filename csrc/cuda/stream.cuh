// What a launcher needs of the device that its stream belongs to.
#pragma once

#include "launch.cuh"
#include "ops.h"

namespace llama_fast::cuda {

// In scope, the stream's device is the current one, and its context is the thread's: the driver's own functions need
// one, and a thread of autograd's that has called nothing of CUDA's has none.
class OnDevice {
 public:
#ifdef LLAMA_FAST_EMULATE
  explicit OnDevice(const char*, Stream) {}
#else
  OnDevice(const char* op, Stream s) {
    check(op, cudaGetDevice(&before_));
    check(op, cudaSetDevice(s.device));
    changed_ = before_ != s.device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;

 public:
#endif
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
};

// Streaming multiprocessors of a device; 4 when emulated, so that loops over them have more than one turn.
inline int64_t multiprocessors(int device) {
#ifdef LLAMA_FAST_EMULATE
  return 4 + 0 * device;
#else
  constexpr int kDevices = 64;
  static int known[kDevices] = {};
  int count = device < kDevices ? known[device] : 0;
  if (count == 0) {
    check("multiprocessors", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    if (device < kDevices) known[device] = count;
  }
  return count;
#endif
}

// 10 major + minor of a device's compute capability; when emulated what set_architecture says.
#ifdef LLAMA_FAST_EMULATE
inline int& emulated_architecture() {
  static int value = 80;
  return value;
}
inline int architecture(int) { return emulated_architecture(); }
#else
inline int architecture(int device) {
  int major = 0, minor = 0;
  check("architecture", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check("architecture", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}
#endif

// A launch of `blocks` blocks of `threads` threads.
inline Launch launch_of(const char* op, Stream s, dim3 blocks, int64_t threads, size_t dynamic_shared = 0) {
  return {op, blocks, dim3(static_cast<unsigned>(threads)), dynamic_shared, static_cast<cudaStream_t>(s.handle)};
}

inline dim3 grid(int64_t x, int64_t y = 1, int64_t z = 1) {
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace llama_fast::cuda
