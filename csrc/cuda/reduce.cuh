// Sums and maxima over the threads of a block, in an order that depends on the block's size alone.
#pragma once

#include "device.cuh"

namespace llama_fast::cuda {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFU;
constexpr float kInfinity = __builtin_huge_valf();

struct Add {
  static constexpr float kIdentity = 0.0F;
  LLAMA_FAST_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Max {
  static constexpr float kIdentity = -kInfinity;
  LLAMA_FAST_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Every lane gets the result.
template <class Op>
LLAMA_FAST_DEVICE float warp_reduce(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = Op{}(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// Over a block of whole warps; every thread gets the result. `scratch` [kMaxWarps] is free again after the next
// barrier, so reductions that follow each other alternate between two.
template <class Op>
LLAMA_FAST_DEVICE float block_reduce(float x, Shared<float> scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  x = warp_reduce<Op>(x);
  if (warps == 1) return x;
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  float other = Op::kIdentity;
  if (lane < warps) other = scratch[lane];
  return warp_reduce<Op>(other);
}

}  // namespace llama_fast::cuda
