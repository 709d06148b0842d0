// Launches the backward of attention on sm_90a (attention_sm90_bwd.cuh) and what stands before it: the
// statistics of the rows of queries.
#include <algorithm>

#include "attention_sm90.h"
#include "attention_sm90_bwd.cuh"
#include "stream.cuh"
#include "tensor_map.cuh"

namespace llama_fast::cuda {

namespace sm90 {

constexpr int kStatsRows = 64;  // BwdConfig::kRows

struct RowParams {
  Rows out, dout, dq;
  Global<const float> lse;  // [B, H, T]
  Global<float> stats;      // [tiles of queries][lse log2(e), delta][64]
  Global<int> turns, next_work;
  Global<const int> cu_seqlens;
  int T, S, H, D, query_tiles, sequences;
  Mask mask;
};

// The tile of queries of a block of the grid (tile, head, batch): its span, and where its statistics lie.
struct QueryTile {
  Span span;
  int64_t index;
};
LLAMA_FAST_DEVICE QueryTile query_tile(const RowParams& p) {
  const int block = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
  if (p.cu_seqlens != nullptr) {
    const Span span = find_span(p.cu_seqlens, p.sequences, kStatsRows, block);
    return {span, static_cast<int64_t>(head) * p.query_tiles + span.begin / kStatsRows + span.sequence + span.block};
  }
  return {Span{0, p.T, p.S, block, batch, 0}, (static_cast<int64_t>(batch) * p.H + head) * p.query_tiles + block};
}

// stats, zeros for turns and next_work, and for dq in the tiles that no key is seen from. 8 threads a row.
template <class T>
__global__ void __launch_bounds__(128) attention_bwd_stats_kernel(const __grid_constant__ RowParams p) {
  const int thread = threadIdx.x, head = blockIdx.y;
  if (thread == 0 && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) p.next_work[0] = p.next_work[1] = 0;
  const QueryTile tile = query_tile(p);
  const Span& span = tile.span;
  if (span.T < 0) return;
  if (thread == 0) p.turns[tile.index] = 0;
  const Global<float> stats = p.stats + tile.index * 2 * kStatsRows;
  const int last_row = min((span.block + 1) * kStatsRows, span.T) - 1;
  const bool sees_nothing = p.mask.high(last_row + span.S - span.T, span.S) <= 0;
  for (int r = thread / 8; r < kStatsRows; r += 16) {
    const int row = span.block * kStatsRows + r;
    float sum = 0.0F, lse = kInfinity;  // p = 0 in a row that is not there or sees nothing
    if (row < span.T) {
      const auto out = p.out.template at<T>(span.batch, span.begin + row, head);
      const auto dout = p.dout.template at<T>(span.batch, span.begin + row, head);
      for (int column = thread % 8 * 8; column < p.D; column += 64) {
        const uint4 a = ptx::ld_global_nc_v4(out + column), b = ptx::ld_global_nc_v4(dout + column);
        const uint32_t pairs_a[4] = {a.x, a.y, a.z, a.w}, pairs_b[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += unpack<T>(pairs_a[i / 2], i % 2) * unpack<T>(pairs_b[i / 2], i % 2);
      }
      if (sees_nothing) {
        const auto dq = p.dq.template at<T>(span.batch, span.begin + row, head);
        for (int column = thread % 8 * 8; column < p.D; column += 64) ptx::st_global_v4(dq + column, uint4{0, 0, 0, 0});
      }
      const float own = p.lse[(static_cast<int64_t>(span.batch) * p.H + head) * p.T + span.begin + row];
      if (own != -kInfinity) lse = own * kLog2e;
    }
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    if (thread % 8 == 0) {
      stats[r] = lse;
      stats[kStatsRows + r] = sum;
    }
  }
}

}  // namespace sm90

namespace {

constexpr const char* kBwd = "attention_bwd";

// The parts of the scratch, in 4-byte words.
struct Scratch {
  int64_t query_tiles;  // a head
  int64_t tiles;        // of all heads
  int64_t stats, dq_sum, turns, next_work, words;

