// Launching a kernel, the same source for the device and for an emulated build.
#pragma once

#include <stdexcept>
#include <string>

#include "device.cuh"

namespace llama_fast::cuda {

struct Launch {
  const char* op;  // the primitive, named in errors
  dim3 grid;
  dim3 block;
  size_t dynamic_shared = 0;  // bytes
  cudaStream_t stream = nullptr;
};

// Whether each launch is waited for, so that a fault names its op. For finding faults: off unless asked for.
inline bool& synchronous() {
  static bool value = false;
  return value;
}

#ifdef LLAMA_FAST_EMULATE

// Runs the kernel to its end. Throws std::runtime_error with the fault's report.
template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  [&](const Parameters&... values) {
    const auto call = [&] { kernel(values...); };
    const emulator::Parameter parameters[] = {{&values, sizeof(Parameters), alignof(Parameters)}...};
    emulator::launch_grid(
        how.op, how.grid, how.block, how.dynamic_shared,
        {reinterpret_cast<const void*>(kernel), [](const void* f) { (*static_cast<decltype(&call)>(f))(); }, &call,
         parameters, static_cast<int>(sizeof...(Parameters))});
  }(Parameters(arguments)...);
}

#else

inline void check(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  std::string text = std::string(op) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorIllegalAddress || status == cudaErrorLaunchFailure || status == cudaErrorMisalignedAddress ||
      status == cudaErrorIllegalInstruction || status == cudaErrorAssert)
    text += synchronous() ? " (in this op's kernel)"
                          : " (in a kernel that was queued before, by any op; LLAMA_FAST_LOG=debug names the op)";
  throw std::runtime_error(text);
}

// Starts the kernel on the stream. Throws std::runtime_error where the launch is refused. A fault in the kernel comes
// up at the next launch or synchronization, or, when synchronous, at once.
template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  constexpr size_t kSharedWithoutAsking = 48 << 10;
  if (how.dynamic_shared > kSharedWithoutAsking)
    check(how.op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(how.dynamic_shared)));
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.dynamic_shared;
  config.stream = how.stream;
  check(how.op, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  if (synchronous()) check(how.op, cudaStreamSynchronize(how.stream));
}

#endif

}  // namespace llama_fast::cuda
