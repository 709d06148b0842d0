// Turns each pair of q and k by its token's angle: halves (Hugging Face's, pair c is columns c and c + D/2) or
// neighbours (Meta's, columns 2c and 2c + 1). float32, rounded once. A block does one token: its threads keep their
// angles in registers and walk over the heads. An output may be the same memory as its input. Derivation:
// docs/ops/rope.md.
#include <algorithm>

#include "stream.cuh"
#include "vec.cuh"

namespace llama_fast::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
struct Heads {  // [B, T, heads, D]
  Global<const T> in;
  Global<T> out;
  int64_t in_b, in_t, in_h, out_b, out_t, out_h;
  int heads;

  Heads(const Tensor& x, const Tensor& y)
      : in(x.ptr<T>()),
        out(y.ptr<T>()),
        in_b(x.stride[0]),
        in_t(x.stride[1]),
        in_h(x.stride[2]),
        out_b(y.stride[0]),
        out_t(y.stride[1]),
        out_h(y.stride[2]),
        heads(static_cast<int>(x.size[2])) {}
};

template <class T>
struct Rope {
  Heads<T> q, k;
  Global<const float> cos, sin;
  int64_t cos_b, cos_t, sin_b, sin_t;
  int64_t tokens;  // T
  int half;        // D/2
  float sign;      // -1 turns back
};

// Halves: a unit of work is kWidth pairs of a head, a piece of each half.
template <class T, int kWidth>
LLAMA_FAST_DEVICE void turn_halves(const Heads<T>& x, int64_t b, int64_t t, int first_head, int head_step, int pair,
                                   int half, const float (&cos)[kWidth], const float (&sin)[kWidth]) {
  for (int h = first_head; h < x.heads; h += head_step) {
    const Global<const T> in = x.in + (b * x.in_b + t * x.in_t + h * x.in_h + pair);
    const Global<T> out = x.out + (b * x.out_b + t * x.out_t + h * x.out_h + pair);
    Piece<T, kWidth> piece[2];
    float u[kWidth], v[kWidth];
    piece[0].load_written(in, half - pair);
    piece[1].load_written(in + half, half - pair);
    piece[0].unpack(u);
    piece[1].unpack(v);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float one = u[i], other = v[i];
      u[i] = one * cos[i] - other * sin[i];
      v[i] = one * sin[i] + other * cos[i];
    }
    piece[0].pack(u);
    piece[1].pack(v);
    piece[0].store(out, half - pair);
    piece[1].store(out + half, half - pair);
  }
}

// Neighbours: a unit is the kPairs pairs of a piece, or of two single elements; two heads are in flight.
template <class T, int kWidth, int kPairs>
LLAMA_FAST_DEVICE void turn_neighbours(const Heads<T>& x, int64_t b, int64_t t, int first_head, int head_step, int pair,
                                       int half, const float (&cos)[kPairs], const float (&sin)[kPairs]) {
  constexpr int kHeads = 2, kPieces = 2 * kPairs / kWidth;
  for (int h = first_head; h < x.heads; h += kHeads * head_step) {
    Piece<T, kWidth> pieces[kHeads][kPieces];
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const int64_t head = h + j * head_step, n = head < x.heads ? 2 * (half - pair) : 0;
      const Global<const T> in = x.in + (b * x.in_b + t * x.in_t + head * x.in_h + 2 * pair);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) pieces[j][i].load_written(in + i * kWidth, n - i * kWidth);
    }
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const int64_t head = h + j * head_step, n = head < x.heads ? 2 * (half - pair) : 0;
      const Global<T> out = x.out + (b * x.out_b + t * x.out_t + head * x.out_h + 2 * pair);
      float u[kPieces][kWidth];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) pieces[j][i].unpack(u[i]);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        float &one = u[2 * i / kWidth][2 * i % kWidth], &other = u[(2 * i + 1) / kWidth][(2 * i + 1) % kWidth];
        const float first = one, second = other;
        one = first * cos[i] - second * sin[i];
        other = first * sin[i] + second * cos[i];
      }
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        pieces[j][i].pack(u[i]);
        pieces[j][i].store(out + i * kWidth, n - i * kWidth);
      }
    }
  }
}

