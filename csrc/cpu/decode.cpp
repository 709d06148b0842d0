// A whole LLaMA block for the one to four rows of a decode step, in one call: between the products, whose speed is that
// of reading the weights once, nothing waits for Python. It is the other kernels of this folder called one after the
// other, so its results are bitwise those of the ops called one by one. Derivation: docs/block.md.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../dispatch.h"
#include "attention_plan.h"
#include "simd.h"

namespace llama_fast::cpu {
namespace {

// Head dims of the attention, as in llama_fast/ops/table.py.
constexpr int64_t kLeastHeadDim = 16, kMostHeadDim = 256, kHeadDimStep = 8;

// Contiguous tensors of one call, each on a cache line of its own, from one piece of memory.
class Arena {
 public:
  explicit Arena(int64_t bytes) : memory_(bytes), at_(memory_.data()) {}
  Tensor make(DType dtype, std::initializer_list<int64_t> sizes) {
    Tensor t;
    t.data = at_;
    t.dtype = dtype;
    for (const int64_t size : sizes) t.size[t.ndim++] = size;
    int64_t count = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
      t.stride[i] = count;
      count *= t.size[i];
    }
    at_ += (count * 4 + kLine - 1) / kLine * kLine;
    return t;
  }

  static constexpr int64_t kLine = 64;

 private:
  Scratch<char> memory_;
  char* at_;
};

// [R, H D] or [B, T, H D] seen as [B, T, H, D]
Tensor heads(const Tensor& rows, int64_t B, int64_t T, int64_t D) {
  Tensor t = rows;
  const int64_t HD = rows.size[rows.ndim - 1], stride = rows.stride[rows.ndim - 2];
  t.ndim = 4;
  t.size[0] = B, t.size[1] = T, t.size[2] = HD / D, t.size[3] = D;
  t.stride[0] = T * stride, t.stride[1] = stride, t.stride[2] = D, t.stride[3] = 1;
  return t;
}

// The rows [begin, end) of dimension 1.
Tensor narrow(const Tensor& a, int64_t begin, int64_t end) {
  Tensor t = a;
  const int64_t item = a.dtype == DType::f32 ? 4 : 2;
  t.data = a.ptr<char>() + begin * a.stride[1] * item;
  t.size[1] = end - begin;
  return t;
}

void copy(const Tensor& from, const Tensor& to) {
  const int64_t item = from.dtype == DType::f32 ? 4 : 2;
  const auto at = [item](const Tensor& a, int64_t b, int64_t t, int64_t h) {
    return a.ptr<char>() + (b * a.stride[0] + t * a.stride[1] + h * a.stride[2]) * item;
  };
  for (int64_t b = 0; b < from.size[0]; ++b)
    for (int64_t t = 0; t < from.size[1]; ++t)
      for (int64_t h = 0; h < from.size[2]; ++h)
        std::memcpy(at(to, b, t, h), at(from, b, t, h), static_cast<size_t>(from.size[3] * item));
}

// Whether `t` has these sizes and the dtype, and rows without gaps.
bool is(const Tensor& t, DType dtype, std::initializer_list<int64_t> sizes) {
  if (t.data == nullptr || t.dtype != dtype || t.ndim != static_cast<int>(sizes.size())) return false;
  return std::equal(sizes.begin(), sizes.end(), t.size) && (t.size[t.ndim - 1] == 1 || t.stride[t.ndim - 1] == 1);
}

template <class T>
void add(const T* a, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<T>(to_float(to[i]) + to_float(a[i]));
}

}  // namespace

