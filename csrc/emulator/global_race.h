// Finds two accesses of one launch to global memory that nothing orders: of threads of a block or of different blocks.
//
// The same clocks as csrc/emulator/race.h has for shared memory. What orders two blocks is a release that the other's
// acquire has read: `Foreign` is what a thread knows that way of other blocks. A launch is ordered after the one
// before.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "device.h"
#include "race.h"

namespace llama_fast::emulator {

class GlobalRaces {
 public:
  // An access: by a thread, or an agent that it started, of a block, at its clock.
  struct Access {
    int64_t block = 0;
    int actor = 0;
    Clock clock = 0;
    Use use = Use::read;
    const char* op = nullptr;
  };

  // Forgets what was accessed: a launch begins.
  void reset();

  // Records an access that `thread` of the block `races` makes or starts. Gives false, and the other access and the
  // address, where another one conflicts with it.
  bool record(const Races& races, int thread, const Access& access, uint64_t address, size_t bytes, Access* other,
              uint64_t* where);

  // What a release adds to the variable at an address, and what an acquire finds there.
  void release(uint64_t address, const ForeignRef& what);
  ForeignRef acquire(uint64_t address);

 private:
  struct Record {
    Access access;
    uint16_t bytes;  // of the granule, by bit
  };
  static constexpr uint64_t kGranule = 16, kPage = 4096, kStripes = 64;
  static constexpr size_t kReads = 6;  // that a granule remembers; an older one is forgotten
  using Granule = std::vector<Record>;
  using Page = std::array<Granule, kPage / kGranule>;
  struct Stripe {
    std::mutex mutex;
    std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
    std::unordered_map<uint64_t, ForeignRef> variables;
  };
  Stripe& stripe(uint64_t address) { return stripes_[address / kPage % kStripes]; }
  static bool add(const Races& races, int thread, Granule& granule, const Record& record, Access* other);

  std::array<Stripe, kStripes> stripes_;
};

GlobalRaces& global_races();

}  // namespace llama_fast::emulator
