#include "block.h"

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "async.h"
#include "global_race.h"
#include "ptx_run.h"

namespace llama_fast::emulator {
namespace {

constexpr int kMeetings = 4;  // collectives of one warp with disjoint masks, at once

thread_local Block* current = nullptr;

std::mutex totals_mutex;
Counters totals{};

}  // namespace

Options& options() {
  static Options value;
  return value;
}

Counters counters() {
  const std::lock_guard<std::mutex> lock(totals_mutex);
  return totals;
}

void reset_counters() {
  const std::lock_guard<std::mutex> lock(totals_mutex);
  totals = {};
}

__attribute__((noinline)) Block& block() { return *current; }

Block::Block(int threads_at_most) {
  for (int i = 0; i < threads_at_most; ++i) {
    auto t = std::make_unique<Thread>();
    t->id = i;
    t->warp = i / kWarp;
    t->lane = i % kWarp;
    t->fiber.start(&Block::thread_main);
    threads_.push_back(std::move(t));
  }
  meetings_.resize(static_cast<size_t>(threads_at_most + kWarp - 1) / kWarp * kMeetings);
  shared_.resize(kMaxShared);
  async_ = std::make_unique<AsyncUnits>(*this);
}

Block::~Block() = default;

// ---- schedule -------------------------------------------------------------------------------------------------------
bool Block::run(uint3 index, dim3 grid, dim3 shape, size_t dynamic_shared, const KernelCall& kernel, uint64_t seed) {
  index_ = index;
  grid_ = grid;
  shape_ = shape;
  thread_count_ = running_ = static_cast<int>(shape.x * shape.y * shape.z);
  kernel_ = kernel;
  random_state_ = seed * 0x9E3779B97F4A7C15u + 0x2545F4914F6CDD1Du;
  error_.clear();
  shared_size_ = (dynamic_shared + 15) / 16 * 16;
  std::memset(shared_.data(), 0xFF, shared_size_);  // NaN in bf16, f16 and f32
  statics_.clear();
  for (auto& b : barriers_) b = Barrier{};
  for (auto& m : meetings_) m.arrived = 0;
  ready_.clear();
  ready_head_ = 0;
  for (int i = 0; i < thread_count_; ++i) {
    Thread& t = *threads_[i];
    const unsigned u = static_cast<unsigned>(i);
    t.index = {u % shape.x, u / shape.x % shape.y, u / (shape.x * shape.y)};
    t.exited = false;
    t.copies.clear();
    t.groups_committed = 0;
    make_ready(i);
  }
  races_.reset(thread_count_);
  async_->reset();
  if (dirty_)
    for (auto& t : threads_) t->fiber.start(&Block::thread_main);
  dirty_ = false;
  current = this;
  self_ = threads_[next_ready()].get();
  Fiber::jump(scheduler_, self_->fiber);
  self_ = nullptr;
  current = nullptr;
  return error_.empty();
}

void Block::thread_main() {
  for (;;) {
    Block& b = block();
    b.kernel_.run(b.kernel_.call);
    b.thread_exits();
  }
}

void Block::thread_exits() {
  async_->thread_exits(*self_);
  self_->exited = true;
  for (auto& barrier : barriers_)
    if (barrier.arrived > 0 && barrier.count == 0) open_if_complete(barrier);
  if (--running_ > 0) return give_way();
  async_->block_ends();
  Fiber::jump(self_->fiber, scheduler_);
}

int Block::next_ready() {
  if (ready_head_ == ready_.size()) return -1;
  if (options().seed != 0) {
    const size_t waiting = ready_.size() - ready_head_;
    std::swap(ready_[ready_head_], ready_[ready_head_ + random() % waiting]);
  }
  const int id = ready_[ready_head_++];
  if (ready_head_ == ready_.size()) {
    ready_.clear();
    ready_head_ = 0;
  }
  return id;
}

uint32_t Block::random() {
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return static_cast<uint32_t>(random_state_ >> 20);
}

void Block::give_way() {
  Thread* me = self_;
  // Copies in flight land as late as can be, or with a seed at any time.
  if (options().seed != 0 && random() % 16 == 0) async_->land_one(random());
  int next = next_ready();
  while (next < 0 && async_->land_one(options().seed != 0 ? random() : 0)) next = next_ready();
  if (next < 0) deadlock();
  ++count_switches;
  self_ = threads_[next].get();
  if (self_ != me) Fiber::jump(me->fiber, self_->fiber);
}

void Block::wait(const char* what, int64_t number) {
  self_->waits_for = what;
  self_->waits_for_number = number;
  give_way();
}

void Block::deadlock() {
  std::map<std::string, std::pair<int, std::string>> places;  // what -> threads, which warps
  for (int i = 0; i < thread_count_; ++i) {
    const Thread& t = *threads_[i];
    std::string place = t.exited ? "exited" : t.waits_for;
    if (!t.exited && t.waits_for_number >= 0) {
      char number[24];
      std::snprintf(number, sizeof number, " %#llx", static_cast<long long>(t.waits_for_number));
      place += number;
    }
    auto& [threads, warps] = places[place];
    ++threads;
    const std::string warp = std::to_string(t.warp);
    if (warps.empty() || warps.substr(warps.rfind(',') + 1) != warp) warps += (warps.empty() ? "" : ",") + warp;
  }
  std::string text = "deadlock:";
  for (const auto& [what, who] : places)
    text += " " + std::to_string(who.first) + " threads of warps " + who.second + ": " + what + ";";
  text.pop_back();
  self_ = nullptr;
  fail("%s", text.c_str());
}

void Block::fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fail(format, arguments);
}