bool decode_block(const Tensor& x, const Tensor& norm1, const Tensor& wq, const Tensor& wk, const Tensor& wv,
                  const Tensor& wo, const Tensor& norm2, const Tensor& wgate, const Tensor& wup, const Tensor& wdown,
                  const Tensor& cos, const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache, int64_t used,
                  double eps, bool interleaved, int64_t window, const Tensor& y) {
  const int64_t B = x.size[0], T = x.size[1], C = x.size[2], R = B * T, D = k_cache.size[3];
  const int64_t HD = wq.size[0], GD = wk.size[0], F = wgate.size[0];
  const DType dtype = x.dtype;
  if (dtype != DType::f32 && dtype != DType::bf16) return false;
  if (R < 1 || R > 4 || D < kLeastHeadDim || D > kMostHeadDim || D % kHeadDimStep != 0) return false;
  if (GD < 1 || GD % D != 0 || HD % GD != 0 || used < 0) return false;
  if (!is(x, dtype, {B, T, C}) || !is(norm1, dtype, {C}) || !is(norm2, dtype, {C})) return false;
  if (!is(wq, dtype, {HD, C}) || !is(wk, dtype, {GD, C}) || !is(wv, dtype, {GD, C}) || !is(wo, dtype, {C, HD}))
    return false;
  if (!is(wgate, dtype, {F, C}) || !is(wup, dtype, {F, C}) || !is(wdown, dtype, {C, F})) return false;
  for (const Tensor* table : {&cos, &sin})
    if (!is(*table, DType::f32, {table->size[0] == 1 ? 1 : B, T, D / 2})) return false;
  for (const Tensor* cache : {&k_cache, &v_cache})
    if (cache->size[1] < used + T || !is(*cache, dtype, {B, cache->size[1], GD / D, D})) return false;
  // 4 bytes for a number of any dtype, and the fourteen tensors' lines begun
  Arena arena(4 * R * (4 * C + 3 * HD + 2 * GD + 3 * F + 1 + HD / D) + 14 * Arena::kLine);
  const auto make = [&](std::initializer_list<int64_t> sizes) { return arena.make(dtype, sizes); };
  Tensor x_RC = x, y_RC = y;
  for (Tensor* t : {&x_RC, &y_RC}) {
    t->ndim = 2;
    t->size[0] = R, t->size[1] = C;
    t->stride[0] = C, t->stride[1] = 1;
  }

  const Tensor rstd = arena.make(DType::f32, {R}), lse = arena.make(DType::f32, {B, HD / D, T});
  const Tensor n1 = make({R, C}), q = make({R, HD}), k = make({R, GD}), v = make({R, GD});
  rms_norm_fwd(x_RC, norm1, eps, n1, rstd);
  const Tensor in[] = {wq, wk, wv}, qkv[] = {q, k, v};
  gemv_group(n1, in, qkv, 3);

  const int64_t end = used + T;
  const Tensor q_turned = make({R, HD}), keys = narrow(k_cache, used, end), values = narrow(v_cache, used, end);
  rope_fwd(heads(q, B, T, D), heads(k, B, T, D), cos, sin, interleaved, heads(q_turned, B, T, D), keys);
  copy(heads(v, B, T, D), values);

  const Tensor out = make({R, HD}), attended = make({R, C});
  attention_fwd(heads(q_turned, B, T, D), narrow(k_cache, 0, end), narrow(v_cache, 0, end), Tensor{},
                1.0 / std::sqrt(static_cast<double>(D)), true, window, heads(out, B, T, D), lse);
  gemv(out, wo, attended);

  const Tensor n2 = make({R, C}), h = make({R, C}), gate = make({R, F}), up = make({R, F}), act = make({R, F});
  add_rms_norm_fwd(attended, x_RC, norm2, eps, n2, h, rstd);
  const Tensor wide[] = {wgate, wup}, gated[] = {gate, up};
  gemv_group(n2, wide, gated, 2);
  swiglu_fwd(gate, up, act);
  gemv(act, wdown, y_RC);
  with_dtype(dtype, [&](auto tag) {
    using N = decltype(tag);
    add(h.ptr<N>(), y_RC.ptr<N>(), R * C);
  });
  return true;
}

}  // namespace llama_fast::cpu
