// Finds two accesses to shared memory that nothing orders, whatever order the schedule happened to give them.
//
// Happens-before by vector clocks. Actors are the threads, and behind them the asynchronous agents: an mbarrier stands
// for the copies that complete on it, a warpgroup for its products, a thread's stores in bulk for themselves. Each
// actor has a clock; an access is stamped with it. A thread knows up to which clock the others' accesses lie behind it:
// `seen`. And up to which clock their ordinary stores lie behind a fence.proxy.async that lies behind it: `fenced`,
// which is what TMA and wgmma need. Synchronizing passes both on. Threads that have synchronized share one immutable
// Knowledge.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace llama_fast::emulator {

class Block;

using Clock = uint32_t;

// What is known of other blocks of the grid: up to which clocks the accesses of their actors lie behind.
using Foreign = std::map<int64_t, std::shared_ptr<const std::vector<Clock>>>;  // by block
using ForeignRef = std::shared_ptr<const Foreign>;
ForeignRef join(const ForeignRef& a, const ForeignRef& b);

struct Knowledge {
  int references = 0;
  std::vector<Clock> seen, fenced;  // by actor
  ForeignRef foreign = nullptr;
};

// A counted pointer; a block is one OS thread's, so the count is a plain one.
class KnowledgeRef {
 public:
  KnowledgeRef() = default;
  explicit KnowledgeRef(Knowledge* k) : k_(k) { acquire(); }
  KnowledgeRef(const KnowledgeRef& other) : k_(other.k_) { acquire(); }
  KnowledgeRef(KnowledgeRef&& other) noexcept : k_(std::exchange(other.k_, nullptr)) {}
  KnowledgeRef& operator=(KnowledgeRef other) noexcept {
    std::swap(k_, other.k_);
    return *this;
  }
  ~KnowledgeRef() {
    if (k_ != nullptr && --k_->references == 0) delete k_;
  }
  const Knowledge* get() const { return k_; }
  const Knowledge* operator->() const { return k_; }
  bool operator==(const KnowledgeRef& other) const { return k_ == other.k_; }

 private:
  void acquire() {
    if (k_ != nullptr) ++k_->references;
  }
  Knowledge* k_ = nullptr;
};

// What was passed to a barrier by those who arrived.
class Channel {
 public:
  bool empty() const { return sum_.get() == nullptr; }

 private:
  friend class Races;
  KnowledgeRef sum_;  // not shared until it is taken
  std::vector<KnowledgeRef> joined_;
};

class Races {
 public:
  explicit Races(Block& block) : block_(block) {}
  void reset(int threads);

  // ---- what orders --------------------------------------------------------------------------------------------------
  // The thread's accesses so far go into the channel.
  void release(int thread, Channel& channel);
  // What an agent did up to `clock` goes into the channel.
  void release_agent(int agent, Clock clock, Channel& channel);
  // Empties the channel.
  KnowledgeRef take(Channel& channel);
  void acquire(int thread, const KnowledgeRef& knowledge);
  void acquire(const std::vector<int>& threads, const KnowledgeRef& knowledge);
  // All of them synchronize with each other.
  void synchronize(const int* threads, int count);
  void fence_proxy(int thread);

  bool knows_the_same(int thread, int other) const { return actors_[thread].knows == actors_[other].knows; }

  // The first of `count` new ones.
  int new_agents(int count);
  Clock tick() { return ++time_; }
  // What the agent did up to `clock` lies behind the thread.
  void learn(int thread, int agent, Clock clock);

  // ---- between blocks -----------------------------------------------------------------------------------------------
  // What lies behind the thread, for others.
  ForeignRef publish(int thread);
  void learn(int thread, const ForeignRef& foreign);
  // Whether an access of a block's actor lies behind the thread.
  bool ordered(int thread, int64_t block, int actor, Clock clock) const;
  const char* name(int actor);

  // ---- accesses of a thread -----------------------------------------------------------------------------------------
  void read(int thread, uint32_t address, uint32_t bytes, const char* op);
  void write(int thread, uint32_t address, uint32_t bytes, const char* op);
  // The destination of a cp.async, from its start until the thread has waited.
  void begin_copy(int thread, uint32_t address, uint32_t bytes, const char* op);
  void end_copy(int thread, uint32_t address, uint32_t bytes, const char* op);

  // ---- accesses of an agent, started by threads ---------------------------------------------------------------------
  // `agents`: how many read, from `agent` on.
  void agent_read(const int* threads, int count, int agent, int agents, Clock clock, uint32_t address, uint32_t bytes,
                  const char* op);
  void agent_write(int thread, int agent, Clock clock, uint32_t address, uint32_t bytes, const char* op);

  // An mbarrier: the stamp of its initialization, whether it is still what was last written there, and whether it lies
  // behind the thread.
  Clock stamp(int thread) const { return actors_[thread].now; }
  void check_object(int thread, int owner, Clock stamp, uint32_t address, bool by_async_proxy, bool fenced,
                    const char* what);

 private:
  enum class Kind : uint8_t { ordinary, agent, copying };
  struct Reader {
    Clock clock;
    uint32_t lanes;  // of the group
    int group;       // warp, or kAgentGroup + first of up to 32 agents
    const char* op;
  };
  struct Cell {
    uint32_t generation = 0;
    int split = -1;  // index of the 16 cells of single bytes
    int writer = -1;
    Clock clock = 0;
    Kind kind = Kind::ordinary;
    const char* op = nullptr;
    std::vector<Reader> readers;
  };
  struct Actor {
    Clock now = 0, fenced = 0;
    KnowledgeRef knows;
  };

  Cell& granule(uint32_t index);
  void divide(Cell& cell);
  template <class F>
  void each(uint32_t address, uint32_t bytes, bool unite, F&& f);
  static KnowledgeRef join(const KnowledgeRef& a, const KnowledgeRef& b);
  bool behind(int thread, int actor, Clock clock) const;
  bool fenced_behind(int thread, int actor, Clock clock) const;
  void require_written(int thread, const Cell& cell, uint32_t at, const char* verb, const char* op);
  void require_written_async(int thread, const Cell& cell, uint32_t at, const char* verb, const char* op);
  void require_read(int thread, const Cell& cell, uint32_t at, const char* op);
  void add_reader(int thread, Cell& cell, Clock clock, uint32_t lanes, int group, const char* op);
  static void set_writer(Cell& cell, int writer, Clock clock, Kind kind, const char* op);
  int actor(int group, uint32_t lanes) const;

  Block& block_;
  int threads_ = 0, agents_ = 0;
  Clock time_ = 0;
  uint32_t generation_ = 0;
  std::vector<Actor> actors_;
  std::vector<Cell> cells_;                    // one for 16 bytes
  std::vector<std::array<Cell, 16>> divided_;  // those of which parts were accessed
  std::vector<int> free_divided_;
  struct {
    KnowledgeRef from, with, result;
  } last_join_, last_learnt_;
  char name_[64];
};

}  // namespace llama_fast::emulator