void Block::fail(const char* format, va_list arguments) {
  char text[2048];
  std::vsnprintf(text, sizeof text, format, arguments);
  error_ = "block (" + std::to_string(index_.x) + "," + std::to_string(index_.y) + "," + std::to_string(index_.z) + ")";
  if (self_ != nullptr)
    error_ += " thread " + std::to_string(self_->id) + " (warp " + std::to_string(self_->warp) + " lane " +
              std::to_string(self_->lane) + ")";
  error_ += ": ";
  error_ += text;
  leave();
}

void Block::leave() {
  dirty_ = true;
  Fiber abandoned;
  Fiber::jump(self_ != nullptr ? self_->fiber : abandoned, scheduler_);
  __builtin_unreachable();
}

// ---- barriers -------------------------------------------------------------------------------------------------------
void Block::barrier(int id, int count, bool wait_for_others) {
  if (id < 0 || id >= kBarriers) fail("barrier %d: there are %d", id, kBarriers);
  if (count % kWarp != 0 || count < 0 || count > thread_count_)
    fail("barrier %d: a count of %d threads is not a multiple of %d up to the block's %d", id, count, kWarp,
         thread_count_);
  Barrier& b = barriers_[id];
  if (b.arrived > 0 && b.count != count)
    fail("barrier %d: %d threads are expected here, %d by those who wait", id, count, b.count);
  b.count = count;
  ++b.arrived;
  if (Races* r = races()) r->release(self_->id, b.channel);
  if (wait_for_others) b.waiting.push_back(self_->id);
  open_if_complete(b);
  if (wait_for_others) wait("barrier", id);  // the last to come is ready too, and goes on when its turn comes
}

void Block::open_if_complete(Barrier& b) {
  const int needed =
      b.count != 0 ? b.count
                   : thread_count_ - static_cast<int>(std::count_if(threads_.begin(), threads_.begin() + thread_count_,
                                                                    [](const auto& t) { return t->exited; }));
  if (b.arrived < needed) return;
  if (Races* r = races()) r->acquire(b.waiting, r->take(b.channel));
  for (int id : b.waiting) make_ready(id);
  b.arrived = 0;
  b.waiting.clear();
}

