// The instructions of csrc/cuda/ptx_sm90.cuh, executed by the calling thread of an emulated block: mbarriers, the
// tensor memory accelerator's copies and the warpgroup's matrix products, all of which go on while the thread does.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "block.h"
#include "memory.h"
#include "semantics.h"

namespace llama_fast::emulator {

// Stands for a CUtensorMap: a tensor of up to 5 dimensions in global memory, the first contiguous, and the box of it
// that a copy moves. Elements past the tensor's end are read as zeros and not written.
struct TensorMap {
  uint64_t base = 0;  // a mapped address
  int rank = 0, element_bytes = 0;
  Swizzle swizzle = Swizzle::none;
  int64_t size[5] = {}, stride[5] = {};  // elements; bytes, stride[0] = element_bytes
  int box[5] = {};                       // elements
  int box_bytes() const;
};

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
void wgmma_fence();
void wgmma_commit_group();
void wgmma_wait_group(int pending);
void wgmma_use(const float* d);

void set_max_registers(int count);
bool elect_sync(uint32_t mask);

// What a block's asynchronous units are at.
class AsyncUnits {
 public:
  explicit AsyncUnits(Block& b) : block_(b) {}
  void reset();
  // Performs one copy that is in flight, `pick` of those; false if there is none.
  bool land_one(uint32_t pick);
  // Called by a thread that exits: what it left in flight is a fault.
  void thread_exits(const Thread& t);
  void block_ends();

  struct MBarrier {
    int count = 0, pending = 0;
    int64_t transactions = 0;
    uint32_t phase = 0;
    std::vector<int> waiting;
  };
  struct Copy {
    enum Kind { load, store, add } kind = load;
    bool tensor = false;
    TensorMap map;
    std::array<int, 5> at{};
    uint64_t global = 0;
    uint32_t shared = 0, bytes = 0, mbarrier = 0;
    int thread = 0, group = 0;  // of a store
  };
  struct Product {
    Half type;
    int n;
    bool a_from_registers, accumulate, a_transposed, b_transposed;
    uint64_t a_matrix, b_matrix;
    int group;
    std::vector<uint32_t> a;  // [128][4]
    size_t accumulator;
    bool done;
  };
  struct Accumulator {
    float* d[128] = {};
    int n = 0, last_group = 0, collected = 0;
    bool has[128] = {};         // by thread, whether it has got its part back
    std::vector<float> values;  // [64][n]
  };
  struct Call {
    Product product;
    float* d;
    const uint32_t* a;
  };
  struct Warpgroup {
    int arrived = 0;
    Call* calls[128];
    std::deque<Product> products;  // in order of issue; the done ones at the front go away
    std::map<size_t, Accumulator> accumulators;
    size_t next_accumulator = 0;
    int registers = 0;
  };
  struct PerThread {
    int bulk_committed = 0, wgmma_committed = 0;
    bool wgmma_fenced = false;
  };

  MBarrier& mbarrier(uint32_t address, const char* op);
  void settle(uint32_t address);  // completes the phase if nothing is pending
  void execute(Warpgroup& group, Product& product);
  void perform(const Copy& copy);
  void issue(Copy copy);
  void issue(int warpgroup);

  Block& block_;
  std::map<uint32_t, MBarrier> mbarriers;
  std::deque<Copy> copies;
  std::array<Warpgroup, kMaxThreads / 128> warpgroups;
  std::vector<PerThread> threads;
};

}  // namespace llama_fast::emulator
