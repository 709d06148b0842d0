#include "instructions.h"

#include <cstring>

#include "block.h"
#include "memory.h"

namespace llama_fast::emulator {
namespace {

constexpr uint32_t kEveryLane = ~0u;

// 8 rows of 16 bytes are served at once when they lie in different banks.
void count_conflicts(Block& b, const uint32_t* addresses) {
  int rows_of[8] = {}, most = 0;
  for (int i = 0; i < 8; ++i) {
    int& n = rows_of[addresses[i] / 16 % 8];
    if (++n > most) most = n;
  }
  b.count_bank_conflicts += most - 1;
}

}  // namespace

void syncwarp(uint32_t mask) {
  int present = 0;
  block().collective("__syncwarp", mask, &present, [](void* const* lanes) {
    Block& b = block();
    int threads[kWarp], count = 0;
    for (int i = 0; i < kWarp; ++i)
      if (lanes[i] != nullptr) threads[count++] = b.lane_of_warp(i).id;
    if (Races* r = b.races()) r->synchronize(threads, count);
  });
}

uint32_t ballot(const char* op, uint32_t mask, bool predicate) {
  struct Lane {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  collective(op, mask, &mine, [](void* const* lanes) {
    uint32_t bits = 0;
    for (int i = 0; i < kWarp; ++i)
      if (lanes[i] != nullptr) bits |= static_cast<uint32_t>(static_cast<Lane*>(lanes[i])->predicate) << i;
    for (int i = 0; i < kWarp; ++i)
      if (lanes[i] != nullptr) static_cast<Lane*>(lanes[i])->result = bits;
  });
  return mine.result;
}

void mma_m16n8k16(Half type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  struct Lane {
    const uint32_t *a, *b;
    float d[4];
  } mine{a, b, {c[0], c[1], c[2], c[3]}};
  Block& blk = block();
  blk.collective(type == Half::bf16 ? "mma.sync.m16n8k16.bf16" : "mma.sync.m16n8k16.f16", kEveryLane, &mine,
                 [&blk, type](void* const* lanes) {
                   const uint32_t *as[32], *bs[32];
                   float* ds[32];
                   for (int i = 0; i < kWarp; ++i) {
                     auto* lane = static_cast<Lane*>(lanes[i]);
                     as[i] = lane->a, bs[i] = lane->b, ds[i] = lane->d;
                   }
                   mma_m16n8k16(type, as, bs, ds);
                   ++blk.count_mma;
                 });
  std::memcpy(d, mine.d, sizeof d);
}

void ldmatrix(int count, bool transposed, uint32_t* r, uint32_t address) {
  struct Lane {
    uint32_t address;
    uint32_t* r;
  } mine{address, r};
  Block& blk = block();
  const char* op = transposed ? "ldmatrix.trans" : "ldmatrix";
  blk.collective(op, kEveryLane, &mine, [&blk, op, count, transposed](void* const* lanes) {
    const uint16_t* rows[32];
    uint32_t addresses[32];
    uint32_t* rs[32];
    for (int i = 0; i < kWarp; ++i) rs[i] = static_cast<Lane*>(lanes[i])->r;
    for (int i = 0; i < 8 * count; ++i) {
      addresses[i] = static_cast<Lane*>(lanes[i])->address;
      rows[i] = reinterpret_cast<const uint16_t*>(blk.shared_read(blk.lane_of_warp(i), addresses[i], 16, op));
    }
    ldmatrix(count, transposed, rows, rs);
    for (int m = 0; m < count; ++m) count_conflicts(blk, addresses + 8 * m);
    ++blk.count_ldmatrix;
  });
}

void stmatrix(int count, bool transposed, uint32_t address, const uint32_t* r) {
  struct Lane {
    uint32_t address;
    const uint32_t* r;
  } mine{address, r};
  Block& blk = block();
  const char* op = transposed ? "stmatrix.trans" : "stmatrix";
  blk.collective(op, kEveryLane, &mine, [&blk, op, count, transposed](void* const* lanes) {
    uint16_t* rows[32];
    uint32_t addresses[32];
    const uint32_t* rs[32];
    for (int i = 0; i < kWarp; ++i) rs[i] = static_cast<Lane*>(lanes[i])->r;
    for (int i = 0; i < 8 * count; ++i) {
      addresses[i] = static_cast<Lane*>(lanes[i])->address;
      rows[i] = reinterpret_cast<uint16_t*>(blk.shared_write(blk.lane_of_warp(i), addresses[i], 16, op));
    }
    stmatrix(count, transposed, rows, rs);
    for (int m = 0; m < count; ++m) count_conflicts(blk, addresses + 8 * m);
  });
}

void cp_async_16(uint32_t destination, GlobalAddress source, uint32_t source_bytes) {
  Block& blk = block();
  Thread& me = blk.self();
  if (source_bytes > 16) blk.fail("cp.async: %u of 16 bytes", source_bytes);
  Thread::Copy copy{destination, me.groups_committed, {}};
  if (source_bytes > 0)
    std::memcpy(copy.data, global_at(source.value, source_bytes, 16, "cp.async", Use::read), source_bytes);
  std::memset(blk.shared_bytes(destination, 16, 16, "cp.async"), 0xFF, 16);  // NaN until waited for
  if (Races* r = blk.races()) r->begin_copy(me.id, destination, 16, "cp.async");
  me.copies.push_back(copy);
}

void cp_async_commit_group() { ++block().self().groups_committed; }

void cp_async_wait_group(int pending) {
  Block& blk = block();
  Thread& me = blk.self();
  size_t kept = 0;
  for (const Thread::Copy& copy : me.copies) {
    if (copy.group >= me.groups_committed - pending) {
      me.copies[kept++] = copy;
      continue;
    }
    std::memcpy(blk.shared_bytes(copy.destination, 16, 16, "cp.async"), copy.data, 16);
    if (Races* r = blk.races()) r->end_copy(me.id, copy.destination, 16, "cp.async");
  }
  me.copies.resize(kept);
}

uint32_t cvt_f16x2(Half type, float high, float low) {
  return static_cast<uint32_t>(float_to_half(type, high)) << 16 | float_to_half(type, low);
}

}  // namespace llama_fast::emulator
