// What the forward and the backward of attention on sm_90a share: tiles in shared memory, their descriptors, the rows
// and keys of a tile of work, the mask.
//
// A tile of [rows, cols] 16-bit elements lies in shared memory as cols/64 panels of [rows, 64], 128 bytes a row, in the
// 128-byte swizzle that TMA writes and wgmma reads. Columns past D are zeros, rows past the tensor's end too.
#pragma once

#include "../dispatch.h"
#include "ptx_sm90.cuh"

namespace llama_fast::cuda::sm90 {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kPanelCols = 64;
constexpr int kRowBytes = 128;
constexpr uint32_t kAllLanes = 0xFFFFFFFFU;
constexpr float kLog2e = 1.4426950408889634F;
constexpr float kInfinity = __builtin_huge_valf();

__host__ __device__ constexpr int panel_bytes(int rows) { return rows * kRowBytes; }
__host__ __device__ constexpr int tile_bytes(int rows, int cols) { return rows * cols * 2; }

// Whether the registers that a block of consumer warpgroups and one producer warpgroup is launched with, equally many a
// thread, are enough for what the groups then ask for.
constexpr bool registers_fit(int groups, int producer, int consumer) {
  return producer + groups * consumer <= 65536 / kGroupThreads / (groups + 1) / 8 * 8 * (groups + 1);
}

// Operand whose contracted index runs along a row: 64 or more rows from `tile`. Step kk covers columns 16 kk to 16 kk
// + 15.
LLAMA_FAST_DEVICE uint64_t row_operand(uint32_t tile) { return ptx::matrix_descriptor(tile, 16, 8 * kRowBytes); }
template <int kRows>
LLAMA_FAST_DEVICE constexpr uint64_t row_step(int kk) {
  return static_cast<uint64_t>((kk / 4 * panel_bytes(kRows) + kk % 4 * 32) / 16);
}
// Operand whose contracted index runs down the rows: all columns from `tile`. Step kk covers rows 16 kk to 16 kk + 15.
template <int kRows>
LLAMA_FAST_DEVICE uint64_t column_operand(uint32_t tile) {
  return ptx::matrix_descriptor(tile, panel_bytes(kRows), 8 * kRowBytes);
}
LLAMA_FAST_DEVICE constexpr uint64_t column_step(int kk) { return static_cast<uint64_t>(kk * 16 * kRowBytes / 16); }

// Two floats rounded to T, the first in the low half.
template <class T>
LLAMA_FAST_DEVICE uint32_t pack(float low, float high) {
  return ptx::cvt_rn_x2<T>(high, low);
}

// The float of the lower half (0) or the upper half (1).
template <class T>
LLAMA_FAST_DEVICE float unpack(uint32_t pair, int half) {
  if constexpr (std::is_same_v<T, bf16>)
    return bit_cast<float>(half == 0 ? pair << 16 : pair & 0xFFFF0000U);
  else
    return ptx::cvt_f32(T{static_cast<uint16_t>(pair >> 16 * half)});
}

// A tensor [B, T, H, D] of which kernels read or write rows; strides in elements.
struct Rows {
  Global<char> data;
  int64_t batch, token, head;

  template <class T>
  LLAMA_FAST_DEVICE Global<T> at(int b, int t, int h) const {
    return pointer_cast<T>(data) + (b * batch + t * token + h * head);
  }
};
inline Rows rows_of(const Tensor& x) { return {x.ptr<char>(), x.stride[0], x.stride[1], x.stride[2]}; }

// One 4-D map a tensor: (D, row, head, batch).
template <int kRows, int kCols>
LLAMA_FAST_DEVICE void load_tile(uint32_t tile, const ptx::TensorMap& map, uint32_t full, int row, int head,
                                 int batch) {
#pragma unroll
  for (int panel = 0; panel < kCols / kPanelCols; ++panel)
    ptx::tma_load_4d(tile + panel * panel_bytes(kRows), map, full, panel * kPanelCols, row, head, batch);
}

// Rows of 8 kChunks columns, two columns of each 8 a thread of a quad: thread t gets chunks 4 i + t whole.
template <int kChunks>
LLAMA_FAST_DEVICE void gather_chunks(uint32_t (&x)[kChunks]) {
  const int t = threadIdx.x % 4;
  const auto exchange = [](uint32_t& a, uint32_t& b, bool high, int distance) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, high ? a : b, distance);
    if (high)
      a = other;
    else
      b = other;
  };
#pragma unroll
  for (int i = 0; i < kChunks; i += 4) {
    exchange(x[i], x[i + 1], (t & 1) != 0, 1);
    exchange(x[i + 2], x[i + 3], (t & 1) != 0, 1);
    exchange(x[i], x[i + 2], (t & 2) != 0, 2);
    exchange(x[i + 1], x[i + 3], (t & 2) != 0, 2);
  }
}

