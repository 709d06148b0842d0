// wgmma: products of a warpgroup that are in flight beside its threads.
#include <algorithm>
#include <cstring>

#include "async.h"

namespace llama_fast::emulator {
namespace {

constexpr uint32_t kPoison = 0xFFFFFFFF;  // a NaN

void meet_in_wgmma(AsyncUnits::Call& call) {
  AsyncUnits& u = units();
  const int id = self().id, g = id / kGroup, lane = id % kGroup;
  AsyncUnits::Warpgroup& group = u.warpgroups[g];
  call.product.group = mine().wgmma_committed;
  group.calls[lane] = &call;
  if (++group.arrived < kGroup) {
    block().wait("wgmma.mma_async");
    return;
  }
  group.arrived = 0;
  u.issue(g);
  for (int i = 0; i < kGroup; ++i)
    if (i != lane) block().make_ready(g * kGroup + i);
}

}  // namespace

void wgmma(Half type, int n, float* d, const uint32_t* a, uint64_t a_matrix, uint64_t b_matrix, bool accumulate,
           bool a_transposed, bool b_transposed) {
  AsyncUnits::Call call{
      {type, n, a != nullptr, accumulate, a_transposed, b_transposed, a_matrix, b_matrix, 0, {}, 0, false, false},
      d,
      a};
  meet_in_wgmma(call);
}

void wgmma_at_once(Half type, int n, float* d, const uint32_t* a, uint64_t a_matrix, uint64_t b_matrix, bool accumulate,
                   bool a_transposed, bool b_transposed) {
  AsyncUnits::Call call{
      {type, n, a != nullptr, accumulate, a_transposed, b_transposed, a_matrix, b_matrix, 0, {}, 0, false, true}, d, a};
  meet_in_wgmma(call);
}

// All 128 threads have come to the same wgmma.mma_async.
void AsyncUnits::issue(int g) {
  Warpgroup& group = warpgroups[g];
  const Product& first = group.calls[0]->product;
  for (int t = 1; t < kGroup; ++t) {
    const Product& p = group.calls[t]->product;
    if (p.n != first.n || p.type != first.type || p.a_from_registers != first.a_from_registers ||
        p.accumulate != first.accumulate || p.a_matrix != first.a_matrix || p.b_matrix != first.b_matrix ||
        p.a_transposed != first.a_transposed || p.b_transposed != first.b_transposed || p.group != first.group)
      block_.fail("wgmma: threads %d and %d of warpgroup %d disagree about the instruction", g * kGroup, g * kGroup + t,
                  g);
  }
  ++block_.count_wgmma;
  Product product = first;
  if (Races* r = block_.races()) {
    if (group.agent < 0) group.agent = r->new_agents(kGroup / kWarp);
    const Clock clock = r->tick();
    group.clock_of_group.resize(static_cast<size_t>(product.group) + 1);
    group.clock_of_group[product.group] = clock;
    if (!product.a_from_registers) check_operand(g, clock, product.a_matrix, 64, product.a_transposed, "wgmma A");
    check_operand(g, clock, product.b_matrix, product.n, product.b_transposed, "wgmma B");
  }
  if (product.a_from_registers) {
    product.a.resize(4 * kGroup);
    for (int t = 0; t < kGroup; ++t) std::memcpy(&product.a[4 * t], group.calls[t]->a, 16);
  }
  if (product.at_once) {
    finish_at_once(group, product);
    return;
  }
  size_t key = group.next_accumulator;
  for (const auto& [k, acc] : group.accumulators)
    if (acc.d[0] == group.calls[0]->d) key = k;
  const bool fresh = key == group.next_accumulator;
  check_registers(g, fresh);
  Accumulator& acc = group.accumulators[key];
  if (fresh) {
    ++group.next_accumulator;
    acc.n = product.n;
    for (int t = 0; t < kGroup; ++t) acc.d[t] = group.calls[t]->d;
    acc.gather();
    for (int t = 0; t < kGroup; ++t)  // kPoison until waited for
      std::memset(acc.d[t], 0xFF, static_cast<size_t>(product.n) * 2);
  }
  for (int t = 0; t < kGroup; ++t)
    if (acc.d[t] != group.calls[t]->d || acc.n != product.n || acc.has[t])
      block_.fail("wgmma: thread %d's accumulator is in flight in another shape or in part of the warpgroup",
                  g * kGroup + t);
  acc.last_group = product.group;
  product.accumulator = key;
  group.products.push_back(std::move(product));
}

void AsyncUnits::Accumulator::gather() {
  values.resize(static_cast<size_t>(64 * n));
  for (int t = 0; t < kGroup; ++t)
    for (int i = 0; i < n / 2; ++i) {
      const auto [row, column] = fragment_d(t, i);
      values[static_cast<size_t>(row * n + column)] = d[t][i];
    }
}

void AsyncUnits::Accumulator::scatter(int t) const {
  for (int i = 0; i < n / 2; ++i) {
    const auto [row, column] = fragment_d(t, i);
    d[t][i] = values[static_cast<size_t>(row * n + column)];
  }
}

void AsyncUnits::finish_at_once(Warpgroup& group, Product& product) {
  Accumulator acc;
  acc.n = product.n;
  for (int t = 0; t < kGroup; ++t) acc.d[t] = group.calls[t]->d;
  acc.gather();
  execute(acc, product);
  for (int t = 0; t < kGroup; ++t) acc.scatter(t);
}

// wgmma.fence has to stand between the last touch of a register that wgmma uses and the wgmma. Touches are not seen:
// those of an accumulator show in its values, those of A are taken to be later than the last wait.
void AsyncUnits::check_registers(int g, bool fresh) {
  for (int lane = 0; lane < kGroup; ++lane) {
    const Call& call = *warpgroups[g].calls[lane];
    const PerThread& t = threads[g * kGroup + lane];
    const size_t bytes = static_cast<size_t>(call.product.n) * 2;
    const auto known = t.registers.find(call.d);
    bool good = t.wgmma_fenced || (!fresh && call.a == nullptr);
    if (fresh && known != t.registers.end() && known->second.size() * sizeof(float) == bytes)
      good = std::memcmp(known->second.data(), call.d, bytes) == 0 && (t.wgmma_fenced || call.a == nullptr);
    if (!good)
      block_.fail("wgmma: registers of thread %d were touched and no wgmma.fence stands between", g * kGroup + lane);
  }
}

void AsyncUnits::check_operand(int g, Clock clock, uint64_t matrix, int size, bool mn_major, const char* op) {
  const MatrixDescriptor d = decode(matrix);
  // threads that know the same need not be asked twice, but for one that may be the writer itself
  int ask[kGroup], count = 0;
  Races& r = *block_.races();
  for (int t = g * kGroup; t < (g + 1) * kGroup; ++t) {
    const bool again = count >= 2 && r.knows_the_same(t, ask[count - 1]) && r.knows_the_same(t, ask[count - 2]);
    if (!again) ask[count++] = t;
  }
  for (int mn = 0; mn < size; mn += mn_major ? 8 : 1)
    for (int k = 0; k < 16; k += mn_major ? 1 : 8) {
      const uint32_t address = chunk_address(d, mn, k, mn_major);
      block_.shared_bytes(address, 16, 16, op);
      r.agent_read(ask, count, warpgroups[g].agent, kGroup / kWarp, clock, address, 16, op);
    }
}

void AsyncUnits::execute(Accumulator& accumulator, Product& p) {
  float a[64 * 16], b[256 * 16];
  const auto gather = [&](uint64_t descriptor, int size, bool mn_major, const char* op, auto&& put) {
    const MatrixDescriptor d = decode(descriptor);
    if (d.base_offset != 0) block_.fail("%s: a base offset is not modelled", op);
    for (int mn = 0; mn < size; mn += mn_major ? 8 : 1)
      for (int k = 0; k < 16; k += mn_major ? 1 : 8) {
        uint16_t chunk[8];
        std::memcpy(chunk, block_.shared_bytes(chunk_address(d, mn, k, mn_major), 16, 16, op), 16);
        for (int i = 0; i < 8; ++i) put(mn_major ? mn + i : mn, mn_major ? k : k + i, half_to_float(p.type, chunk[i]));
      }
  };
  if (p.a_from_registers) {
    for (int t = 0; t < kGroup; ++t)
      for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half) {
          const auto [row, column] = fragment_a(t, i, half);
          a[row * 16 + column] = half_to_float(p.type, static_cast<uint16_t>(p.a[4 * t + i] >> (16 * half)));
        }
  } else {
    gather(p.a_matrix, 64, p.a_transposed, "wgmma A", [&](int m, int k, float x) { a[m * 16 + k] = x; });
  }
  gather(p.b_matrix, p.n, p.b_transposed, "wgmma B", [&](int n, int k, float x) { b[k * p.n + n] = x; });
  multiply_64xNx16(p.n, p.accumulate, a, b, accumulator.values.data());
  p.done = true;
}

