// y = x^T of two-byte elements, for the vendor's products, which are slow where a first operand lies the other way
// round (docs/ops/linear.md). A tile is transposed in the first cache and then written to y by whole cache lines.
#ifndef LF_ISA

#include "parallel.h"
#include "simd.h"

#define LF_THIS_FILE "transpose.cpp"
#include "each_isa.h"

namespace llama_fast::cpu {

void transpose(const Tensor& x, const Tensor& y) { LF_DISPATCH(transpose, x, y); }

}  // namespace llama_fast::cpu

#else

namespace llama_fast::cpu::LF_ISA {
namespace {

constexpr int64_t kTile = 64;  // rows and columns: a row of y's is two cache lines
constexpr int64_t kGrain = 8;  // tiles, a thread's least share
// Bytes of y from which it is written past the caches: a line that is written there need not be read first.
constexpr int64_t kStreamed = 1 << 20;

typedef uint16_t Eight __attribute__((vector_size(16)));

// to[c * kTile + r] = from[r * stride + c] for eight rows and columns.
LF_INLINE void transpose_block(const uint16_t* from, int64_t stride, uint16_t* to) {
  Eight a[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&a[i], from + i * stride, 16);
  transpose_8x8(a);
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * kTile, &a[i], 16);
}

void write_row(const uint16_t* from, uint16_t* to, int64_t n, bool streamed) {
  constexpr int64_t kStep = 2 * VecF::kLanes;  // a vector's bits, whatever they mean
  // the portable VecF reads floats, as which these numbers may not be read
  if (VecF::kLanes > 4 && streamed && n == kTile && reinterpret_cast<uintptr_t>(to) % 64 == 0)
    for (int64_t i = 0; i < n; i += kStep)
      stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  else
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(uint16_t));
}

// y = x^T for x [R, C], R and C at most kTile.
void transpose_tile(const uint16_t* x, int64_t x_stride, uint16_t* y, int64_t y_stride, int64_t R, int64_t C,
                    bool streamed) {
  alignas(64) uint16_t tile[kTile * kTile];
  const int64_t whole_R = R / 8 * 8, whole_C = C / 8 * 8;
  for (int64_t r = 0; r < whole_R; r += 8)
    for (int64_t c = 0; c < whole_C; c += 8) transpose_block(x + r * x_stride + c, x_stride, tile + c * kTile + r);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t c = r < whole_R ? whole_C : 0; c < C; ++c) tile[c * kTile + r] = x[r * x_stride + c];
  for (int64_t c = 0; c < C; ++c) write_row(tile + c * kTile, y + c * y_stride, R, streamed);
}

// Tiles in the order of y's rows.
void transpose(const Tensor& x, const Tensor& y) {
  const int64_t R = x.size[0], C = x.size[1], down = (R + kTile - 1) / kTile, across = (C + kTile - 1) / kTile;
  const bool streamed = 2 * R * C >= kStreamed;
  parallel_for(down * across, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i % down * kTile, c = i / down * kTile;
      transpose_tile(x.ptr<uint16_t>() + r * x.stride[0] + c, x.stride[0], y.ptr<uint16_t>() + c * y.stride[0] + r,
                     y.stride[0], std::min(kTile, R - r), std::min(kTile, C - c), streamed);
    }
    stream_fence();
  });
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA

#endif
