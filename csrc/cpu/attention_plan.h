// How a call of attention is cut into tasks: the same for every instruction set, and a function of the sizes and, in
// the backward, of the number of threads. Ordinary C++; included before the regions of each_isa.h open.
//
// A head is one key/value head of one sequence, with the `rep` query heads that share it. Its rows are the pairs
// (query token t, query head h) of the group, ordered r = t * rep + h, so that a tile of rows covers few tokens.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ops.h"
#include "memory.h"
#include "parallel.h"

namespace llama_fast::cpu {

constexpr int64_t kMostRows = 128;  // of a tile
constexpr int64_t kKeys = 128;      // keys of a block: long enough to hide loading and storing the accumulators of out

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

struct Mask {
  bool causal;
  int64_t window;  // 0: none

  // The keys that query t of T sees, of S keys aligned bottom right.
  Range keys_of(int64_t t, int64_t T, int64_t S) const {
    const int64_t i = t + S - T;
    const int64_t end = causal || window > 0 ? std::clamp<int64_t>(i + 1, 0, S) : S;
    return {window > 0 ? std::clamp<int64_t>(i + 1 - window, 0, end) : 0, end};
  }
  // The queries that see any of the keys [keys.begin, keys.end).
  Range queries_of(Range keys, int64_t T, int64_t S) const {
    if (!causal && window <= 0) return {0, T};
    const int64_t shift = S - T;
    const int64_t begin = std::clamp<int64_t>(keys.begin - shift, 0, T);
    const int64_t end = window > 0 ? std::clamp<int64_t>(keys.end - shift + window - 1, begin, T) : T;
    return {begin, end};
  }
};

struct Head {
  int64_t batch, group;  // group: the key/value head
  int64_t q_begin, T;
  int64_t k_begin, S;
  int64_t slot = 0;       // where its packed blocks of keys or tiles of rows start in its wave
  int64_t parts = 1;      // the backward's: into how many its key blocks are dealt
  int64_t part_slot = 0;  // where its parts' tiles of dq start in its wave
};

struct Task {
  int64_t head;   // in the wave
  int64_t index;  // of a key block, a tile of rows or a part
  int64_t cost;
};

// Heads that are packed and then worked on together, and the sizes of their scratch.
struct Wave {
  std::vector<Head> heads;
  int64_t slots = 0, part_slots = 0;
};

struct AttentionSizes {
  int64_t H, G, D, rep;
  int64_t tile_rows;
  Mask mask;
  double scale;

