// What goes on in a block beside its threads: copies and products in flight, and the mbarriers that they complete on.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "block.h"
#include "hopper.h"

namespace llama_fast::emulator {

constexpr int kGroup = 128;  // threads of a warpgroup

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
    int agent = 0;        // of the race checker: the copies that complete on it
    int owner = 0;        // the thread that initialized it
    Clock stamp = 0;      // of that
    bool fenced = false;  // by a fence.mbarrier_init
    Channel channel;
    KnowledgeRef behind;  // what waiting for the last complete phase orders
  };
  struct Copy {
    enum Kind { load, store, add } kind = load;
    bool tensor = false;
    TensorMap map;
    std::array<int, 5> at{};
    uint64_t global = 0;
    uint32_t shared = 0, bytes = 0, mbarrier = 0;
    int thread = 0, group = 0;  // of a store
    Clock clock = 0;
    const char* name() const { return tensor ? (kind == load ? "TMA load" : "TMA store") : "cp.async.bulk"; }
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
    bool at_once;
  };
  struct Accumulator {
    float* d[128] = {};
    int n = 0, last_group = 0, collected = 0;
    bool has[128] = {};         // by thread, whether it has got its part back
    std::vector<float> values;  // [64][n]
    void gather();              // from every thread's registers
    void scatter(int thread) const;
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
    int agent = -1;                     // of the race checker: the first of one a warp
    std::vector<Clock> clock_of_group;  // of the last product of each group
  };
  struct PerThread {
    int bulk_committed = 0, wgmma_committed = 0;
    int bulk_agent = -1;
    std::vector<Clock> bulk_clocks;                        // of the last store of each group
    bool wgmma_fenced = false;                             // since the last wgmma.wait_group
    int sleeps = 0;                                        // nanosleep
    std::map<const float*, std::vector<float>> registers;  // accumulators as they were at the last fence or wait
  };
  struct Registers {
    int count = 0;           // a thread's
    std::vector<int> asked;  // by each setmaxnreg
  };
  std::array<Registers, kMaxWarps> registers;  // by warp
  std::vector<int> waiting_for_registers;
  int idle = 0;                   // nanosleeps since a thread of the block did something else
  int64_t switches_at_sleep = 0;  // Block::count_switches, at the last nanosleep

  // Checks that it is there, and that its initialization lies behind the thread.
  MBarrier& mbarrier(uint32_t address, const char* op, bool by_async_proxy = false);
  void settle(uint32_t address);  // completes the phase if nothing is pending
  void execute(Accumulator& accumulator, Product& product);
  void finish_at_once(Warpgroup& group, Product& product);
  void perform(const Copy& copy);
  void issue(Copy& copy);
  void issue(int warpgroup);
  void check_registers(int warpgroup, bool fresh);
  int free_registers() const;  // of those that the block was launched with
  void check_operand(int warpgroup, Clock clock, uint64_t matrix, int size, bool mn_major, const char* op);

  Block& block_;
  std::map<uint32_t, MBarrier> mbarriers;
  std::deque<Copy> copies;
  std::array<Warpgroup, kMaxThreads / kGroup> warpgroups;
  std::vector<PerThread> threads;
};

// Of the thread that runs.
inline Thread& self() { return block().self(); }
inline AsyncUnits& units() { return block().async(); }
inline AsyncUnits::PerThread& mine() { return units().threads[self().id]; }

}  // namespace llama_fast::emulator
