// What the attention kernels for sm_80 and newer share: arguments, masks, which rows a block does, tiles in shared
// memory. Legend: t a query row, i = t + S - T its key, j a key.
#pragma once

#include "ptx.cuh"
#include "reduce.cuh"
#include "stream.cuh"

namespace llama_fast::cuda::attention {

constexpr float kLog2e = 1.44269504088896340736F;
constexpr float kLn2 = 0.69314718055994530942F;

// [B, T, heads, D], rows of D elements aligned to 16 bytes.
template <class T>
struct Heads {
  Global<T> data;
  int64_t b, t, h;  // strides
  explicit Heads(const Tensor& x) : data(x.ptr<T>()), b(x.stride[0]), t(x.stride[1]), h(x.stride[2]) {}
  LLAMA_FAST_DEVICE Global<T> at(int64_t batch, int64_t row, int64_t head) const {
    return data + (batch * b + row * t + head * h);
  }
};

// Sizes and mask of a call.
struct Shape {
  Global<const int32_t> cu_seqlens;
  int sequences;  // 0: not packed
  int B, T, S, H, G;
  bool causal;
  int window;  // 0: none
  float scale;
};

inline Shape make_shape(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens, double scale, bool causal,
                        int64_t window) {
  const auto size = [](int64_t n) { return static_cast<int>(n); };
  const bool packed = cu_seqlens.data != nullptr;
  return {cu_seqlens.ptr<int32_t>(),
          packed ? size(cu_seqlens.size[0]) - 1 : 0,
          size(q.size[0]),
          size(q.size[1]),
          size(k.size[1]),
          size(q.size[2]),
          size(k.size[2]),
          causal || window > 0,
          size(window <= 0          ? 0
               : window < (1 << 30) ? window
                                    : 0),
          static_cast<float>(scale)};
}

// Blocks of `rows` rows of the T (or S) rows of a call. Sequence n of a packed one owns the slots from cu_seqlens[n] /
// rows + n on: enough for its rows, and found by bisection.
inline int64_t slots(const Shape& p, int64_t length, int64_t rows) {
  return p.sequences > 0 ? length / rows + p.sequences : ceil_div(length, rows);
}

// One sequence: its first row in the tensors, its numbers of queries and keys.
struct Sequence {
  int begin, T, S;
  LLAMA_FAST_DEVICE int offset() const { return S - T; }
};

// The sequence of a slot, and in `first` the slot's first row in it, which may lie past its end.
LLAMA_FAST_DEVICE Sequence sequence_of(const Shape& p, int slot, int rows, int& first) {
  if (p.sequences == 0) {
    first = slot * rows;
    return {0, p.T, p.S};
  }
  int low = 0, high = p.sequences;  // low: the last sequence known to begin at or before the slot
  while (high - low > 1) {
    const int middle = (low + high) / 2, begin = p.cu_seqlens[middle];
    if (begin / rows + middle <= slot)
      low = middle;
    else
      high = middle;
  }
  const int begin = p.cu_seqlens[low], end = p.cu_seqlens[low + 1];
  first = (slot - (begin / rows + low)) * rows;
  return {begin, end - begin, end - begin};
}

// A half-open range of rows.
struct Range {
  int begin, end;
  LLAMA_FAST_DEVICE Range from(int start) const { return {begin - start, end - start}; }
  LLAMA_FAST_DEVICE bool has(int i) const { return begin <= i && i < end; }
};

// Keys that some of the queries [t, t + rows) see.
LLAMA_FAST_DEVICE Range keys_of(const Shape& p, const Sequence& s, int t, int rows) {
  Range r{0, s.S};
  if (p.causal) r.end = min(s.S, min(t + rows, s.T) + s.offset());
  if (p.window > 0) r.begin = max(0, t + s.offset() - p.window + 1);
  return r;
}

// Queries that see some of the keys [j, j + rows).
LLAMA_FAST_DEVICE Range queries_of(const Shape& p, const Sequence& s, int j, int rows) {
  Range r{0, s.T};
  if (p.causal) r.begin = max(0, j - s.offset());
  if (p.window > 0) r.end = min(s.T, min(j + rows, s.S) - 1 + p.window - s.offset());
  return r;
}

// Whether every query of [t, t + queries) sees every key of [j, j + keys), all of them being there.
LLAMA_FAST_DEVICE bool all_seen(const Shape& p, const Sequence& s, int t, int queries, int j, int keys) {
  const int first = t + s.offset(), last = first + queries - 1;
  return j + keys <= s.S && t + queries <= s.T && (!p.causal || j + keys - 1 <= first) &&
         (p.window == 0 || j > last - p.window);
}

// kRows rows of D halves in shared memory, in panels of 64 (or, for D = 96, 32) columns. The 16-byte chunks of a
// panel's row are permuted by the row, so that ldmatrix's eight rows and the copies' lanes meet no bank twice.
template <int kRows, int D>
struct Tile {
  static constexpr int kColumns = D % 64 == 0 ? 64 : 32;  // of a panel
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kBytes = kRows * D * 2;
  static_assert(D % kColumns == 0 && kRows % 8 == 0, "tile");

  // chunk: column / 8.
  static LLAMA_FAST_DEVICE uint32_t at(uint32_t base, int row, int chunk) {
    const int swizzle = kColumns == 64 ? row & 7 : row >> 1 & 3;
    return base + (chunk / kChunks) * (kRows * kColumns * 2) + row * (kColumns * 2) +
           ((chunk % kChunks ^ swizzle) << 4);
  }

