// rms_norm and add_rms_norm. Sums are float32, y and dx are rounded once. add_rms_norm rounds x + residual to T and
// normalises the rounded sum.
//
// A short row is done by a few lanes of a warp, so that a block has many rows in flight; another one by a block. The
// forward reads a row once and holds it in registers where it fits (kHeld), else reads it a second time. The backward's
// blocks walk over rows and add dweight in registers: one float32 row of `scratch` a block, summed by a second kernel.
// Rows too long for that, or off the 16-byte boundary, take one kernel for the rows' means, which it leaves in
// `scratch`, and one that has columns to a thread for dx and dweight: x and dy are read twice. Derivation:
// docs/ops/rms_norm.md.
#include "rms_norm_bwd.cuh"
#include "rms_norm_fwd.cuh"

namespace llama_fast::cuda {
namespace {

// Bytes of shared memory that a block may have ("Compute Capabilities", CUDA C++ Programming Guide).
int64_t most_shared(int architecture) {
  const int64_t kib = architecture == 80 || architecture == 87   ? 163
                      : architecture >= 90 && architecture < 120 ? 227
                                                                 : 99;
  return kib << 10;
}

// Calls f(Short, width, mine), the two as integral constants, and gives true; false where rows are not short.
template <class T, int kMost, class F>
bool with_short(int64_t C, bool aligned, F&& f) {
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 2> kTwo;
  constexpr std::integral_constant<int, kMost> kAll;
  constexpr std::integral_constant<int, kLanes<T>> kLong;
  const Short rows(C, aligned ? kLong : 1, kMost);
  if (rows.mine == 0) return false;
  if (!aligned)
    f(rows, kOne, kAll);
  else if (rows.mine == 1)
    f(rows, kLong, kOne);
  else if (rows.mine == 2)
    f(rows, kLong, kTwo);
  else
    f(rows, kLong, kAll);
  return true;
}

// Blocks of the backward's walk over rows, each with a part of dweight: as many as a device holds at 64 registers a
// thread, and no more than rows.
int64_t walk_parts(int64_t R, int64_t C, int64_t item, int device) {
  constexpr int64_t kThreadsPerProcessor = 1024;
  const int64_t threads = threads_for(ceil_div(C * item, 16));
  return std::min(R, multiprocessors(device) * (kThreadsPerProcessor / threads));
}

// The same of short rows.
int64_t short_parts(int64_t R, const Short& rows, int mine, bool add, int device) {
  const int64_t at_once = int64_t{mine < kShortPieces ? kShortRows<1> : 1} * (kBwdThreads >> rows.lane_bits);
  return std::min(ceil_div(R, at_once), multiprocessors(device) * short_blocks(add));
}

// Parts of the rows for norm_bwd_columns_kernel: four rounds of blocks or so.
int64_t column_parts(int64_t R, int64_t slabs, int device) {
  constexpr int64_t kBlocksPerProcessor = 8;
  return std::min(R, ceil_div(multiprocessors(device) * kBlocksPerProcessor, slabs));
}

int64_t slabs_of(int64_t C, int64_t width) { return ceil_div(C, kColumnThreads * width); }

template <bool kAdd>
void norm_fwd(const char* op, const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
              const Tensor& y, const Tensor& sum, const Tensor& rstd, Stream s) {
  const OnDevice device(op, s);
  const int64_t R = x.size[0], C = x.size[1];
  if (R == 0) return;
  const bool aligned =
      rows_aligned(x) && rows_aligned(residual) && rows_aligned(weight) && rows_aligned(y) && rows_aligned(sum);
  with_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormFwd<T> p{Rows<const T>(x),
                       Rows<const T>(residual),
                       weight.ptr<T>(),
                       Rows<T>(y),
                       Rows<T>(sum),
                       rstd.ptr<float>(),
                       C,
                       static_cast<float>(eps)};
    const auto run = [&](auto kWidth, auto kHeld) {
      launch(launch_of(op, s, grid(R), threads_for(ceil_div(ceil_div(C, kWidth), kPieces))),
             norm_fwd_kernel<T, kWidth, kHeld, kAdd>, p);
    };
    const auto run_short = [&](const Short& rows, auto kWidth, auto kMine) {
      const int64_t at_once = int64_t{kShortRows<kMine>} * (kFwdThreads >> rows.lane_bits);
      launch(launch_of(op, s, grid(ceil_div(R, at_once)), kFwdThreads), norm_fwd_short_kernel<T, kWidth, kMine, kAdd>,
             p, R, rows.lane_bits);
    };
    constexpr std::integral_constant<int, kLanes<T>> kLong;
    if (with_short<T, kPieces>(C, aligned, run_short)) return;
    if (!aligned)
      run(std::integral_constant<int, 1>{}, std::false_type{});
    else if (C <= int64_t{kLong} * kPieces * kMaxThreads)
      run(kLong, std::true_type{});
    else
      run(kLong, std::false_type{});
  });
}

