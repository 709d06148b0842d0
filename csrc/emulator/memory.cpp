#include "memory.h"

#include <array>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "block.h"
#include "global_race.h"

namespace llama_fast::emulator {
namespace {

constexpr int kTagShift = 48;  // user addresses of x86-64 and aarch64 stay below
constexpr uint64_t kAddressMask = (uint64_t{1} << kTagShift) - 1;

struct Range {
  uint64_t begin = 0, end = 0;
  std::string label;
};

// Entries never move, so that kernels read them without a lock while another OS thread adds some.
struct Table {
  std::mutex mutex;
  std::array<Range, 1 << 12> ranges;
  std::vector<int> free;
  int used = 1;  // number 0 is that of addresses that nobody has mapped
};

Table& table() {
  static Table value;
  return value;
}

}  // namespace

void* map_global(const void* data, size_t bytes, std::string label) {
  Table& t = table();
  const std::lock_guard<std::mutex> lock(t.mutex);
  int number;
  if (!t.free.empty()) {
    number = t.free.back();
    t.free.pop_back();
  } else if (t.used < static_cast<int>(t.ranges.size())) {
    number = t.used++;
  } else {
    throw std::runtime_error("emulator: too many tensors are mapped at once");
  }
  const uint64_t begin = reinterpret_cast<uintptr_t>(data);
  t.ranges[number] = {begin, begin + bytes, std::move(label)};
  return reinterpret_cast<void*>(begin | static_cast<uint64_t>(number) << kTagShift);
}

void unmap_global(const void* mapped) {
  Table& t = table();
  const std::lock_guard<std::mutex> lock(t.mutex);
  const int number = static_cast<int>(reinterpret_cast<uintptr_t>(mapped) >> kTagShift);
  t.ranges[number] = {};
  t.free.push_back(number);
}

void* global_at(uint64_t address, size_t bytes, size_t alignment, const char* op, Use use) {
  const uint64_t number = address >> kTagShift, at = address & kAddressMask;
  Table& t = table();
  if (number == 0 || number >= t.ranges.size() || t.ranges[number].end == 0)
    block().fail("%s: address 0x%llx belongs to no tensor of this call", op, static_cast<unsigned long long>(address));
  const Range& r = t.ranges[number];
  if (at < r.begin || at + bytes > r.end)
    block().fail("%s: %zu bytes at offset %lld of %s, which has %lld bytes", op, bytes,
                 static_cast<long long>(at - r.begin), r.label.c_str(), static_cast<long long>(r.end - r.begin));
  if (at % alignment != 0)
    block().fail("%s: offset %lld of %s is not aligned to %zu bytes", op, static_cast<long long>(at - r.begin),
                 r.label.c_str(), alignment);
  Block& b = block();
  Races* races = b.races();
  if (use != Use::none && races != nullptr)
    check_global(address, bytes, b.self().id, b.self().id, races->stamp(b.self().id), use, op);
  return reinterpret_cast<void*>(at);
}

void check_global(uint64_t address, size_t bytes, int thread, int actor, Clock clock, Use use, const char* op) {
  Block& b = block();
  GlobalRaces::Access other;
  uint64_t where;
  if (global_races().record(*b.races(), thread, {b.number(), actor, clock, use, op}, address & kAddressMask, bytes,
                            &other, &where))
    return;
  const Range& r = table().ranges[address >> kTagShift];
  const int64_t offset = static_cast<int64_t>(where - r.begin);
  const char* did = other.use == Use::write ? "wrote" : other.use == Use::atomic ? "updated" : "reads";
  const char* does = use == Use::write ? "writes" : use == Use::atomic ? "updates" : "reads";
  const char* why = use == Use::constant || other.use == Use::constant
                        ? "the memory of ld.global.nc is written by no thread of a kernel"
                        : "nothing orders the two";
  b.fail("race: %s %s offset %lld of %s, which %s of block %lld %s (%s), and %s", op, does,
         static_cast<long long>(offset), r.label.c_str(), b.races()->name(other.actor),
         static_cast<long long>(other.block), did, other.op, why);
}

void global_release(uint64_t address) {
  if (Races* r = block().races()) global_races().release(address & kAddressMask, r->publish(block().self().id));
}

void global_acquire(uint64_t address) {
  if (Races* r = block().races()) r->learn(block().self().id, global_races().acquire(address & kAddressMask));
}

}  // namespace llama_fast::emulator
