// Rotary position embedding on the CPU: each pair (x0, x1) of a head is turned by its position's angle,
// (x0 cos - x1 sin, x1 cos + x0 sin), in float32, rounded once. A pair is (d, d + D/2), or (2d, 2d + 1) if interleaved.
// The backward turns the other way and overwrites dq and dk. Elementwise, so independent of the threads.
// Derivation: docs/ops/rope.md.
#ifndef LF_ISA

#include "memory.h"
#include "parallel.h"
#include "simd.h"

#define LF_THIS_FILE "rope.cpp"
#include "each_isa.h"

namespace llama_fast::cpu {

void rope_fwd(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved,
              const Tensor& q_out, const Tensor& k_out) {
  use_huge_pages(q_out);
  use_huge_pages(k_out);
  LF_DISPATCH(turn, q, k, cos, sin, interleaved, 1.0F, q_out, k_out);
}

void rope_bwd(const Tensor& dq_out, const Tensor& dk_out, const Tensor& cos, const Tensor& sin, bool interleaved,
              const Tensor& dq, const Tensor& dk) {
  use_huge_pages(dq);
  use_huge_pages(dk);
  LF_DISPATCH(turn, dq_out, dk_out, cos, sin, interleaved, -1.0F, dq, dk);
}

}  // namespace llama_fast::cpu

#else

namespace llama_fast::cpu::LF_ISA {
namespace {

constexpr int64_t kGrainElements = 16384;  // a thread's least share: below it, waking a thread costs more than it saves

// Float32 halves lie too far apart for the processor's own prefetching: 35 -> 46 GB/s a core on a Zen 5 with D = 128;
// of half the size they do not, and prefetching costs as much there.
constexpr int64_t kHeadsAhead = 8, kLine = 16;

template <bool kStream, class T>
void turn_halves(const T* x, const float* cos, const float* sin, VecF sign, T* out, int64_t half) {
  const VecF minus = VecF(0.0F) - sign;
  for_each_vector(0, half, [&](int64_t c, auto n) {
    const VecF x0 = load_lanes(x + c, n), x1 = load_lanes(x + half + c, n);
    write_lanes<kStream>(out + c, fma(x0, load_lanes(cos + c, n), x1 * (load_lanes(sin + c, n) * minus)), n);
  });
  for_each_vector(0, half, [&](int64_t c, auto n) {
    const VecF x0 = load_lanes(x + c, n), x1 = load_lanes(x + half + c, n);
    write_lanes<kStream>(out + half + c, fma(x1, load_lanes(cos + c, n), x0 * (load_lanes(sin + c, n) * sign)), n);
  });
}

template <bool kStream, class T>
void turn_pairs(const T* x, const float* cos, const float* sin, VecF sign, T* out, int64_t half) {
  const int64_t D = 2 * half;
  int64_t c = 0;
  for (; c + VecF::kLanes <= D; c += VecF::kLanes)
    write_lanes<kStream>(out + c, rotate_pairs(load(x + c), load_twice(cos + c / 2), load_twice(sin + c / 2) * sign),
                         AllLanes{});
  if (c < D) {
    float cos_tail[VecF::kLanes / 2] = {}, sin_tail[VecF::kLanes / 2] = {};
    for (int64_t i = 0; c / 2 + i < half; ++i) {
      cos_tail[i] = cos[c / 2 + i];
      sin_tail[i] = sin[c / 2 + i];
    }
    const VecF turned = rotate_pairs(load_n(x + c, D - c), load_twice(cos_tail), load_twice(sin_tail) * sign);
    store_n(out + c, turned, D - c);
  }
}

// All heads of one token.
template <bool kInterleaved, bool kStream, class T>
void turn_heads(const Tensor& x, const Tensor& out, int64_t b, int64_t t, const float* cos, const float* sin,
                float sign) {
  const int64_t half = x.size[3] / 2;
  const T* x_token = x.ptr<T>() + b * x.stride[0] + t * x.stride[1];
  T* out_token = out.ptr<T>() + b * out.stride[0] + t * out.stride[1];
  for (int64_t h = 0; h < x.size[2]; ++h) {
    const T* x_head = x_token + h * x.stride[2];
    T* out_head = out_token + h * out.stride[2];
    if constexpr (!kInterleaved && sizeof(T) == 4)
      for (int64_t c = 0; c < 2 * half; c += kLine) __builtin_prefetch(x_head + kHeadsAhead * 2 * half + c);
    if constexpr (kInterleaved)
      turn_pairs<kStream>(x_head, cos, sin, VecF(sign), out_head, half);
    else
      turn_halves<kStream>(x_head, cos, sin, VecF(sign), out_head, half);
  }
}

// Whether every vector that is written to `out` stands on a boundary.
template <class T>
bool heads_on_boundaries(const Tensor& out) {
  const bool strides =
      out.stride[0] % VecF::kLanes == 0 && out.stride[1] % VecF::kLanes == 0 && out.stride[2] % VecF::kLanes == 0;
  return out.data == nullptr ||
         (strides && (out.size[3] / 2) % VecF::kLanes == 0 && lanes_before_boundary(out.ptr<T>()) == 0);
}

void turn(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved, float sign,
          const Tensor& q_out, const Tensor& k_out) {
  const int64_t B = q.size[0], T_ = q.size[1], D = q.size[3];
  const int64_t heads = q.size[2] + (k.data == nullptr ? 0 : k.size[2]);
  with_dtype(q.dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool past_caches = should_stream(B * T_ * heads * D * static_cast<int64_t>(sizeof(T))) &&
                             heads_on_boundaries<T>(q_out) && heads_on_boundaries<T>(k_out);
    with_bool(interleaved, [&](auto kInterleaved) {
      with_bool(past_caches, [&](auto kStream) {
        parallel_for(B * T_, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(heads * D, 1)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t i = begin; i < end; ++i) {
                         const int64_t b = i / T_, t = i % T_, angles_b = cos.size[0] == 1 ? 0 : b;
                         const float* cos_t = cos.ptr<float>() + angles_b * cos.stride[0] + t * cos.stride[1];
                         const float* sin_t = sin.ptr<float>() + angles_b * sin.stride[0] + t * sin.stride[1];
                         turn_heads<kInterleaved, kStream, T>(q, q_out, b, t, cos_t, sin_t, sign);
                         if (k.data != nullptr)
                           turn_heads<kInterleaved, kStream, T>(k, k_out, b, t, cos_t, sin_t, sign);
                       }
                       stream_fence();
                     });
      });
    });
  });
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA

#endif
