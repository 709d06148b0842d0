// Tensor maps of TMA, made on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "../ops.h"
#include "ptx_sm90.cuh"

namespace llama_fast::cuda {

// A map of a tensor of 2 to 4 dimensions, seen fastest dimension first: the box covers box[0] elements of the last
// dimension, box[1] of the one named by order[1], and so on. Of bf16 and f16 the box's first side is 64 elements, the
// 128 bytes of the swizzle; f32 is not swizzled. Elements outside the tensor read as 0.
//   order: dimension of `x` for each dimension of the map, fastest first; order[0] is the last one of `x`.
// Throws std::invalid_argument for an address, a stride or a size that TMA cannot take.
template <int kRank>
ptx::TensorMap make_tensor_map(const char* op, const Tensor& x, const int (&order)[kRank], const int (&box)[kRank]) {
  const auto refuse = [op](const std::string& why) {
    throw std::invalid_argument(std::string(op) + ": tensor map: " + why);
  };
  const bool swizzled = x.dtype != DType::f32;
  const int64_t element = swizzled ? 2 : 4;
  if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0) refuse("the address is not aligned to 16 bytes");
  if (order[0] != x.ndim - 1) refuse("the fastest dimension is not the last");
  if (swizzled && box[0] * element != 128) refuse("the box's first side is not the 128 bytes of the swizzle");
  if (box[0] * element % 16 != 0) refuse("the box's first side is not a multiple of 16 bytes");
  uint64_t size[kRank], stride[kRank];
  uint32_t sides[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    size[i] = static_cast<uint64_t>(x.size[order[i]]);
    // the stride of a dimension of size 1 is never used, and may be anything
    stride[i] = static_cast<uint64_t>(i == 0 ? element : x.size[order[i]] == 1 ? 16 : x.stride[order[i]] * element);
    sides[i] = static_cast<uint32_t>(box[i]);
    steps[i] = 1;
    if (size[i] == 0 || size[i] > uint64_t{1} << 32) refuse("a size of " + std::to_string(size[i]));
    if (i > 0 && (stride[i] % 16 != 0 || stride[i] >= uint64_t{1} << 40))
      refuse("a stride of " + std::to_string(stride[i]) + " bytes");
    if (box[i] < 1 || box[i] > 256) refuse("a box side of " + std::to_string(box[i]));
  }
  ptx::TensorMap map;
#ifdef LLAMA_FAST_EMULATE
  map.base = reinterpret_cast<uintptr_t>(x.data);
  map.rank = kRank;
  map.element_bytes = static_cast<int>(element);
  map.swizzle = swizzled ? emulator::Swizzle::bytes128 : emulator::Swizzle::none;
  for (int i = 0; i < kRank; ++i) {
    map.size[i] = static_cast<int64_t>(size[i]);
    map.stride[i] = static_cast<int64_t>(stride[i]);
    map.box[i] = box[i];
  }
  (void)sides, (void)steps;
#else
  // The driver's function, without linking libcuda: the library loads where there is no driver.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) throw std::runtime_error(std::string(op) + ": this driver has no cuTensorMapEncodeTiled");
  const CUtensorMapDataType type = x.dtype == DType::f32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : x.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMapSwizzle swizzle = swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUresult result =
      encode(&map, type, kRank, x.data, size, stride + 1, sides, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled failed with " + std::to_string(result));
#endif
  return map;
}

}  // namespace llama_fast::cuda