// ---- collectives of a warp ------------------------------------------------------------------------------------------
Block::Meeting& Block::meet(const char* op, uint32_t mask) {
  const int lanes = std::min(kWarp, thread_count_ - self_->warp * kWarp);
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  if ((mask >> self_->lane & 1) == 0) fail("%s: the calling lane is not in its mask 0x%08x", op, mask);
  Meeting* free = nullptr;
  for (int i = 0; i < kMeetings; ++i) {
    Meeting& m = meetings_[self_->warp * kMeetings + i];
    if (m.arrived == 0) {
      free = &m;
    } else if ((m.mask & mask) != 0) {
      if (m.mask != mask || std::strcmp(m.op, op) != 0)
        fail("%s with mask 0x%08x: lanes 0x%08x of this warp wait in %s with mask 0x%08x", op, mask, m.arrived, m.op,
             m.mask);
      return m;
    }
  }
  free->mask = mask;
  free->op = op;
  std::fill(std::begin(free->argument), std::end(free->argument), nullptr);
  return *free;
}

bool Block::everyone_came(Meeting& meeting) {
  meeting.arrived |= 1u << self_->lane;
  if (meeting.arrived == meeting.mask) return true;
  wait(meeting.op);
  return false;
}

void Block::release(Meeting& meeting) {
  meeting.arrived = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if ((meeting.mask >> lane & 1) != 0 && lane != self_->lane) make_ready(self_->warp * kWarp + lane);
}

// ---- shared memory --------------------------------------------------------------------------------------------------
uint32_t Block::static_shared(const void* key, size_t bytes, size_t alignment) {
  const auto found = statics_.find(key);
  if (found != statics_.end()) return found->second;
  const size_t address = (shared_size_ + alignment - 1) / alignment * alignment;
  if (address + bytes > kMaxShared)
    fail("shared memory: %zu bytes, of %zu that a block can have", address + bytes, kMaxShared);
  std::memset(shared_.data() + shared_size_, 0xFF, address + bytes - shared_size_);
  shared_size_ = address + bytes;
  statics_[key] = static_cast<uint32_t>(address);
  return static_cast<uint32_t>(address);
}

char* Block::shared_bytes(uint32_t address, uint32_t bytes, uint32_t alignment, const char* op) {
  if (address % alignment != 0) fail("%s: shared address 0x%x is not aligned to %u bytes", op, address, alignment);
  if (address > shared_size_ || shared_size_ - address < bytes)
    fail("%s: %u bytes at shared address 0x%x, of 0x%zx that the block has", op, bytes, address, shared_size_);
  return shared_.data() + address;
}

const char* Block::shared_read(const Thread& thread, uint32_t address, uint32_t bytes, const char* op) {
  const char* at = shared_bytes(address, bytes, bytes, op);
  if (Races* r = races()) r->read(thread.id, address, bytes, op);
  return at;
}

char* Block::shared_write(const Thread& thread, uint32_t address, uint32_t bytes, const char* op) {
  char* at = shared_bytes(address, bytes, bytes, op);
  if (Races* r = races()) r->write(thread.id, address, bytes, op);
  return at;
}

// ---- what a kernel calls (device.h) ---------------------------------------------------------------------------------
uint3 thread_index() { return block().self().index; }
uint3 block_index() { return block().index(); }
dim3 block_shape() { return block().shape(); }
dim3 grid_shape() { return block().grid(); }
int lane() { return block().self().lane; }

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  block().fail(format, arguments);
}

void barrier(int id, int count, bool wait_for_others) { block().barrier(id, count, wait_for_others); }

void collective(const char* op, uint32_t mask, void* mine, void (*execute)(void* const* each)) {
  block().collective(op, mask, mine, execute);
}

uint32_t static_shared(const void* key, size_t bytes, size_t alignment) {
  return block().static_shared(key, bytes, alignment);
}

const void* shared_read(uint32_t address, uint32_t bytes, const char* op) {
  return block().shared_read(block().self(), address, bytes, op);
}

void* shared_write(uint32_t address, uint32_t bytes, const char* op) {
  return block().shared_write(block().self(), address, bytes, op);
}

