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

// The sum over a row's lanes of f(c, n, total) - total, in four sums at a time to hide the latency of an addition.
template <class F>
LF_INLINE float sum_over_row(int64_t C, const F& f) {
  VecF total[4] = {VecF(0.0F), VecF(0.0F), VecF(0.0F), VecF(0.0F)};
  int64_t c = 0;
  for (; c + 4 * VecF::kLanes <= C; c += 4 * VecF::kLanes)
    for (int i = 0; i < 4; ++i) total[i] = f(c + i * VecF::kLanes, AllLanes{}, total[i]);
  for (; c + VecF::kLanes <= C; c += VecF::kLanes) total[0] = f(c, AllLanes{}, total[0]);
  if (c < C) total[1] = f(c, C - c, total[1]);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
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
