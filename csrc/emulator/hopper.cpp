#include "hopper.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "async.h"
#include "memory.h"

namespace llama_fast::emulator {
namespace {

constexpr int kTransactionLimit = (1 << 20) - 1;

// Of a thread, in a block that has a multiprocessor to itself.
int launch_registers(int threads) { return std::min(65536 / threads / 8 * 8, 256); }

}  // namespace

int TensorMap::box_bytes() const {
  int bytes = element_bytes;
  for (int i = 0; i < rank; ++i) bytes *= box[i];
  return bytes;
}

void AsyncUnits::reset() {
  mbarriers.clear();
  copies.clear();
  for (Warpgroup& g : warpgroups) g = Warpgroup{};
  threads.assign(static_cast<size_t>(block_.thread_count()), PerThread{});
  registers.fill({launch_registers(block_.thread_count()), {}});
  waiting_for_registers.clear();
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------
void mbarrier_init(uint32_t address, int count) {
  Block& b = block();
  std::memset(b.shared_write(b.self(), address, 8, "mbarrier.init"), 0xFF, 8);
  if (count < 1 || count >= 1 << 20) b.fail("mbarrier.init: a count of %d", count);
  AsyncUnits::MBarrier m;
  m.count = m.pending = count;
  m.owner = self().id;
  if (Races* r = b.races()) {
    m.agent = r->new_agents(1);
    m.stamp = r->stamp(m.owner);
  }
  units().mbarriers[address] = m;
}

AsyncUnits::MBarrier& AsyncUnits::mbarrier(uint32_t address, const char* op, bool by_async_proxy) {
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) block_.fail("%s: there is no mbarrier at shared address 0x%x", op, address);
  MBarrier& m = found->second;
  if (Races* r = block_.races())
    r->check_object(block_.self().id, m.owner, m.stamp, address, by_async_proxy && options().proxy_fences, m.fenced,
                    op);
  return m;
}

void AsyncUnits::settle(uint32_t address) {
  MBarrier& m = mbarriers[address];
  if (m.pending < 0) block_.fail("mbarrier 0x%x: more arrivals in a phase than its count of %d", address, m.count);
  if (m.transactions > kTransactionLimit || m.transactions < -kTransactionLimit)
    block_.fail("mbarrier 0x%x: %lld transaction bytes", address, static_cast<long long>(m.transactions));
  if (m.pending != 0 || m.transactions != 0) return;
  ++m.phase;
  m.pending = m.count;
  if (Races* r = block_.races()) m.behind = r->take(m.channel);
  for (int id : m.waiting) block_.make_ready(id);
  m.waiting.clear();
}

void mbarrier_arrive(uint32_t address, int transaction_bytes) {
  AsyncUnits::MBarrier& m = units().mbarrier(address, "mbarrier.arrive");
  m.transactions += transaction_bytes;
  --m.pending;
  if (Races* r = block().races()) r->release(self().id, m.channel);
  units().settle(address);
}

void mbarrier_expect_tx(uint32_t address, int transaction_bytes) {
  units().mbarrier(address, "mbarrier.expect_tx").transactions += transaction_bytes;
  units().settle(address);
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  AsyncUnits::MBarrier& m = units().mbarrier(address, "mbarrier.try_wait");
  if (parity > 1) block().fail("mbarrier.try_wait.parity: a parity of %u", parity);
  if ((m.phase & 1) == parity) {
    const uint32_t phase = m.phase;
    m.waiting.push_back(self().id);
    block().wait("mbarrier.try_wait of shared address", address);
    if (m.phase - phase > 1)
      block().fail(
          "mbarrier 0x%x: two phases ended while this thread waited for the first: on the device it could hang",
          address);
  }
  if (Races* r = block().races()) r->acquire(self().id, m.behind);
}

void fence_mbarrier_init() {
  for (auto& [address, m] : units().mbarriers)
    if (m.owner == self().id) m.fenced = true;
}

void fence_proxy_async() {
  if (Races* r = block().races()) r->fence_proxy(self().id);
}

// ---- copies ---------------------------------------------------------------------------------------------------------
namespace {

void check_map(Block& b, const char* op, const TensorMap& map, uint32_t shared) {
  if (map.rank == 0) b.fail("%s: the tensor map was not encoded", op);
  if (shared % 128 != 0) b.fail("%s: shared address 0x%x is not aligned to 128 bytes", op, shared);
}

}  // namespace

void tma_load(uint32_t destination, const TensorMap& map, uint32_t mbarrier, std::array<int, 5> coordinates) {
  Block& b = block();
  check_map(b, "TMA load", map, destination);
  const auto bytes = static_cast<uint32_t>(map.box_bytes());
  units().mbarrier(mbarrier, "TMA load", true);
  std::memset(b.shared_bytes(destination, bytes, 128, "TMA load"), 0xFF, bytes);  // readable once waited for
  AsyncUnits::Copy c;
  c.kind = AsyncUnits::Copy::load;
  c.tensor = true;
  c.map = map;
  c.at = coordinates;
  c.shared = destination;
  c.bytes = bytes;
  c.mbarrier = mbarrier;
  units().issue(c);
}

void tma_store(const TensorMap& map, uint32_t source, std::array<int, 5> coordinates) {
  Block& b = block();
  check_map(b, "TMA store", map, source);
  AsyncUnits::Copy c;
  c.kind = AsyncUnits::Copy::store;
  c.tensor = true;
  c.map = map;
  c.at = coordinates;
  c.shared = source;
  c.bytes = static_cast<uint32_t>(map.box_bytes());
  b.shared_bytes(source, c.bytes, 128, "TMA store");
  units().issue(c);
}

void bulk_load(uint32_t destination, GlobalAddress source, uint32_t bytes, uint32_t mbarrier) {
  Block& b = block();
  if (bytes % 16 != 0) b.fail("cp.async.bulk: %u bytes are not a multiple of 16", bytes);
  units().mbarrier(mbarrier, "cp.async.bulk", true);
  global_at(source.value, bytes, 16, "cp.async.bulk", Use::none);
  std::memset(b.shared_bytes(destination, bytes, 16, "cp.async.bulk"), 0xFF, bytes);
  AsyncUnits::Copy c;
  c.kind = AsyncUnits::Copy::load;
  c.global = source.value;
  c.shared = destination;
  c.bytes = bytes;
  c.mbarrier = mbarrier;
  units().issue(c);
}

void bulk_store(GlobalAddress destination, uint32_t source, uint32_t bytes, bool add_f32) {
  Block& b = block();
  if (bytes % 16 != 0) b.fail("cp.async.bulk: %u bytes are not a multiple of 16", bytes);
  global_at(destination.value, bytes, 16, "cp.async.bulk", Use::none);
  b.shared_bytes(source, bytes, 16, "cp.async.bulk");
  AsyncUnits::Copy c;
  c.kind = add_f32 ? AsyncUnits::Copy::add : AsyncUnits::Copy::store;
  c.global = destination.value;
  c.shared = source;
  c.bytes = bytes;
  units().issue(c);
}

namespace {

// Calls f(address, bytes) for the parts of a copy's global memory that lie in one piece.
template <class F>
void each_row(const AsyncUnits::Copy& copy, F&& f) {
  if (!copy.tensor) return f(copy.global, size_t{copy.bytes});
  const TensorMap& map = copy.map;
  const int64_t first = std::max(copy.at[0], 0), last = std::min<int64_t>(copy.at[0] + map.box[0], map.size[0]);
  int rows = 1;
  for (int d = 1; d < map.rank; ++d) rows *= map.box[d];
  for (int row = 0; row < rows && first < last; ++row) {
    bool inside = true;
    uint64_t at = map.base + static_cast<uint64_t>(first * map.stride[0]);
    for (int d = 1, rest = row; d < map.rank; rest /= map.box[d], ++d) {
      const int64_t x = int64_t{copy.at[d]} + rest % map.box[d];
      inside = inside && x >= 0 && x < map.size[d];
      at += static_cast<uint64_t>(x * map.stride[d]);
    }
    if (inside) f(at, static_cast<size_t>((last - first) * map.element_bytes));
  }
}

}  // namespace

void AsyncUnits::issue(Copy& copy) {
  copy.thread = block_.self().id;
  PerThread& t = threads[copy.thread];
  copy.group = t.bulk_committed;
  if (Races* r = block_.races()) {
    copy.clock = r->tick();
    if (copy.kind == Copy::load) {
      r->agent_write(copy.thread, mbarriers[copy.mbarrier].agent, copy.clock, copy.shared, copy.bytes, copy.name());
      each_row(copy, [&](uint64_t at, size_t bytes) {
        check_global(at, bytes, copy.thread, copy.thread, r->stamp(copy.thread), Use::read, copy.name());
      });
    } else {
      if (t.bulk_agent < 0) t.bulk_agent = r->new_agents(2);  // reads of shared memory, writes to global memory
      each_row(copy, [&](uint64_t at, size_t bytes) {
        const Use use = copy.kind == Copy::add ? Use::atomic : Use::write;
        check_global(at, bytes, copy.thread, block_.thread_count() + t.bulk_agent + 1, copy.clock, use, copy.name());
      });
      t.bulk_clocks.resize(static_cast<size_t>(copy.group) + 1);
      t.bulk_clocks[copy.group] = copy.clock;
      r->agent_read(&copy.thread, 1, t.bulk_agent, 1, copy.clock, copy.shared, copy.bytes, copy.name());
    }
  }
  copies.push_back(copy);
}

bool AsyncUnits::land_one(uint32_t pick) {
  // a store without a group never has to land
  size_t n = copies.size();
  if (n == 0) return false;
  const size_t i = pick % n;
  const Copy copy = copies[i];
  copies.erase(copies.begin() + static_cast<int64_t>(i));
  perform(copy);
  return true;
}

namespace {

void add_floats(char* to, const char* from, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += 4) {
    float x, old, next;
    std::memcpy(&x, from + i, 4);
    auto* target = reinterpret_cast<float*>(to + i);
    __atomic_load(target, &old, __ATOMIC_RELAXED);
    do next = old + x;
    while (!__atomic_compare_exchange(target, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  }
}

}  // namespace

void AsyncUnits::perform(const Copy& copy) {
  const char* op = copy.name();
  char* shared = block_.shared_bytes(0, 0, 1, op);
  if (!copy.tensor) {
    char* global = static_cast<char*>(global_at(copy.global, copy.bytes, 16, op, Use::none));
    if (copy.kind == Copy::load) std::memcpy(shared + copy.shared, global, copy.bytes);
    if (copy.kind == Copy::store) std::memcpy(global, shared + copy.shared, copy.bytes);
    if (copy.kind == Copy::add) add_floats(global, shared + copy.shared, copy.bytes);
  } else {
    const TensorMap& map = copy.map;
    const auto width = static_cast<uint32_t>(map.element_bytes);
    std::array<int, 5> i{};
    for (uint32_t at = copy.shared; at != copy.shared + copy.bytes; at += width) {
      bool inside = true;
      uint64_t global = map.base;
      for (int d = 0; d < map.rank; ++d) {
        const int64_t x = int64_t{copy.at[d]} + i[d];
        inside = inside && x >= 0 && x < map.size[d];
        global += static_cast<uint64_t>(x * map.stride[d]);
      }
      char* element = shared + swizzled(map.swizzle, at);
      if (copy.kind == Copy::load && !inside) std::memset(element, 0, width);
      if (inside) {
        char* outer = static_cast<char*>(global_at(global, width, width, op, Use::none));
        std::memcpy(copy.kind == Copy::load ? element : outer, copy.kind == Copy::load ? outer : element, width);
      }
      for (int d = 0; d < map.rank && ++i[d] == map.box[d]; ++d) i[d] = 0;
    }
  }
  if (copy.kind == Copy::load) {
    MBarrier& m = mbarriers[copy.mbarrier];
    m.transactions -= copy.bytes;
    if (Races* r = block_.races()) r->release_agent(m.agent, copy.clock, m.channel);
    settle(copy.mbarrier);
  }
}

void bulk_commit_group() { ++mine().bulk_committed; }

void bulk_wait_group(int pending, bool reads_alone) {
  AsyncUnits& u = units();
  const int id = self().id, through = mine().bulk_committed - pending;
  for (size_t i = 0; i < u.copies.size();) {
    const AsyncUnits::Copy copy = u.copies[i];
    if (copy.kind == AsyncUnits::Copy::load || copy.thread != id || copy.group >= through) {
      ++i;
      continue;
    }
    u.copies.erase(u.copies.begin() + static_cast<int64_t>(i));
    u.perform(copy);
  }
  if (Races* r = block().races())
    for (size_t group = 0; group < mine().bulk_clocks.size() && static_cast<int>(group) < through; ++group)
      for (int agent = 0; agent < (reads_alone ? 1 : 2); ++agent)
        r->learn(id, mine().bulk_agent + agent, mine().bulk_clocks[group]);
}

void AsyncUnits::thread_exits(const Thread& t) {
  const PerThread& p = threads[t.id];
  for (const Copy& copy : copies)
    if (copy.kind != Copy::load && copy.thread == t.id)
      block_.fail("the thread exits with a bulk store in flight whose shared memory it has not waited for (%s)",
                  copy.group < p.bulk_committed ? "committed" : "not committed");
  for (const auto& [key, acc] : warpgroups[t.id / kGroup].accumulators)
    if (!acc.has[t.id % kGroup]) block_.fail("the thread exits with a wgmma in flight");
}

void AsyncUnits::block_ends() {
  if (!copies.empty())
    block_.fail("the block ends with a copy to its shared memory in flight: mbarrier 0x%x was not waited for",
                copies.front().mbarrier);
}

// ---- the rest -------------------------------------------------------------------------------------------------------
// A block has the registers that it was launched with: those of the bounds (threads, 1), for which ptxas compiles a
// kernel with setmaxnreg. The warps of a warpgroup ask for the same.
void set_max_registers(int count, bool increase) {
  Block& b = block();
  AsyncUnits& u = units();
  const char* op = increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
  if (count % 8 != 0 || count < 24 || count > 256)
    b.fail("%s: %d registers, not a multiple of 8 in 24..256", op, count);
  if (self().lane == 0) {
    constexpr int kGroupWarps = kGroup / kWarp;
    AsyncUnits::Registers& mine = u.registers[self().warp];
    if (increase ? count < mine.count : count > mine.count)
      b.fail("%s: to %d registers a thread from %d", op, count, mine.count);
    for (int w = self().warp / kGroupWarps * kGroupWarps, end = w + kGroupWarps; w < end; ++w) {
      const std::vector<int>& other = u.registers[w].asked;
      if (other.size() > mine.asked.size() && other[mine.asked.size()] != count)
        b.fail("%s: %d registers, %d in another warp of the warpgroup", op, count, other[mine.asked.size()]);
    }
    mine.asked.push_back(count);
    while (count - mine.count > u.free_registers()) {
      u.waiting_for_registers.push_back(self().id);
      b.wait("setmaxnreg.inc, for registers that others have", count);
    }
    mine.count = count;
    for (int id : u.waiting_for_registers) b.make_ready(id);
    u.waiting_for_registers.clear();
  }
  bool here = true;
  b.collective(op, ~0u, &here, [](void* const*) {});
}

int AsyncUnits::free_registers() const {
  const int warps = (block_.thread_count() + kWarp - 1) / kWarp;
  int free = warps * launch_registers(block_.thread_count());
  for (int w = 0; w < warps; ++w) free -= registers[w].count;
  return free;
}

bool elect_sync(uint32_t mask) {
  struct Lane {
    bool elected;
  } me{false};
  block().collective("elect.sync", mask, &me,
                     [mask](void* const* lanes) { static_cast<Lane*>(lanes[__builtin_ctz(mask)])->elected = true; });
  return me.elected;
}

void sleep() {
  constexpr int kMostSleeps = 1 << 22, kMostIdle = 1 << 19;
  Block& b = block();
  AsyncUnits& u = units();
  if (++mine().sleeps > kMostSleeps)
    b.fail("nanosleep: %d times; what this thread waits for does not come", kMostSleeps);
  u.idle = b.count_switches == u.switches_at_sleep + 1 ? u.idle + 1 : 0;
  u.switches_at_sleep = b.count_switches;
  if (u.idle > 2 * kGroup) {  // all that is left of the block waits for another one
    if (u.idle > kMostIdle) b.fail("nanosleep: what the whole block waits for does not come");
    --mine().sleeps;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  b.async().land_one(0);
  b.make_ready(b.self().id);
  b.wait("nanosleep");
}

}  // namespace llama_fast::emulator
