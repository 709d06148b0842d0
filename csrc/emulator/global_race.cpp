#include "global_race.h"

#include <algorithm>

namespace llama_fast::emulator {
namespace {

bool writes(Use use) { return use == Use::write || use == Use::atomic; }

// Whether two accesses to the same bytes have to be ordered, or may not be in one launch at all.
bool conflict(Use a, Use b) { return (writes(a) || writes(b)) && !(a == Use::atomic && b == Use::atomic); }
bool never(Use a, Use b) { return (writes(a) && b == Use::constant) || (a == Use::constant && writes(b)); }

}  // namespace

GlobalRaces& global_races() {
  static GlobalRaces value;
  return value;
}

void GlobalRaces::reset() {
  for (Stripe& s : stripes_) {
    s.pages.clear();
    s.variables.clear();
  }
}

bool GlobalRaces::add(const Races& races, int thread, Granule& granule, const Record& record, Access* other) {
  const Access& now = record.access;
  for (const Record& r : granule) {
    if ((r.bytes & record.bytes) == 0 || !conflict(r.access.use, now.use)) continue;
    if (never(r.access.use, now.use) || !races.ordered(thread, r.access.block, r.access.actor, r.access.clock)) {
      *other = r.access;
      return false;
    }
  }
  // What the bytes' next access has to be ordered with: a write hides all before it, a read its own thread's; an atomic
  // hides what it is ordered with, which is all but atomics.
  size_t kept = 0, reads = 0;
  for (Record r : granule) {
    const bool same = r.access.block == now.block && r.access.actor == now.actor;
    const bool hidden = now.use == Use::write                                   ? r.access.use != Use::constant
                        : now.use == Use::atomic && r.access.use != Use::atomic ? r.access.use != Use::constant
                                                                                : same && r.access.use == now.use;
    if (hidden) r.bytes = static_cast<uint16_t>(r.bytes & ~record.bytes);
    if (r.bytes == 0) continue;
    reads += !writes(r.access.use);
    granule[kept++] = r;
  }
  granule.resize(kept);
  if (!writes(now.use) && reads >= kReads)
    granule.erase(std::find_if(granule.begin(), granule.end(), [](const Record& r) { return !writes(r.access.use); }));
  granule.push_back(record);
  return true;
}

bool GlobalRaces::record(const Races& races, int thread, const Access& access, uint64_t address, size_t bytes,
                         Access* other, uint64_t* where) {
  const uint64_t end = address + bytes;
  for (uint64_t at = address; at < end;) {
    Stripe& s = stripe(at);
    const std::lock_guard<std::mutex> lock(s.mutex);
    std::unique_ptr<Page>& page = s.pages[at / kPage];
    if (page == nullptr) page = std::make_unique<Page>();
    const uint64_t through = std::min(end, (at / kPage + 1) * kPage);
    while (at < through) {
      const uint64_t first = at % kGranule, last = std::min(through - at + first, kGranule);
      const auto mask = static_cast<uint16_t>((1u << last) - (1u << first));
      if (!add(races, thread, (*page)[at % kPage / kGranule], {access, mask}, other)) {
        *where = at;
        return false;
      }
      at += last - first;
    }
  }
  return true;
}

void GlobalRaces::release(uint64_t address, const ForeignRef& what) {
  Stripe& s = stripe(address);
  const std::lock_guard<std::mutex> lock(s.mutex);
  ForeignRef& variable = s.variables[address];
  variable = join(variable, what);
}

ForeignRef GlobalRaces::acquire(uint64_t address) {
  Stripe& s = stripe(address);
  const std::lock_guard<std::mutex> lock(s.mutex);
  const auto found = s.variables.find(address);
  return found == s.variables.end() ? nullptr : found->second;
}

}  // namespace llama_fast::emulator