void wgmma_fence() {
  mine().wgmma_fenced = true;
  for (auto& [d, values] : mine().registers) std::memcpy(values.data(), d, values.size() * sizeof(float));
}
void wgmma_commit_group() { ++mine().wgmma_committed; }

void wgmma_wait_group(int pending) {
  AsyncUnits& u = units();
  const int id = self().id, lane = id % kGroup, through = mine().wgmma_committed - pending;
  AsyncUnits::Warpgroup& group = u.warpgroups[id / kGroup];
  mine().wgmma_fenced = false;
  if (Races* r = block().races()) {
    const int groups = std::min(through, static_cast<int>(group.clock_of_group.size()));
    if (groups > 0) r->learn(id, group.agent + lane / kWarp, group.clock_of_group[groups - 1]);
  }
  for (AsyncUnits::Product& p : group.products)
    if (!p.done && p.group < through) u.execute(group.accumulators[p.accumulator], p);
  while (!group.products.empty() && group.products.front().done) group.products.pop_front();
  for (auto it = group.accumulators.begin(); it != group.accumulators.end();) {
    AsyncUnits::Accumulator& acc = it->second;
    if (acc.last_group < through && !acc.has[lane]) {
      float* d = acc.d[lane];
      for (int i = 0; i < acc.n / 2; ++i) {
        uint32_t bits;
        std::memcpy(&bits, &d[i], 4);
        if (bits != kPoison) block().fail("register d[%d] of a wgmma was written while it was in flight", i);
      }
      acc.scatter(lane);
      mine().registers[d].assign(d, d + acc.n / 2);
      acc.has[lane] = true;
      if (++acc.collected == kGroup) {
        it = group.accumulators.erase(it);
        continue;
      }
    }
    ++it;
  }
}

void wgmma_use(const float* d) {
  const int id = self().id;
  for (const auto& [key, acc] : units().warpgroups[id / kGroup].accumulators)
    if (acc.d[id % kGroup] == d && !acc.has[id % kGroup])
      block().fail("an accumulator is used before wgmma.wait_group");
}

}  // namespace llama_fast::emulator