  Scratch(const Tensor& q, const Tensor& cu_seqlens) {
    const int64_t T = q.size[1], D = q.size[3] <= 64 ? 64 : 128;
    query_tiles =
        cu_seqlens.data != nullptr ? T / sm90::kStatsRows + cu_seqlens.size[0] - 1 : ceil_div(T, sm90::kStatsRows);
    tiles = q.size[0] * q.size[2] * query_tiles;
    dq_sum = 0;
    stats = dq_sum + tiles * sm90::kStatsRows * D;
    turns = stats + tiles * 2 * sm90::kStatsRows;
    next_work = turns + tiles;
    words = next_work + 2;
  }
};

// Heads that are dealt together. The tiles of keys of a head take turns in adding dq, and a turn takes about a step of
// 128 columns: so the next tile of a head should begin some steps after the one before. More of them, and fewer tiles
// of a head run at once: the rows go to the second cache and leave it that much more often, which short works do not
// bear. At D 64 a short work's steps are counted as they are: on an H100 8 x 2k tokens ran at 285 TFLOP/s with eight
// between the tiles and at 351 with four.
template <class Config>
int section_of(const sm90::BwdParams& p, int64_t blocks) {
  const int64_t seen = p.mask.window > 0 ? (p.mask.window + Config::kKeys) / Config::kRows + 1 : p.query_tiles;
  const int64_t rows = std::min<int64_t>(seen, p.mask.causal ? (p.query_tiles + 1) / 2 : p.query_tiles);
  const int64_t steps = std::max<int64_t>(rows, 1) * p.heads_a_group;  // of a work, on average
  constexpr int64_t kStep = 128 / Config::kHeadDim;                    // in steps, one of 128 columns
  const int64_t steps_between = steps >= 64 * kStep ? 8 * kStep : 4;
  const int64_t heads = static_cast<int64_t>(p.cu_seqlens != nullptr ? 1 : p.B) * p.G;
  const int64_t wanted = std::max<int64_t>(steps_between * blocks / steps, 1);
  const int64_t sections = std::max<int64_t>(heads / wanted, 1);
  return static_cast<int>(ceil_div(heads, sections));
}

template <class Config>
void launch_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                const Tensor& lse, const Tensor& cu_seqlens, double scale, bool causal, int64_t window,
                const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& scratch, Stream s) {
  static_assert(Config::kRows == sm90::kStatsRows, "the statistics of one tile of queries are one copy");
  constexpr int kOrder[4] = {3, 1, 2, 0};
  const Scratch parts(q, cu_seqlens);
  const bool packed = cu_seqlens.data != nullptr;
  sm90::RowParams rows;
  rows.out = sm90::rows_of(out), rows.dout = sm90::rows_of(dout), rows.dq = sm90::rows_of(dq);
  rows.lse = lse.ptr<float>();
  rows.stats = scratch.ptr<float>() + parts.stats;
  rows.turns = scratch.ptr<int>() + parts.turns, rows.next_work = scratch.ptr<int>() + parts.next_work;
  rows.cu_seqlens = cu_seqlens.ptr<int>();
  rows.T = static_cast<int>(q.size[1]), rows.S = static_cast<int>(k.size[1]);
  rows.H = static_cast<int>(q.size[2]), rows.D = static_cast<int>(q.size[3]);
  rows.query_tiles = static_cast<int>(parts.query_tiles);
  rows.sequences = packed ? static_cast<int>(cu_seqlens.size[0]) - 1 : 0;
  rows.mask = sm90::make_mask(causal, window);

  sm90::BwdParams p;
  p.q = make_tensor_map<4>(kBwd, q, kOrder, {sm90::kPanelCols, Config::kRows, 1, 1});
  p.k = make_tensor_map<4>(kBwd, k, kOrder, {sm90::kPanelCols, Config::kKeys, 1, 1});
  p.v = make_tensor_map<4>(kBwd, v, kOrder, {sm90::kPanelCols, Config::kKeys, 1, 1});
  p.dout = make_tensor_map<4>(kBwd, dout, kOrder, {sm90::kPanelCols, Config::kRows, 1, 1});
  const int64_t row = 2 * sm90::kStatsRows;
  const Tensor stats{scratch.ptr<float>() + parts.stats, DType::f32, 2, {parts.tiles, row}, {row, 1}};
  p.stats = make_tensor_map<2>(kBwd, stats, {1, 0}, {2 * sm90::kStatsRows, 1});
  p.dq_sum = scratch.ptr<float>() + parts.dq_sum, p.turns = rows.turns, p.next_work = rows.next_work;
  p.dq = rows.dq, p.dk = sm90::rows_of(dk), p.dv = sm90::rows_of(dv);
  p.cu_seqlens = rows.cu_seqlens;
  p.B = static_cast<int>(q.size[0]), p.T = rows.T, p.S = rows.S, p.H = rows.H, p.D = rows.D;
  p.G = static_cast<int>(k.size[2]), p.heads_a_group = p.H / p.G;
  p.sequences = rows.sequences, p.query_tiles = rows.query_tiles;
  p.key_tiles = packed ? p.S / Config::kKeys + p.sequences : static_cast<int>(ceil_div(p.S, Config::kKeys));
  p.scale = static_cast<float>(scale), p.scale_log2 = static_cast<float>(scale * sm90::kLog2e);
  p.mask = rows.mask;

  const OnDevice on(kBwd, s);
  p.section = section_of<Config>(p, multiprocessors(s.device));
  const dim3 tiles = grid(parts.query_tiles, p.H, p.B);
  const int64_t works = static_cast<int64_t>(p.key_tiles) * p.G * p.B;
  launch(launch_of(kBwd, s, tiles, 128), sm90::attention_bwd_stats_kernel<typename Config::T>, rows);
  launch(launch_of(kBwd, s, grid(std::min(works, multiprocessors(s.device))), Config::kThreads, Config::kSharedBytes),
         sm90::attention_bwd_kernel<Config>, p);
}

}  // namespace

int64_t attention_sm90_bwd_scratch(const Tensor& q, const Tensor& cu_seqlens) {
  return 4 * Scratch(q, cu_seqlens).words;
}

void attention_sm90_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const Tensor& lse, const Tensor& cu_seqlens, double scale, bool causal, int64_t window,
                        const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& scratch, Stream s) {
  const auto run = [&](auto config) {
    launch_bwd<decltype(config)>(dout, q, k, v, out, lse, cu_seqlens, scale, causal, window, dq, dk, dv, scratch, s);
  };
  const auto of_type = [&](auto type) {
    using T = decltype(type);
    if (q.size[3] <= 64)
      run(sm90::BwdConfig<T, 64>{});
    else
      run(sm90::BwdConfig<T, 128>{});
  };
  if (q.dtype == DType::bf16)
    of_type(bf16{});
  else
    of_type(f16{});
}

}  // namespace llama_fast::cuda