// ---- grid -----------------------------------------------------------------------------------------------------------
namespace {

// The arguments as PTX lays out a kernel's parameters.
std::vector<char> laid_out(const char* op, const KernelCall& kernel, const PtxProgram& program) {
  std::vector<char> bytes(program.parameter_bytes + 128);
  size_t at = 0;
  for (int i = 0; i < kernel.count; ++i) {
    const Parameter& p = kernel.parameters[i];
    at = (at + p.alignment - 1) / p.alignment * p.alignment;
    if (at + p.size > program.parameter_bytes) break;
    std::memcpy(bytes.data() + at, p.value, p.size);
    at += p.size;
  }
  if (at != program.parameter_bytes)
    throw std::invalid_argument(std::string(op) + ": the PTX entry " + program.name + " has " +
                                std::to_string(program.parameter_bytes) + " bytes of parameters, not " +
                                std::to_string(at));
  return bytes;
}

}  // namespace

void launch_grid(const char* op, dim3 grid, dim3 shape, size_t dynamic_shared, const KernelCall& kernel) {
  const auto refuse = [op](const std::string& why) { throw std::invalid_argument(std::string(op) + ": " + why); };
  const int64_t threads = int64_t{shape.x} * shape.y * shape.z;
  if (threads < 1 || threads > kMaxThreads || shape.z > 64)
    refuse("a block of " + std::to_string(shape.x) + " x " + std::to_string(shape.y) + " x " + std::to_string(shape.z) +
           " threads");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
           " blocks");
  if (dynamic_shared > kMaxShared) refuse(std::to_string(dynamic_shared) + " bytes of shared memory");

  KernelCall call = kernel;
  struct {
    const PtxProgram* program;
    std::vector<char> parameters;
  } replaced{replacement_of(kernel.kernel), {}};
  if (replaced.program != nullptr) {
    replaced.parameters = laid_out(op, kernel, *replaced.program);
    call.run = [](const void* r) {
      const auto* with = static_cast<const decltype(replaced)*>(r);
      run_ptx_thread(*with->program, with->parameters.data());
    };
    call.call = &replaced;
  }

  const int64_t total = int64_t{grid.x} * grid.y * grid.z;
  const Options how = options();
  static std::mutex one_at_a_time;  // the clocks of global memory are a launch's
  const std::lock_guard<std::mutex> alone(one_at_a_time);
  global_races().reset();
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::string report;
  const auto work = [&] {
    thread_local std::unique_ptr<Block> mine;
    thread_local int capacity = 0;
    if (capacity < threads) {
      capacity = static_cast<int>((threads + 127) / 128 * 128);
      mine = std::make_unique<Block>(capacity);
    }
    Block& b = *mine;
    b.count_switches = b.count_mma = b.count_wgmma = b.count_ldmatrix = b.count_bank_conflicts = 0;
    int64_t done = 0;
    for (int64_t i; (i = next++) < total; ++done) {
      const uint3 index{static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                        static_cast<unsigned>(i / (int64_t{grid.x} * grid.y))};
      if (!b.run(index, grid, shape, dynamic_shared, call, how.seed + static_cast<uint64_t>(i))) {
        next = total;
        const std::lock_guard<std::mutex> lock(mutex);
        if (report.empty()) report = b.error();
      }
    }
    const std::lock_guard<std::mutex> lock(totals_mutex);
    totals.blocks += done;
    totals.switches += b.count_switches;
    totals.mma += b.count_mma;
    totals.wgmma += b.count_wgmma;
    totals.ldmatrix += b.count_ldmatrix;
    totals.bank_conflicts += b.count_bank_conflicts;
  };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < std::min<int64_t>(how.workers, total); ++i) helpers.emplace_back(work);
  work();
  for (auto& h : helpers) h.join();
  {
    const std::lock_guard<std::mutex> lock(totals_mutex);
    ++totals.launches;
  }
  if (!report.empty()) throw std::runtime_error(std::string(op) + ": " + report);
}

}  // namespace llama_fast::emulator
