// Turns each pair of q and k by its token's angle: halves (Hugging Face's, pair c is columns c and c + D/2) or
// neighbours (Meta's, columns 2c and 2c + 1). float32, rounded once. A block does one token, the heads of q and k in
// one row: a thread keeps the angles of its unit of columns and turns it in several heads, all in flight at once. An
// output may be the same memory as its input. Derivation: docs/ops/rope.md.
#include <algorithm>

#include "reduce.cuh"
#include "stream.cuh"
#include "vec.cuh"

namespace llama_fast::cuda {
namespace {

constexpr int kThreads = 256;  // at most

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
  uint32_t tokens;           // T
  int half;                  // D/2
  float sign;                // -1 turns back
  int units, heads_at_once;  // side by side in a block
};

// What a thread has of a head: two pieces of kWidth, one of each half, or one piece of neighbours (two single
// elements).
template <int kWidth, bool kInterleaved>
struct Unit {
  static constexpr int kPieces = kInterleaved && kWidth > 1 ? 1 : 2, kPairs = kPieces * kWidth / 2;
  static constexpr int kHeads = 4 / kPieces;  // that a thread has in flight: 64 bytes

  // Where pair i of a unit stands: its first or second element, of all of the unit's.
  LLAMA_FAST_DEVICE static constexpr int element(int i, int second) {
    return kInterleaved ? 2 * i + second : i + second * kWidth;
  }
};

template <int kPairs, bool kVector>
LLAMA_FAST_DEVICE void load_angles(Global<const float> p, float (&values)[kPairs]) {
#pragma unroll
  for (int i = 0; i < kPairs; i += 4) {
    if constexpr (kVector && kPairs % 4 == 0) {
      const uint4 four = ptx::ld_global_nc_v4(p + i);
      values[i] = bit_cast<float>(four.x);
      values[i + 1] = bit_cast<float>(four.y);
      values[i + 2] = bit_cast<float>(four.z);
      values[i + 3] = bit_cast<float>(four.w);
    } else {
#pragma unroll
      for (int j = i; j < i + 4 && j < kPairs; ++j) values[j] = p[j];
    }
  }
}

// Every unit is whole: kWidth > 1 where it divides the row, or the half, and the angles' rows are on 16 bytes.
template <class T, int kWidth, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, 4) rope_kernel(Rope<T> p) {
  using U = Unit<kWidth, kInterleaved>;
  const int64_t b = blockIdx.x / p.tokens, t = blockIdx.x % p.tokens;
  const int at_once = p.units < kThreads ? p.units : kThreads, first_head = threadIdx.x / at_once;
  const int heads = p.q.heads + p.k.heads;
  if (first_head >= p.heads_at_once) return;
  for (int unit = threadIdx.x % at_once; unit < p.units; unit += at_once) {
    const int pair = unit * U::kPairs, column = kInterleaved ? 2 * pair : pair;
    const int64_t next_piece = kInterleaved ? kWidth : p.half;
    const Global<const T> q_in = p.q.in + (b * p.q.in_b + t * p.q.in_t + column);
    const Global<const T> k_in = p.k.in + (b * p.k.in_b + t * p.k.in_t + column);
    const Global<T> q_out = p.q.out + (b * p.q.out_b + t * p.q.out_t + column);
    const Global<T> k_out = p.k.out + (b * p.k.out_b + t * p.k.out_t + column);
    float cos[U::kPairs], sin[U::kPairs];
    load_angles<U::kPairs, (kWidth > 1)>(p.cos + (b * p.cos_b + t * p.cos_t + pair), cos);
    load_angles<U::kPairs, (kWidth > 1)>(p.sin + (b * p.sin_b + t * p.sin_t + pair), sin);
#pragma unroll
    for (int i = 0; i < U::kPairs; ++i) sin[i] *= p.sign;
    for (int base = first_head; base < heads; base += U::kHeads * p.heads_at_once) {
      Piece<T, kWidth> pieces[U::kHeads][U::kPieces];
#pragma unroll
      for (int j = 0; j < U::kHeads; ++j) {
        const int h = base + j * p.heads_at_once, k_head = h - p.q.heads;
        const Global<const T> in = k_head < 0 ? q_in + h * p.q.in_h : k_in + k_head * p.k.in_h;
#pragma unroll
        for (int i = 0; i < U::kPieces; ++i) pieces[j][i].load_written(in + i * next_piece, h < heads ? kWidth : 0);
      }
#pragma unroll
      for (int j = 0; j < U::kHeads; ++j) {
        const int h = base + j * p.heads_at_once, k_head = h - p.q.heads;
        const Global<T> out = k_head < 0 ? q_out + h * p.q.out_h : k_out + k_head * p.k.out_h;
        float values[U::kPieces][kWidth];
#pragma unroll
        for (int i = 0; i < U::kPieces; ++i) pieces[j][i].unpack(values[i]);
#pragma unroll
        for (int i = 0; i < U::kPairs; ++i) {
          float& one = values[U::element(i, 0) / kWidth][U::element(i, 0) % kWidth];
          float& other = values[U::element(i, 1) / kWidth][U::element(i, 1) % kWidth];
          const float first = one, second = other;
          one = first * cos[i] - second * sin[i];
          other = first * sin[i] + second * cos[i];
        }
#pragma unroll
        for (int i = 0; i < U::kPieces; ++i) {
          pieces[j][i].pack(values[i]);
          pieces[j][i].store(out + i * next_piece, h < heads ? kWidth : 0);
        }
      }
    }
  }
}

void rope(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved,
          float sign, const Tensor& q_out, const Tensor& k_out, Stream s) {
  const OnDevice device(op, s);
  const int64_t B = q.size[0], tokens = q.size[1], D = q.size[3];
  const int64_t heads = q.size[2] + k.size[2];
  if (B * tokens == 0 || D == 0 || heads == 0) return;
  with_dtype(q.dtype, [&](auto tag) {
    using T = decltype(tag);
    bool aligned = (interleaved ? D : D / 2) % kLanes<T> == 0;  // halves: the second one as well
    for (const Tensor* x : {&q, &k, &q_out, &k_out, &cos, &sin}) aligned = aligned && rows_aligned(*x);
    Rope<T> p{Heads<T>(q, q_out),
              Heads<T>(k, k_out),
              cos.ptr<float>(),
              sin.ptr<float>(),
              cos.size[0] == 1 ? 0 : cos.stride[0],
              cos.stride[1],
              sin.size[0] == 1 ? 0 : sin.stride[0],
              sin.stride[1],
              static_cast<uint32_t>(tokens),
              static_cast<int>(D / 2),
              sign,
              0,
              0};
    with_bool(interleaved, [&](auto kInterleaved) {
      with_bool(aligned, [&](auto kAligned) {
        using U = Unit<kAligned ? kLanes<T> : 1, kInterleaved>;
        p.units = p.half / U::kPairs;
        const int64_t at_once = std::min(p.units, kThreads), most = U::kHeads * (kThreads / at_once);
        p.heads_at_once = static_cast<int>(ceil_div(heads, U::kHeads * ceil_div(heads, most)));
        const int64_t threads = ceil_div(at_once * p.heads_at_once, kWarp) * kWarp;
        launch(launch_of(op, s, grid(B * tokens), threads), rope_kernel < T, kAligned ? kLanes<T> : 1, kInterleaved >,
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
