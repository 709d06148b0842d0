// y = silu(gate) up, and its gradients with respect to both, elementwise: read once, computed in float32, rounded once.
// An output may be the same memory as an input of the same shape and strides.
// Derivation: docs/ops/swiglu.md.
#include "stream.cuh"
#include "vec.cuh"

namespace llama_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPieces = 2;  // of each tensor that a thread has in flight: 64 bytes forward, 96 backward

template <class T>
struct Swiglu {
  Rows<const T> dy, gate, up;
  Rows<T> y, dgate, dup;
  int64_t F, blocks_per_row;
};

// Where a thread's pieces stand: `row`, first column, and the distance of the next.
template <int kWidth>
struct Place {
  int64_t row, column;
  static constexpr int64_t kStep = kThreads * kWidth;

  template <class T>
  LLAMA_FAST_DEVICE explicit Place(const Swiglu<T>& p)
      : row(blockIdx.x / p.blocks_per_row),
        column((blockIdx.x % p.blocks_per_row) * kPieces * kStep + static_cast<int64_t>(threadIdx.x) * kWidth) {}
};

LLAMA_FAST_DEVICE float sigmoid(float x) { return 1.0F / (1.0F + expf(-x)); }

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) swiglu_fwd_kernel(Swiglu<T> p) {
  const Place<kWidth> at(p);
  Piece<T, kWidth> gate[kPieces], up[kPieces];
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int64_t c = at.column + j * at.kStep;
    gate[j].load_written(p.gate.row(at.row) + c, p.F - c);
    up[j].load_written(p.up.row(at.row) + c, p.F - c);
  }
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int64_t c = at.column + j * at.kStep;
    float g[kWidth], u[kWidth];
    gate[j].unpack(g);
    up[j].unpack(u);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) u[i] *= g[i] / (1.0F + expf(-g[i]));
    up[j].pack(u);
    up[j].store(p.y.row(at.row) + c, p.F - c);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) swiglu_bwd_kernel(Swiglu<T> p) {
  const Place<kWidth> at(p);
  Piece<T, kWidth> dy[kPieces], gate[kPieces], up[kPieces];
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int64_t c = at.column + j * at.kStep;
    dy[j].load_written(p.dy.row(at.row) + c, p.F - c);
    gate[j].load_written(p.gate.row(at.row) + c, p.F - c);
    up[j].load_written(p.up.row(at.row) + c, p.F - c);
  }
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int64_t c = at.column + j * at.kStep;
    float d[kWidth], g[kWidth], u[kWidth];
    dy[j].unpack(d);
    gate[j].unpack(g);
    up[j].unpack(u);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float s = sigmoid(g[i]), dgate = d[i] * u[i] * s * (1.0F + g[i] * (1.0F - s));
      u[i] = d[i] * (g[i] * s);
      g[i] = dgate;
    }
    gate[j].pack(g);
    gate[j].store(p.dgate.row(at.row) + c, p.F - c);
    up[j].pack(u);
    up[j].store(p.dup.row(at.row) + c, p.F - c);
  }
}

void swiglu(const char* op, const Tensor& dy, const Tensor& gate, const Tensor& up, const Tensor& y,
            const Tensor& dgate, const Tensor& dup, Stream s) {
  const OnDevice device(op, s);
  int64_t R = gate.size[0], F = gate.size[1];
  if (R == 0 || F == 0) return;
  bool joined = true, aligned_rows = true, aligned_starts = true;
  for (const Tensor* x : {&dy, &gate, &up, &y, &dgate, &dup}) {
    joined = joined && (x->data == nullptr || R == 1 || x->stride[0] == F);
    aligned_rows = aligned_rows && rows_aligned(*x);
    aligned_starts = aligned_starts && reinterpret_cast<uintptr_t>(x->data) % 16 == 0;
  }
  if (joined) {  // rows that follow each other in every tensor: one long row, in which no piece is cut short
    F *= R;
    R = 1;
  }
  const bool aligned = joined ? aligned_starts : aligned_rows;
  with_dtype(gate.dtype, [&](auto tag) {
    using T = decltype(tag);
    with_bool(aligned, [&](auto kAligned) {
      constexpr int kWidth = kAligned ? kLanes<T> : 1;
      Swiglu<T> p{Rows<const T>(dy),
                  Rows<const T>(gate),
                  Rows<const T>(up),
                  Rows<T>(y),
                  Rows<T>(dgate),
                  Rows<T>(dup),
                  F,
                  ceil_div(F, kPieces * kThreads * kWidth)};
      const Launch how = launch_of(op, s, grid(R * p.blocks_per_row), kThreads);
      if (dy.data == nullptr)
        launch(how, swiglu_fwd_kernel<T, kWidth>, p);
      else
        launch(how, swiglu_bwd_kernel<T, kWidth>, p);
    });
  });
}

}  // namespace

void swiglu_fwd(const Tensor& gate, const Tensor& up, const Tensor& y, Stream s) {
  swiglu("swiglu_fwd", Tensor{}, gate, up, y, Tensor{}, Tensor{}, s);
}

void swiglu_bwd(const Tensor& dy, const Tensor& gate, const Tensor& up, const Tensor& dgate, const Tensor& dup,
                Stream s) {
  swiglu("swiglu_bwd", dy, gate, up, Tensor{}, dgate, dup, s);
}

}  // namespace llama_fast::cuda