template <bool kAdd>
void norm_bwd(const char* op, const Tensor& dy, const Tensor& dsum, const Tensor& x, const Tensor& weight,
              const Tensor& rstd, const Tensor& dx, const Tensor& dweight, const Tensor& scratch, Stream s) {
  const OnDevice device(op, s);
  const int64_t R = x.size[0], C = x.size[1];
  int64_t parts = 0;
  if (C == 0) return;
  const bool aligned =
      rows_aligned(dy) && rows_aligned(dsum) && rows_aligned(x) && rows_aligned(weight) && rows_aligned(dx);
  with_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    NormBwd<T> p{Rows<const T>(dy),
                 Rows<const T>(x),
                 Rows<const T>(dsum),
                 weight.ptr<T>(),
                 rstd.ptr<float>(),
                 Rows<T>(dx),
                 scratch.ptr<float>(),
                 nullptr,
                 R,
                 C};
    constexpr int kLong = kLanes<T>;
    const auto run_short = [&](const Short& rows, auto kWidth, auto kMine) {
      parts = short_parts(R, rows, kMine, kAdd, s.device);
      launch(launch_of(op, s, grid(parts), kBwdThreads), norm_bwd_short_kernel<T, kWidth, kMine, kAdd>, p,
             rows.lane_bits);
    };
    const auto run_any = [&](auto kWidth) {
      const int64_t slabs = slabs_of(C, kWidth);
      parts = column_parts(R, slabs, s.device);
      p.means = p.partial + parts * C;
      launch(launch_of(op, s, grid(R), threads_for(ceil_div(C, 2 * kWidth))), norm_means_kernel<T, kWidth>, p);
      launch(launch_of(op, s, grid(slabs * parts), kColumnThreads), norm_bwd_columns_kernel<T, kWidth, kAdd>, p,
             static_cast<int>(slabs), static_cast<int>(parts));
    };
    const auto run_walk = [&] {
      parts = walk_parts(R, C, sizeof(T), s.device);
      if (C <= int64_t{kLong} * kMaxThreads)
        launch(launch_of(op, s, grid(parts), threads_for(ceil_div(C, kLong))), norm_bwd_kernel<T, kAdd>, p);
      else
        launch(launch_of(op, s, grid(parts), kMaxThreads, Long<T>::kSharedBytes), norm_bwd_long_kernel<T, kAdd>, p);
    };
    if (R == 0 || with_short<T, kShortPieces>(C, aligned, run_short)) {
      // R = 0: dweight = 0
    } else if (!aligned) {
      run_any(std::integral_constant<int, 1>{});
    } else if (C <= int64_t{kLong} * kMaxThreads ||
               (C <= Long<T>::kColumns && Long<T>::kSharedBytes <= most_shared(architecture(s.device)))) {
      run_walk();
    } else {
      run_any(std::integral_constant<int, kLong>{});
    }
    launch(launch_of(op, s, grid(ceil_div(C, kWarp)), kSumThreads), norm_dweight_sum_kernel<T>,
           Global<const float>(scratch.ptr<const float>()), Global<T>(dweight.ptr<T>()), parts, C);
  });
}

}  // namespace

int64_t norm_scratch(int64_t R, int64_t C, int64_t item, int device) {
  int64_t parts = std::max(walk_parts(R, C, item, device), column_parts(R, slabs_of(C, 16 / item), device));
  parts = std::max(parts, column_parts(R, slabs_of(C, 1), device));
  for (int64_t width : {16 / item, int64_t{1}}) {
    const Short rows(C, static_cast<int>(width), kShortPieces);
    if (rows.mine != 0)
      parts = std::max(parts, short_parts(R, rows, width == 1 ? kShortPieces : rows.mine, false, device));
  }
  return parts * C + R;
}

void rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps, const Tensor& y, const Tensor& rstd, Stream s) {
  norm_fwd<false>("rms_norm_fwd", x, Tensor{}, weight, eps, y, Tensor{}, rstd, s);
}

void rms_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, const Tensor& dx,
                  const Tensor& dweight, const Tensor& scratch, Stream s) {
  norm_bwd<false>("rms_norm_bwd", dy, Tensor{}, x, weight, rstd, dx, dweight, scratch, s);
}

void add_rms_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const Tensor& y,
                      const Tensor& sum, const Tensor& rstd, Stream s) {
  norm_fwd<true>("add_rms_norm_fwd", x, residual, weight, eps, y, sum, rstd, s);
}

void add_rms_norm_bwd(const Tensor& dy, const Tensor& dsum, const Tensor& sum, const Tensor& weight, const Tensor& rstd,
                      const Tensor& dx, const Tensor& dweight, const Tensor& scratch, Stream s) {
  norm_bwd<true>("add_rms_norm_bwd", dy, dsum, sum, weight, rstd, dx, dweight, scratch, s);
}

}  // namespace llama_fast::cuda
