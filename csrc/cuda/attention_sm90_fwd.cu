// Launches the forward of attention on sm_90a; the kernel: attention_sm90_fwd.cuh.
#include <algorithm>

#include "attention_sm90.h"
#include "attention_sm90_fwd.cuh"
#include "stream.cuh"
#include "tensor_map.cuh"

namespace llama_fast::cuda {

namespace sm90 {

__global__ void clear_kernel(Global<int> word) {
  if (threadIdx.x == 0) word[0] = 0;
}

}  // namespace sm90

namespace {

constexpr const char* kFwd = "attention_fwd";
constexpr int64_t kCacheBytes = 32 << 20;  // of the H100's 50 MB second cache: keys and values of a section of heads

template <class Config>
void launch_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale, bool causal,
                int64_t window, const Tensor& out, const Tensor& lse, const Tensor& scratch, Stream s) {
  constexpr int kOrder[4] = {3, 1, 2, 0};
  sm90::FwdParams p;
  p.q = make_tensor_map<4>(kFwd, q, kOrder, {sm90::kPanelCols, Config::kRows, 1, 1});
  p.k = make_tensor_map<4>(kFwd, k, kOrder, {sm90::kPanelCols, Config::kBlockKeys, 1, 1});
  p.v = make_tensor_map<4>(kFwd, v, kOrder, {sm90::kPanelCols, Config::kBlockKeys, 1, 1});
  p.out = sm90::rows_of(out);
  p.lse = lse.ptr<float>();
  p.cu_seqlens = cu_seqlens.ptr<int>();
  p.B = static_cast<int>(q.size[0]), p.T = static_cast<int>(q.size[1]), p.S = static_cast<int>(k.size[1]);
  p.H = static_cast<int>(q.size[2]), p.D = static_cast<int>(q.size[3]);
  p.heads_a_group = p.H / static_cast<int>(k.size[2]);
  const bool packed = cu_seqlens.data != nullptr;
  p.sequences = packed ? static_cast<int>(cu_seqlens.size[0]) - 1 : 0;
  p.blocks = packed ? p.T / Config::kRows + p.sequences : (p.T + Config::kRows - 1) / Config::kRows;
  const int64_t heads = static_cast<int64_t>(p.B) * p.H;
  const int64_t key_bytes = static_cast<int64_t>(p.S) * Config::kHeadDim * 2 * 2;
  p.section = static_cast<int>(std::min(heads, std::max<int64_t>(kCacheBytes / key_bytes, 1) * p.heads_a_group));
  p.scale = static_cast<float>(scale);
  p.scale_log2 = static_cast<float>(scale * sm90::kLog2e);
  p.mask = sm90::make_mask(causal, window);
  const OnDevice on(kFwd, s);
  const int64_t tiles = heads * p.blocks, blocks = multiprocessors(s.device);
  p.next_tile = tiles > blocks ? scratch.ptr<int>() : nullptr;
  if (tiles > blocks) launch(launch_of(kFwd, s, grid(1), 32), sm90::clear_kernel, p.next_tile);
  launch(launch_of(kFwd, s, grid(std::min(tiles, blocks)), Config::kThreads, Config::kSharedBytes),
         sm90::attention_fwd_kernel<Config>, p);
}

}  // namespace

const char* attention_sm90_objection(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  if (q.size[3] != 64 && q.size[3] != 96 && q.size[3] != 128) return "D is not 64, 96 or 128";
  // in float32: the row's maximum is taken before scaling, and 0 times the -inf of a hidden key is NaN
  if (!(static_cast<float>(scale) > 0)) return "scale is not above 0";
  for (const Tensor* x : {&q, &k, &v}) {
    if (reinterpret_cast<uintptr_t>(x->data) % 16 != 0) return "a tensor is not aligned to 16 bytes";
    for (int i = 0; i < 4; ++i) {
      if (x->size[i] == 0) return "a tensor is empty";
      if (i < 3 && x->size[i] > 1 && (x->stride[i] % 8 != 0 || x->stride[i] <= 0))
        return "the rows of a tensor are not aligned to 16 bytes";
    }
  }
  return nullptr;
}

void attention_sm90_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                        bool causal, int64_t window, const Tensor& out, const Tensor& lse, const Tensor& scratch,
                        Stream s) {
  const auto run = [&](auto config) {
    launch_fwd<decltype(config)>(q, k, v, cu_seqlens, scale, causal, window, out, lse, scratch, s);
  };
  const auto of_type = [&](auto type) {
    using T = decltype(type);
    if (q.size[3] <= 64)
      run(sm90::FwdConfig<T, 64, 3, 128, 2>{});
    else
      run(sm90::FwdConfig<T, 128, 2, 128, 2>{});
  };
  if (q.dtype == DType::bf16)
    of_type(bf16{});
  else
    of_type(f16{});
}

}  // namespace llama_fast::cuda