  int64_t rows(const Head& head) const { return head.T * rep; }
  int64_t tiles(const Head& head) const { return blocks_of(rows(head), tile_rows); }
  // The keys that some row of tile `tile` sees; [common.begin, common.end) are seen by all of its rows.
  Range keys_of_tile(const Head& head, int64_t tile, Range* common) const {
    const int64_t last = std::min((tile + 1) * tile_rows, rows(head)) - 1;
    const Range a = mask.keys_of(tile * tile_rows / rep, head.T, head.S), b = mask.keys_of(last / rep, head.T, head.S);
    *common = {b.begin, a.end};
    return {a.begin, b.end};
  }
};

inline AttentionSizes attention_sizes(const Tensor& q, const Tensor& k, double scale, bool causal, int64_t window,
                                      int64_t tile_rows) {
  const int64_t H = q.size[2], G = k.size[2];
  // a window of all keys hides no more than a longer one, with which the sums of Mask might pass 2^63
  return {H, G, q.size[3], G > 0 ? H / G : 1, tile_rows, {causal, std::clamp<int64_t>(window, 0, k.size[1])}, scale};
}

// Checks the values of cu_seqlens, which under torch.compile nobody else has seen: they become addresses, and rows that
// they leave out would stay as the memory was.
inline std::vector<Head> heads_of(const AttentionSizes& sizes, const Tensor& q, const Tensor& k,
                                  const Tensor& cu_seqlens) {
  std::vector<Head> heads;
  const int32_t* cu = cu_seqlens.ptr<int32_t>();
  const int64_t sequences = cu != nullptr ? std::max<int64_t>(cu_seqlens.size[0] - 1, 0) : q.size[0];
  if (cu != nullptr && (cu[0] != 0 || cu[sequences] != q.size[1]))
    throw std::invalid_argument("attention: cu_seqlens runs from " + std::to_string(cu[0]) + " to " +
                                std::to_string(cu[sequences]) + ", expected 0 to " + std::to_string(q.size[1]) +
                                ", the rows of q");
  for (int64_t n = 0; cu != nullptr && n < sequences; ++n)
    if (cu[n] < 0 || cu[n + 1] < cu[n] || cu[n + 1] > q.size[1])
      throw std::invalid_argument("attention: cu_seqlens[" + std::to_string(n) + "] = " + std::to_string(cu[n]) +
                                  " and the next, " + std::to_string(cu[n + 1]) + ", expected ascending within 0.." +
                                  std::to_string(q.size[1]));
  for (int64_t n = 0; n < sequences; ++n)
    for (int64_t g = 0; g < sizes.G; ++g) {
      if (cu == nullptr)
        heads.push_back({n, g, 0, q.size[1], 0, k.size[1]});
      else
        heads.push_back({0, g, cu[n], cu[n + 1] - cu[n], cu[n], cu[n + 1] - cu[n]});
    }
  return heads;
}

// The heads in waves of about equal scratch, each of about `budget` at most, or one head. slots_of(head): its blocks or
// tiles; size_of(head): its scratch, in the unit of the budget.
template <class Slots, class Size>
std::vector<Wave> waves_of(const std::vector<Head>& heads, int64_t budget, const Slots& slots_of, const Size& size_of) {
  int64_t total = 0;
  for (const Head& head : heads) total += size_of(head);
  const int64_t count = std::max<int64_t>(1, blocks_of(total, budget));
  std::vector<Wave> waves(1);
  int64_t before = 0, current = 0;
  for (const Head& head : heads) {
    const int64_t size = size_of(head);
    const auto middle = static_cast<double>(before) + 0.5 * static_cast<double>(size);
    const auto index =
        static_cast<int64_t>(middle * static_cast<double>(count) / static_cast<double>(std::max<int64_t>(total, 1)));
    if (index > current && !waves.back().heads.empty()) waves.emplace_back();
    current = index;
    before += size;
    Wave& wave = waves.back();
    wave.heads.push_back(head);
    wave.heads.back().slot = wave.slots;
    wave.heads.back().part_slot = wave.part_slots;
    wave.slots += slots_of(head);
    wave.part_slots += slots_of(head) * head.parts;
  }
  return waves;
}

// The most slots, and the most slots of parts, that a wave has.
inline Wave largest(const std::vector<Wave>& waves) {
  Wave most;
  for (const Wave& wave : waves) {
    most.slots = std::max(most.slots, wave.slots);
    most.part_slots = std::max(most.part_slots, wave.part_slots);
  }
  return most;
}

template <class Body>
void run_tasks(const Wave& wave, const std::vector<Task>& tasks, const Body& body) {
  parallel_tasks(static_cast<int64_t>(tasks.size()),
                 [&](int64_t task, int64_t thread) { body(wave.heads[tasks[task].head], tasks[task].index, thread); });
}

// Calls body(head, index, thread) on all threads for the heads of a wave and index below count_of(head): head by head,
// so that what its tasks share stays in the cache, the last index first, which under a causal mask has the most to do.
template <class Count, class Body>
void run_in_order(const Wave& wave, const Count& count_of, const Body& body) {
  std::vector<Task> tasks;
  for (size_t h = 0; h < wave.heads.size(); ++h)
    for (int64_t i = count_of(wave.heads[h]); i-- > 0;) tasks.push_back({static_cast<int64_t>(h), i, 0});
  run_tasks(wave, tasks, body);
}

// The same, the heads of the greatest cost_of(head) first: for few tasks that are large.
template <class Count, class Cost, class Body>
void run_by_cost(const Wave& wave, const Count& count_of, const Cost& cost_of, const Body& body) {
  std::vector<Task> tasks;
  for (size_t h = 0; h < wave.heads.size(); ++h)
    for (int64_t i = 0; i < count_of(wave.heads[h]); ++i)
      tasks.push_back({static_cast<int64_t>(h), i, cost_of(wave.heads[h])});
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  run_tasks(wave, tasks, body);
}

// The backward, wave by wave. pack(head, tile, thread, rows) packs a tile of rows into `row_floats` floats; then
// block(head, block, thread, rows, dq), for each block of `keys` keys, does what the block takes part in, with the
// packed rows of all tiles of the head, and adds its share of dq to `dq_floats` floats a tile; then finish(head, tile,
// thread, dq) takes the whole sum. The blocks of a head are dealt to parts, which run at once and have a dq each; these
// are added in order.
template <class Pack, class Block, class Finish>
void run_bwd(const AttentionSizes& sizes, std::vector<Head> heads, int64_t keys, int64_t row_floats, int64_t dq_floats,
             const Pack& pack, const Block& block, const Finish& finish) {
  constexpr int64_t kWaveBytes = 32 << 20, kWaveBytesPerThread = 8 << 20;
  constexpr int64_t kTasksPerThread = 4;  // a head with more than its share of the work is cut into parts
  const auto tiles_of = [&](const Head& head) { return sizes.tiles(head); };
  const auto blocks = [&](const Head& head) { return blocks_of(head.S, keys); };
  const auto cost_of = [&](const Head& head) { return sizes.tiles(head) * blocks(head); };
  int64_t cost = 0;
  for (const Head& head : heads) cost += cost_of(head);
  const int64_t share = std::max<int64_t>(1, cost / (kTasksPerThread * max_threads()));
  for (Head& head : heads)
    head.parts = std::clamp<int64_t>(cost_of(head) / share, 1, std::max<int64_t>(1, blocks(head)));

  const std::vector<Wave> waves =
      waves_of(heads, std::max(kWaveBytes, kWaveBytesPerThread * max_threads()), tiles_of, [&](const Head& head) {
        return sizes.tiles(head) * (row_floats + head.parts * dq_floats) * static_cast<int64_t>(sizeof(float));
      });
  const Wave most = largest(waves);
  const Scratch<float> all_rows(most.slots * row_floats), all_dq(most.part_slots * dq_floats);
  const auto rows = [&](const Head& head) { return all_rows.data() + head.slot * row_floats; };
  const auto dq = [&](const Head& head, int64_t part) {
    return all_dq.data() + (head.part_slot + part * sizes.tiles(head)) * dq_floats;
  };

  for (const Wave& wave : waves) {
    run_in_order(wave, tiles_of, [&](const Head& head, int64_t tile, int64_t thread) {
      pack(head, tile, thread, rows(head) + tile * row_floats);
    });
    // part p of a head has the key blocks p, p + parts, ...
    run_by_cost(
        wave, [](const Head& head) { return head.parts; }, [&](const Head& head) { return cost_of(head) / head.parts; },
        [&](const Head& head, int64_t part, int64_t thread) {
          std::fill_n(dq(head, part), sizes.tiles(head) * dq_floats, 0.0F);
          for (int64_t b = part; b < blocks(head); b += head.parts) block(head, b, thread, rows(head), dq(head, part));
        });
    run_in_order(wave, tiles_of, [&](const Head& head, int64_t tile, int64_t thread) {
      float* total = dq(head, 0) + tile * dq_floats;
      for (int64_t part = 1; part < head.parts; ++part) {
        const float* more = dq(head, part) + tile * dq_floats;
        for (int64_t i = 0; i < dq_floats; ++i) total[i] += more[i];
      }
      finish(head, tile, thread, total);
    });
  }
}

// On matrix registers: attention_amx_fwd.cpp and attention_amx_bwd.cpp. False, with outputs that mean nothing, where
// these do not serve: float16, and float32 of 2^127 or more, infinite or NaN.
namespace amx {
bool attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                   bool causal, int64_t window, const Tensor& out, const Tensor& lse);
bool attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, const Tensor& cu_seqlens, double scale, bool causal, int64_t window,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv);
}  // namespace amx

}  // namespace llama_fast::cpu
