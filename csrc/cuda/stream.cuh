// What a launcher needs of the device that its stream belongs to.
#pragma once

#include <atomic>

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

#ifdef LLAMA_FAST_EMULATE

// Streaming multiprocessors of a device, what set_multiprocessors says: so few that loops over them have more than one
// turn.
inline int64_t& emulated_multiprocessors() {
  static int64_t value = 4;
  return value;
}
inline int64_t multiprocessors(int) { return emulated_multiprocessors(); }
// 10 major + minor of a device's compute capability: what set_architecture says.
inline int& emulated_architecture() {
  static int value = 80;
  return value;
}
inline int architecture(int) { return emulated_architecture(); }

#else

// 1000 multiprocessors + 10 major + minor; the driver is asked once.
inline int properties(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int found = device < kDevices ? known[device].load() : 0;
  if (found == 0) {
    int count = 0, major = 0, minor = 0;
    check("attributes of the device", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    check("attributes of the device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check("attributes of the device", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    found = 1000 * count + 10 * major + minor;
    if (device < kDevices) known[device] = found;
  }
  return found;
}

inline int64_t multiprocessors(int device) { return properties(device) / 1000; }
inline int architecture(int device) { return properties(device) % 1000; }

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