// Writes factor * x, rounded, where x is a thread's part of the accumulators of 64 rows: its rows 0 and 8, the first at
// `to`. rows: how many from that first one are to be written (0 or less: none); columns likewise, a multiple of 8.
// Called by whole warps.
template <class T, int kCols>
LLAMA_FAST_DEVICE void store_rows(const float (&x)[kCols / 2], const float (&factor)[2], Global<T> to, int64_t stride,
                                  int rows, int columns) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t chunks[kCols / 8];
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j)
      chunks[j] = pack<T>(x[4 * j + 2 * r] * factor[r], x[4 * j + 2 * r + 1] * factor[r]);
    gather_chunks(chunks);
#pragma unroll
    for (int i = 0; i < kCols / 32; ++i) {
      const int column = 32 * i + 8 * (threadIdx.x % 4);
      if (8 * r < rows && column < columns)
        ptx::st_global_v4(to + 8 * r * stride + column,
                          uint4{chunks[4 * i], chunks[4 * i + 1], chunks[4 * i + 2], chunks[4 * i + 3]});
    }
  }
}

// The sequence of a block of rows: the lengths, where it begins in the tensors, and the block within it.
struct Span {
  int begin, T, S, block;
  int batch, sequence;
};

// Sequence n of a packed batch has ceil(length / rows) blocks; block `index` of all in order. Called by whole warps.
// T < 0 where there are fewer blocks.
LLAMA_FAST_DEVICE Span find_span(Global<const int> cu_seqlens, int sequences, int rows, int index) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < sequences; first += 32) {
    int through = 0;  // blocks of the sequences from `first` to this lane's
    if (first + lane < sequences) through = (cu_seqlens[first + lane + 1] - cu_seqlens[first + lane] + rows - 1) / rows;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, through, distance);
      if (lane >= distance) through += other;
    }
    const uint32_t found = __ballot_sync(kAllLanes, index < through);
    if (found != 0) {
      const int source = __ffs(static_cast<int>(found)) - 1, n = first + source;
      const int begin = cu_seqlens[n], length = cu_seqlens[n + 1] - begin;
      const int behind = __shfl_sync(kAllLanes, through, source);  // blocks up to the end of the sequence
      return Span{begin, length, length, index - behind + (length + rows - 1) / rows, 0, n};
    }
    index -= __shfl_sync(kAllLanes, through, 31);
  }
  return Span{0, -1, -1, 0, 0, 0};
}

// Works are numbers below `works`. A block's producer warp deals them, `works` or more ending the list, in a ring of
// two slots of 8 bytes, the number first. Calls f(n, slot) for the n-th of the block; whole warps, each of which frees
// the slot.
template <class F>
LLAMA_FAST_DEVICE void each_dealt_work(uint32_t slots, uint32_t full, uint32_t empty, int works, F&& f) {
#pragma unroll 1
  for (uint32_t n = 0;; ++n) {
    const uint32_t slot = slots + 8 * (n % 2);
    ptx::mbarrier_wait(full + 8 * (n % 2), n / 2 % 2);
    if (static_cast<int>(ptx::ld_shared(slot)) >= works) return;
    f(n, slot);
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty + 8 * (n % 2));
  }
}

// By one thread of the producer warp: hands out the n-th work, with a word that goes with it.
LLAMA_FAST_DEVICE void deal_work(uint32_t slots, uint32_t full, uint32_t empty, uint32_t n, int work, int word) {
  ptx::mbarrier_wait(empty + 8 * (n % 2), n / 2 % 2 ^ 1);
  ptx::st_shared(slots + 8 * (n % 2), work);
  ptx::st_shared(slots + 8 * (n % 2) + 4, word);
  ptx::mbarrier_arrive(full + 8 * (n % 2));
}

// Query i (counted as key, i = t + S - T) sees keys low(i) <= j < high(i).
struct Mask {
  bool causal;
  int window;  // 0: none

  LLAMA_FAST_DEVICE int low(int i) const { return window > 0 ? max(i - window + 1, 0) : 0; }
  LLAMA_FAST_DEVICE int high(int i, int S) const { return causal ? min(i + 1, S) : S; }
};

inline Mask make_mask(bool causal, int64_t window) {
  constexpr int64_t kWide = 1 << 30;  // wider than any sequence
  return {causal || window > 0, static_cast<int>(window <= 0 ? 0 : window < kWide ? window : kWide)};
}

}  // namespace llama_fast::cuda::sm90
