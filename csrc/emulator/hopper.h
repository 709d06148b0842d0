// The instructions of csrc/cuda/ptx_sm90.cuh, executed by the calling thread of an emulated block: mbarriers, the
// tensor memory accelerator's copies and the warpgroup's matrix products, all of which go on while the thread does.
#pragma once

#include <array>
#include <cstdint>

#include "pointer.h"
#include "semantics.h"

namespace llama_fast::emulator {

// Stands for a CUtensorMap, and has its size, so that parameters lie where the device has them. A tensor of up to 5
// dimensions in global memory, the first contiguous, and the box of it that a copy moves. Elements past the tensor's
// end are read as zeros and not written.
struct alignas(128) TensorMap {
  uint64_t base = 0;  // a mapped address
  int rank = 0, element_bytes = 0;
  Swizzle swizzle = Swizzle::none;
  int64_t size[5] = {}, stride[5] = {};  // elements; bytes, stride[0] = element_bytes
  int box[5] = {};                       // elements
  int box_bytes() const;
};
static_assert(sizeof(TensorMap) == 128);

void mbarrier_init(uint32_t address, int count);
void mbarrier_arrive(uint32_t address, int transaction_bytes);
void mbarrier_expect_tx(uint32_t address, int transaction_bytes);
void mbarrier_wait(uint32_t address, uint32_t parity);
void fence_mbarrier_init();
void fence_proxy_async();

void tma_load(uint32_t destination, const TensorMap& map, uint32_t mbarrier, std::array<int, 5> coordinates);
void tma_store(const TensorMap& map, uint32_t source, std::array<int, 5> coordinates);
void bulk_load(uint32_t destination, GlobalAddress source, uint32_t bytes, uint32_t mbarrier);
void bulk_store(GlobalAddress destination, uint32_t source, uint32_t bytes, bool add_f32);
void bulk_commit_group();
void bulk_wait_group(int pending, bool read_only);

// d [N / 2] of each thread; a: 4 registers, or nullptr where `a_matrix` describes A.
void wgmma(Half type, int n, float* d, const uint32_t* a, uint64_t a_matrix, uint64_t b_matrix, bool accumulate,
           bool a_transposed, bool b_transposed);
// The same, finished on return: for the PTX interpreter, whose registers have no addresses. The race checker still
// takes the operands in shared memory for in use until the wait.
void wgmma_at_once(Half type, int n, float* d, const uint32_t* a, uint64_t a_matrix, uint64_t b_matrix, bool accumulate,
                   bool a_transposed, bool b_transposed);
void wgmma_fence();
void wgmma_commit_group();
void wgmma_wait_group(int pending);
void wgmma_use(const float* d);

void set_max_registers(int count, bool increase);
bool elect_sync(uint32_t mask);

}  // namespace llama_fast::emulator