template <class T, int kWidth, bool kInterleaved>
__global__ void __launch_bounds__(kThreads) rope_kernel(Rope<T> p) {
  const int64_t b = blockIdx.x / p.tokens, t = blockIdx.x % p.tokens;
  const Global<const float> cos_row = p.cos + (b * p.cos_b + t * p.cos_t);
  const Global<const float> sin_row = p.sin + (b * p.sin_b + t * p.sin_t);
  constexpr int kPairs = kInterleaved && kWidth > 1 ? kWidth / 2 : kWidth;  // of a unit
  const int units = (p.half + kPairs - 1) / kPairs;
  const int at_once = units < kThreads ? units : kThreads;  // units of one head side by side
  const int head = threadIdx.x / at_once, head_step = kThreads / at_once;
  if (head >= head_step) return;
  for (int unit = threadIdx.x % at_once; unit < units; unit += at_once) {
    const int pair = unit * kPairs;
    float cos[kPairs], sin[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const bool there = pair + i < p.half;
      cos[i] = there ? cos_row[pair + i] : 0.0F;
      sin[i] = there ? p.sign * sin_row[pair + i] : 0.0F;
    }
    if constexpr (kInterleaved) {
      turn_neighbours<T, kWidth>(p.q, b, t, head, head_step, pair, p.half, cos, sin);
      turn_neighbours<T, kWidth>(p.k, b, t, head, head_step, pair, p.half, cos, sin);
    } else {
      turn_halves<T, kWidth>(p.q, b, t, head, head_step, pair, p.half, cos, sin);
      turn_halves<T, kWidth>(p.k, b, t, head, head_step, pair, p.half, cos, sin);
    }
  }
}

void rope(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved,
          float sign, const Tensor& q_out, const Tensor& k_out, Stream s) {
  const OnDevice device(op, s);
  const int64_t B = q.size[0], tokens = q.size[1], D = q.size[3];
  if (B * tokens == 0 || D == 0) return;
  with_dtype(q.dtype, [&](auto tag) {
    using T = decltype(tag);
    bool aligned = (interleaved ? D : D / 2) % kLanes<T> == 0;  // halves: the second one as well
    for (const Tensor* x : {&q, &k, &q_out, &k_out}) aligned = aligned && rows_aligned(*x);
    const Rope<T> p{Heads<T>(q, q_out),
                    Heads<T>(k, k_out),
                    cos.ptr<float>(),
                    sin.ptr<float>(),
                    cos.size[0] == 1 ? 0 : cos.stride[0],
                    cos.stride[1],
                    sin.size[0] == 1 ? 0 : sin.stride[0],
                    sin.stride[1],
                    tokens,
                    static_cast<int>(D / 2),
                    sign};
    with_bool(interleaved, [&](auto kInterleaved) {
      with_bool(aligned, [&](auto kAligned) {
        launch(launch_of(op, s, grid(B * tokens), kThreads), rope_kernel < T, kAligned ? kLanes<T> : 1, kInterleaved >,
               p);
      });
    });
  });
}

}  // namespace

void rope_fwd(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved,
              const Tensor& q_out, const Tensor& k_out, Stream s) {
  rope("rope_fwd", q, k, cos, sin, interleaved, 1.0F, q_out, k_out, s);
}

void rope_bwd(const Tensor& dq_out, const Tensor& dk_out, const Tensor& cos, const Tensor& sin, bool interleaved,
              const Tensor& dq, const Tensor& dk, Stream s) {
  rope("rope_bwd", dq_out, dk_out, cos, sin, interleaved, -1.0F, dq, dk, s);
}

}  // namespace llama_fast::cuda
