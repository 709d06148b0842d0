// One block of a CUDA grid: a fiber for each of its threads, and what they wait for each other at. Everything in here
// is used by one OS thread; blocks of a grid run on several.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "device.h"
#include "fiber.h"
#include "race.h"

namespace llama_fast::emulator {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kBarriers = 16;
constexpr size_t kMaxShared = 227 << 10;  // of an H100; what an sm_80 kernel may ask for is its launcher's business

// What a kernel is run under. One value for the process: tests set it between launches.
struct Options {
  uint64_t seed = 0;         // 0: threads run in order; else: a permutation of the schedule for each
  bool race_check = true;    // of shared and global memory
  int workers = 2;           // OS threads, each with a block of its own at a time
  bool proxy_fences = true;  // the checks of fence.proxy.async and fence.mbarrier_init
};
Options& options();

// Counts of the last launches, until reset.
struct Counters {
  int64_t launches, blocks, switches, mma, wgmma, ldmatrix, bank_conflicts;
};
Counters counters();
void reset_counters();

class AsyncUnits;

// A CUDA thread.
struct Thread {
  uint3 index{};
  int id = 0, warp = 0, lane = 0;
  bool exited = false;
  const char* waits_for = "";  // while it is blocked, and a number that belongs to it; for the report of a deadlock
  int64_t waits_for_number = -1;
  Fiber fiber;

  struct Copy {  // a cp.async whose data has not landed
    uint32_t destination;
    int group;
    uint8_t data[16];
  };
  std::vector<Copy> copies;
  int groups_committed = 0;
};

class Block {
 public:
  explicit Block(int threads_at_most);
  ~Block();

  // Runs the block to its end. Gives false after fail().
  bool run(uint3 index, dim3 grid, dim3 shape, size_t dynamic_shared, const KernelCall& kernel, uint64_t seed);
  std::string error() const { return error_; }

  // ---- of the thread that runs --------------------------------------------------------------------------------------
  Thread& self() { return *self_; }
  uint3 index() const { return index_; }
  dim3 grid() const { return grid_; }
  dim3 shape() const { return shape_; }
  int thread_count() const { return thread_count_; }
  int64_t number() const {  // of the block in its grid
    return (int64_t{index_.z} * grid_.y + index_.y) * grid_.x + index_.x;
  }

  // Ends the block with a report that names the thread. Does not return.
  [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));
  [[noreturn]] void fail(const char* format, va_list arguments);

  // Gives way until make_ready(self().id); `what` and `number` say in a deadlock's report what is waited for.
  void wait(const char* what, int64_t number = -1);
  void make_ready(int thread) { ready_.push_back(thread); }

  // bar.sync and bar.arrive. `count` threads take part; 0: every thread that has not exited.
  void barrier(int id, int count, bool wait_for_others);

  // A rendezvous of the lanes of `mask` in the same instruction `op`; the last one to come runs `execute` for all of
  // them, on `each`, their `mine` by lane (nullptr for a lane that takes no part).
  template <class Execute>
  void collective(const char* op, uint32_t mask, void* mine, Execute&& execute) {
    Meeting& meeting = meet(op, mask);
    meeting.argument[self_->lane] = mine;
    if (!everyone_came(meeting)) return;
    execute(static_cast<void* const*>(meeting.argument));
    release(meeting);
  }

  // ---- shared memory ------------------------------------------------------------------------------------------------
  // Address of an array declared in a kernel, the same for each thread that passes; `key` identifies the declaration.
  uint32_t static_shared(const void* key, size_t bytes, size_t alignment);
  // Checks bounds, alignment and races; gives the bytes. `thread` is the one in whose name it happens.
  const char* shared_read(const Thread& thread, uint32_t address, uint32_t bytes, const char* op);
  char* shared_write(const Thread& thread, uint32_t address, uint32_t bytes, const char* op);
  // Checks bounds and alignment alone.
  char* shared_bytes(uint32_t address, uint32_t bytes, uint32_t alignment, const char* op);

  AsyncUnits& async() { return *async_; }
  // nullptr where options().race_check is off
  Races* races() { return options().race_check ? &races_ : nullptr; }

  Thread& thread(int id) { return *threads_[id]; }
  Thread& lane_of_warp(int lane) { return *threads_[self_->warp * kWarp + lane]; }
  int64_t count_switches = 0, count_mma = 0, count_wgmma = 0, count_ldmatrix = 0, count_bank_conflicts = 0;

 private:
  struct Meeting {
    uint32_t mask = 0, arrived = 0;
    const char* op = nullptr;
    void* argument[kWarp];
  };
  struct Barrier {
    int arrived = 0, count = 0;
    std::vector<int> waiting;
    Channel channel;
  };

  static void thread_main();
  int next_ready();
  void give_way();
  [[noreturn]] void deadlock();
  [[noreturn]] void leave();
  Meeting& meet(const char* op, uint32_t mask);
  bool everyone_came(Meeting& meeting);
  void release(Meeting& meeting);
  void open_if_complete(Barrier& barrier);
  void thread_exits();
  uint32_t random();

  uint3 index_{};
  dim3 grid_, shape_;
  int thread_count_ = 0, running_ = 0;
  KernelCall kernel_{};
  std::vector<std::unique_ptr<Thread>> threads_;
  Thread* self_ = nullptr;
  Fiber scheduler_;
  std::vector<int> ready_;
  size_t ready_head_ = 0;
  uint64_t random_state_ = 1;
  std::string error_;
  bool dirty_ = false;  // fibers were left in the middle of a kernel

  std::vector<Meeting> meetings_;  // kMeetings a warp
  Barrier barriers_[kBarriers];
  std::unique_ptr<AsyncUnits> async_;
  Races races_{*this};
  std::vector<char> shared_;
  size_t shared_size_ = 0;
  std::unordered_map<const void*, uint32_t> statics_;
};

// The block that the calling OS thread runs.
Block& block();

}  // namespace llama_fast::emulator
