// Loops over the columns of contiguous rows, alike for every instruction set. No include guard: see simd.h.
//
// A kernel's row function takes its columns from for_each_vector and reads and writes with load_lanes and write_lanes.
// With kStream the stores go past the caches: for outputs larger than these, a store through them would first read the
// line that it overwrites, and push out what the next op reads. Streaming stores must be aligned, so the loop starts
// with the lanes before the first boundary, and the thread ends with stream_fence().

namespace llama_fast::cpu::LF_ISA {

using AllLanes = std::integral_constant<int64_t, VecF::kLanes>;

template <class T>
LF_INLINE VecF load_lanes(const T* p, AllLanes) {
  return load(p);
}
template <class T>
LF_INLINE VecF load_lanes(const T* p, int64_t n) {
  return load_n(p, n);
}

template <bool kStream, class T>
LF_INLINE void write_lanes(T* p, VecF a, AllLanes) {
  if constexpr (kStream)
    stream(p, a);
  else
    store(p, a);
}
template <bool kStream, class T>
LF_INLINE void write_lanes(T* p, VecF a, int64_t n) {
  store_n(p, a, n);
}

// Calls f(c, n) for the columns c to c + n, n at most kLanes, and AllLanes where it is known to be all of them; `head`
// columns come first on their own.
template <class F>
LF_INLINE void for_each_vector(int64_t head, int64_t C, const F& f) {
  int64_t c = head < C ? head : C;
  if (c > 0) f(int64_t{0}, c);
  for (; c + VecF::kLanes <= C; c += VecF::kLanes) f(c, AllLanes{});
  if (c < C) f(c, C - c);
}

// The sum over a row's lanes of f(c, n, total) - total. Four sums at a time hide the latency of an addition; those of
// kRun vectors are added up before they grow large beside a term, which keeps long rows as exact as short ones.
template <class F>
LF_INLINE float sum_over_row(int64_t C, const F& f) {
  constexpr int64_t kRun = 64 * VecF::kLanes;
  VecF all(0.0F);
  int64_t c = 0;
  while (c + 4 * VecF::kLanes <= C) {
    VecF total[4] = {VecF(0.0F), VecF(0.0F), VecF(0.0F), VecF(0.0F)};
    for (const int64_t stop = C - c < kRun ? C : c + kRun; c + 4 * VecF::kLanes <= stop; c += 4 * VecF::kLanes)
      for (int i = 0; i < 4; ++i) total[i] = f(c + i * VecF::kLanes, AllLanes{}, total[i]);
    all = all + ((total[0] + total[1]) + (total[2] + total[3]));
  }
  for (; c + VecF::kLanes <= C; c += VecF::kLanes) all = f(c, AllLanes{}, all);
  if (c < C) all = f(c, C - c, all);
  return sum(all);
}

// Columns of the row at p before the first one where a vector may be streamed.
template <class T>
LF_INLINE int64_t lanes_before_boundary(const T* p) {
  constexpr uintptr_t kBytes = VecF::kLanes * sizeof(T);
  return static_cast<int64_t>((kBytes - reinterpret_cast<uintptr_t>(p) % kBytes) % kBytes / sizeof(T));
}
template <class T>
LF_INLINE bool same_boundaries(const T* p, const T* q) {
  return (reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(q)) % (VecF::kLanes * sizeof(T)) == 0;
}

}  // namespace llama_fast::cpu::LF_ISA
