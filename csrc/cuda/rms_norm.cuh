// How the kernels of rms_norm lay rows over blocks.
#pragma once

#include <algorithm>

#include "reduce.cuh"
#include "stream.cuh"
#include "vec.cuh"

namespace llama_fast::cuda {

constexpr int kMaxThreads = 1024;
constexpr int kPieces = 4;                  // of a tensor that a thread has at once: 64 bytes in flight
constexpr int kFwdThreads = 128;            // a block of short rows
constexpr int kBwdThreads = 256;            // the same of the backward, which writes a part of dweight for each
constexpr int kShortPieces = 2;             // that a thread of short rows has at once, of as many rows as it takes
constexpr int kSumThreads = kWarp * kWarp;  // 32 warps share the parts of 32 columns of dweight
constexpr int kColumnThreads = 256;         // norm_bwd_columns: a piece of columns a thread

inline int threads_for(int64_t pieces) {
  return static_cast<int>(std::min<int64_t>(ceil_div(std::max<int64_t>(pieces, 1), kWarp) * kWarp, kMaxThreads));
}

// Rows that a thread has at once, of `mine` pieces each.
template <int kMine>
constexpr int kShortRows = kMine < kShortPieces ? kShortPieces / kMine : 1;

// How short rows are laid over a block: 2^lane_bits neighbouring lanes have one, `mine` pieces each, at most `most`. At
// least 8 lanes where there are pieces for them: then a warp reads whole lines of 128 bytes.
struct Short {
  int lane_bits, mine;  // mine: a power of two; 0 where a row is too long

  Short(int64_t C, int width, int most) : lane_bits(0), mine(0) {
    const int64_t pieces = ceil_div(std::max<int64_t>(C, 1), width);
    if (pieces > int64_t{most} * kWarp) return;
    while ((1 << lane_bits) < std::min<int64_t>(pieces, 8) || (int64_t{most} << lane_bits) < pieces) ++lane_bits;
    for (mine = 1; (mine << lane_bits) < pieces;) mine *= 2;
  }
};

// The same, as a thread sees it.
struct ShortPlace {
  int lanes, slot, slots, lane;  // slots: rows side by side in a block

  LLAMA_FAST_DEVICE ShortPlace(int lane_bits, int threads)
      : lanes(1 << lane_bits),
        slot(threadIdx.x >> lane_bits),
        slots(threads >> lane_bits),
        lane(threadIdx.x & (lanes - 1)) {}

  template <int kWidth>
  LLAMA_FAST_DEVICE int column(int j) const {
    return (lane + j * lanes) * kWidth;
  }

  // The sums over the lanes of each row; every lane gets them.
  template <int kRows>
  LLAMA_FAST_DEVICE void reduce(float (&sums)[kRows]) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], distance);
    }
  }
};

}  // namespace llama_fast::cuda