  // Rows first..., of which those past `end` become zeros. `source` is row 0. A thread's addresses follow from its
  // first by constants, as do its fragments' (below): it copies the same chunk of every kStep-th row.
  template <int kThreads, class T>
  static LLAMA_FAST_DEVICE void copy(uint32_t base, Global<const T> source, int64_t stride, int first, int end) {
    constexpr int kStep = kThreads / (D / 8) >= 8 ? kThreads / (D / 8) / 8 * 8 : 4;
    static_assert(kStep * (D / 8) <= kThreads && (kStep % 8 == 0 || kColumns == 64) && kRows % kStep == 0, "threads");
    const int row = threadIdx.x / (D / 8), chunk = threadIdx.x % (D / 8);
    if (kStep * (D / 8) < kThreads && row >= kStep) return;
    const uint32_t target = at(base, row, chunk);
    Global<const T> from = source + ((first + row) * stride + chunk * 8);
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      const uint32_t to = (target ^ (i * kStep % 8 << 4)) + i * kStep * (kColumns * 2);
      ptx::cp_async_16(to, from, first + row + i * kStep < end ? 16 : 0);
      from += kStep * stride;
    }
  }

  // Fragments for mma. A lane's address is computed once, and a fragment's is a xor and a sum of constants away from
  // it: the permutation xors bits 4 to 6 alone, and a tile begins at a multiple of 128. So `row` (a multiple of 16), k
  // and n should be known when compiling.
  static LLAMA_FAST_DEVICE uint32_t moved(uint32_t lane_address, int row, int chunk) {
    return (lane_address ^ (chunk % kChunks << 4)) + (chunk / kChunks * (kRows * kColumns * 2) + row * (kColumns * 2));
  }

  // a for rows row..+15, columns 16k..+15.
  static LLAMA_FAST_DEVICE uint32_t lane_a(uint32_t base, int row) {
    const int lane = threadIdx.x % kWarp;
    return at(base, row + (lane & 15), lane >> 4);
  }
  static LLAMA_FAST_DEVICE void load_a(uint32_t (&a)[4], uint32_t lane_address, int row, int k) {
    ptx::ldmatrix_x4(a, moved(lane_address, row, 2 * k));
  }

  // b of two mma whose columns n are the rows row..+15, and whose k are the columns 16k..+15.
  static LLAMA_FAST_DEVICE uint32_t lane_b_rows(uint32_t base) {
    const int lane = threadIdx.x % kWarp;
    return at(base, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
  }
  static LLAMA_FAST_DEVICE void load_b_rows(uint32_t (&b)[2][2], uint32_t lane_address, int row, int k) {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, moved(lane_address, row, 2 * k));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
  }

  // b of two mma whose k are the rows row..+15, and whose columns n are the columns 16n..+15; its lane address is
  // lane_a's of row 0.
  static LLAMA_FAST_DEVICE void load_b_columns(uint32_t (&b)[2][2], uint32_t lane_address, int row, int n) {
    uint32_t r[4];
    ptx::ldmatrix_x4_trans(r, moved(lane_address, row, 2 * n));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
  }

  // Writes accumulators of one warp, rows row..+15, columns 8 first_n..., times `upper` (rows g) or `lower`, as T.
  template <class T, int kN>
  static LLAMA_FAST_DEVICE void put(uint32_t base, int row, int first_n, const float (&x)[kN][4], float upper,
                                    float lower) {
    const int lane = threadIdx.x % kWarp;
    const uint32_t first = at(base, row + lane / 4, first_n) + 4 * (lane % 4);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      ptx::st_shared(moved(first, 0, n), ptx::cvt_rn_x2<T>(x[n][1] * upper, x[n][0] * upper));
      ptx::st_shared(moved(first, 8, n), ptx::cvt_rn_x2<T>(x[n][3] * lower, x[n][2] * lower));
    }
  }

  // Copies rows row..+kSome and kSomeChunks chunks of the tile, by the lanes of one warp, to rows first... below `end`
  // of `target`, which is row 0.
  template <int kSome, int kSomeChunks, class T>
  static LLAMA_FAST_DEVICE void write_out(uint32_t base, int row, int first_chunk, Global<T> target, int64_t stride,
                                          int first, int end) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = lane; i < kSome * kSomeChunks; i += kWarp) {
      const int r = i / kSomeChunks, chunk = first_chunk + i % kSomeChunks;
      if (first + r < end)
        ptx::st_global_v4(target + ((first + r) * stride + chunk * 8), ptx::ld_shared_v4(at(base, row + r, chunk)));
    }
  }
};

// acc += a b for the two mma of a pair of b.
template <class T>
LLAMA_FAST_DEVICE void mma_pair(float (&acc0)[4], float (&acc1)[4], const uint32_t (&a)[4], const uint32_t (&b)[2][2]) {
  ptx::mma_m16n8k16<T>(acc0, a, b[0], acc0);
  ptx::mma_m16n8k16<T>(acc1, a, b[1], acc1);
}

// The accumulators of two neighbouring mma as `a` of the next product.
template <class T>
LLAMA_FAST_DEVICE void as_a(uint32_t (&a)[4], const float (&x0)[4], const float (&x1)[4]) {
  a[0] = ptx::cvt_rn_x2<T>(x0[1], x0[0]);
  a[1] = ptx::cvt_rn_x2<T>(x0[3], x0[2]);
  a[2] = ptx::cvt_rn_x2<T>(x1[1], x1[0]);
  a[3] = ptx::cvt_rn_x2<T>(x1[3], x1[2]);
}

// Over the four lanes that hold a row of accumulators.
template <class Op>
LLAMA_FAST_DEVICE float quad_reduce(float x) {
  x = Op{}(x, __shfl_xor_sync(kAllLanes, x, 1));
  return Op{}(x, __shfl_xor_sync(kAllLanes, x, 2));
}

}  // namespace llama_fast::cuda::attention
