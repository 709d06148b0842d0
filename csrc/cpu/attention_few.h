// The forward of a head of few rows, a decode: k and v are read once where they lie, lanes along D, for packing them
// would move more bytes than the products. Weights stay float32. Included inside the ISA regions of attention_fwd.cpp
// and attention_amx_fwd.cpp, after attention_tile.h; no include guard.

namespace llama_fast::cpu::LF_ISA {
namespace {

// sum_d a[d] b[d], `a` with zeros up to a multiple of kLanes.
template <class T>
LF_INLINE float dot_padded(const float* a, const T* b, int64_t D) {
  VecF total[2] = {VecF(0.0F), VecF(0.0F)};
  int64_t d = 0;
  for (; d + 2 * kLanes <= D; d += 2 * kLanes) {
    total[0] = fma(load(a + d), load(b + d), total[0]);
    total[1] = fma(load(a + d + kLanes), load(b + d + kLanes), total[1]);
  }
  for (; d < D; d += kLanes)
    total[0] = fma(load(a + d), d + kLanes <= D ? load(b + d) : load_n(b + d, D - d), total[0]);
  return sum(total[0] + total[1]);
}

// out[0, D) = alpha out + sum_j weights[j] v[j], in chains of kChain keys.
template <class T, class RowAt>
LF_INLINE void add_rows(const float* weights, const RowAt& v_row, int64_t keys, int64_t D, float alpha, float* out) {
  constexpr int64_t kChain = 16;
  constexpr int kWide = 4;
  const auto step = [&](int64_t d, auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    VecF total[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) total[v] = load(out + d + v * kLanes) * VecF(alpha);
    for (int64_t first = 0; first < keys; first += kChain) {
      VecF acc[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[v] = VecF(0.0F);
      for (int64_t j = first; j < std::min(keys, first + kChain); ++j) {
        const T* row = v_row(j) + d;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const bool whole = NV > 1 || d + kLanes <= D;
          acc[v] = fma(VecF(weights[j]), whole ? load(row + v * kLanes) : load_n(row, D - d), acc[v]);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) total[v] = total[v] + acc[v];
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(out + d + v * kLanes, total[v]);
  };
  int64_t d = 0;
  for (; d + kWide * kLanes <= D; d += kWide * kLanes) step(d, std::integral_constant<int, kWide>{});
  for (; d < D; d += kLanes) step(d, std::integral_constant<int, 1>{});
}

// `scratch`: attention_few_scratch(D) floats.
template <class T>
void fwd_few(const AttentionSizes& sizes, const Head& head, float* scratch, const Rows<T>& q, const Rows<T>& k,
             const Rows<T>& v, const Rows<T>& out, const Tensor& lse) {
  const int64_t D = sizes.D, Dp = round_up(D, kLanes), n = sizes.rows(head);
  const float factor = exponent_factor(sizes.scale);
  float *q_rows = scratch, *sums = q_rows + kFewRows * Dp, *scores = sums + kFewRows * Dp;
  float max_of[kFewRows], sum_of[kFewRows];
  Range seen = {head.S, 0};
  for (int64_t r = 0; r < n; ++r) {
    const T* row = query_row(q, sizes, head, r);
    pack_across<T, float>(&row, D, q_rows + r * Dp);
    std::memset(sums + r * Dp, 0, static_cast<size_t>(Dp) * sizeof(float));
    max_of[r] = -std::numeric_limits<float>::infinity();
    sum_of[r] = 0.0F;
    const Range keys = sizes.mask.keys_of(r / sizes.rep, head.T, head.S);
    seen = {std::min(seen.begin, keys.begin), std::max(seen.end, keys.end)};
  }
  for (int64_t key = seen.begin; key < seen.end; key += kKeys)
    for (int64_t r = 0; r < n; ++r) {
      const Range all = sizes.mask.keys_of(r / sizes.rep, head.T, head.S);
      const Range keys = {std::max(all.begin, key), std::min(all.end, key + kKeys)};
      if (keys.empty()) continue;
      const int64_t count = keys.end - keys.begin;
      const auto row_of = [&](const Rows<T>& x) {
        return [&](int64_t j) -> const T* { return x.row(head.batch, head.k_begin + keys.begin + j, head.group); };
      };
      const auto k_row = row_of(k);
      VecF top(-std::numeric_limits<float>::infinity()), total(0.0F);
      for (int64_t j = 0; j < count; ++j) scores[j] = dot_padded(q_rows + r * Dp, k_row(j), D);
      for (int64_t j = count; j < round_up(count, kLanes); ++j) scores[j] = factor < 0.0F ? HUGE_VALF : -HUGE_VALF;
      for (int64_t j = 0; j < count; j += kLanes) top = max(top, load(scores + j) * VecF(factor));
      const float new_max = std::max(max_of[r], max(top));
      const float finite = std::max(new_max, -std::numeric_limits<float>::max());
      const float alpha = max(exp2_flush(VecF(max_of[r] - finite)));
      for (int64_t j = 0; j < count; j += kLanes) {
        const VecF weight = exp2_flush(fma(load(scores + j), VecF(factor), VecF(-finite)));
        store(scores + j, weight);
        total = total + weight;
      }
      max_of[r] = new_max;
      sum_of[r] = sum_of[r] * alpha + sum(total);
      add_rows<T>(scores, row_of(v), count, D, alpha, sums + r * Dp);
    }
  for (int64_t r = 0; r < n; ++r) {
    *lse_of(lse, sizes, head, r) = lse_from(max_of[r], sum_of[r]);
    const VecF by(sum_of[r] == 0.0F ? 0.0F : 1.0F / sum_of[r]);
    write_row(sums + r * Dp, by, D, query_row(out, sizes, head, r));
  }
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA
