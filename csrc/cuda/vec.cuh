// 16-byte pieces of a row, and their values as float32.
//
// A row is cut into pieces of kWidth elements: 16 bytes where every row starts on a 16-byte boundary, else one element.
// The last piece may be shorter; lanes past its end read as 0 and are not written.
#pragma once

#include "ops.h"
#include "ptx.cuh"

namespace llama_fast::cuda {

// Elements of 16 bytes.
template <class T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

LLAMA_FAST_DEVICE float to_float(float x) { return x; }
LLAMA_FAST_DEVICE float to_float(bf16 x) { return ptx::cvt_f32(x); }
LLAMA_FAST_DEVICE float to_float(f16 x) { return ptx::cvt_f32(x); }

template <class T>
LLAMA_FAST_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return ptx::cvt_rn<T>(x);
}

// A piece as it lies in memory: in half precision half the registers of its values.
template <class T, int kWidth>
struct Piece {
  static_assert(kWidth == 1 || kWidth == kLanes<T>, "one element or 16 bytes");
  static constexpr int kPerWord = kWidth == 1 ? 1 : 4 / static_cast<int>(sizeof(T));
  uint32_t words[kWidth / kPerWord];

  LLAMA_FAST_DEVICE void set(const uint4& x) {
    words[0] = x.x;
    words[1] = x.y;
    words[2] = x.z;
    words[3] = x.w;
  }

  LLAMA_FAST_DEVICE void unpack(float (&values)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = to_float(element(i));
  }

  LLAMA_FAST_DEVICE void pack(const float (&values)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; i += kPerWord) {
      if constexpr (kPerWord == 2)
        words[i / 2] = ptx::cvt_rn_x2<T>(values[i + 1], values[i]);
      else if constexpr (sizeof(T) == 4)
        words[i] = bit_cast<uint32_t>(values[i]);
      else
        words[i] = from_float<T>(values[i]).bits;
    }
  }

  // n: elements that are there, any number: kWidth and more is a whole piece, below 1 is none. The memory is not
  // written by the kernel.
  LLAMA_FAST_DEVICE void load(Global<const T> p, int64_t n) {
    if constexpr (kWidth > 1) {
      if (n >= kWidth) {
        set(ptx::ld_global_nc_v4(p));
        return;
      }
    }
    load_elements(p, n);
  }

  // The same for memory that this thread has written or will write.
  LLAMA_FAST_DEVICE void load_written(Global<const T> p, int64_t n) {
    if constexpr (kWidth > 1) {
      if (n >= kWidth) {
        set(ptx::ld_global_v4(p));
        return;
      }
    }
    load_elements(p, n);
  }

  LLAMA_FAST_DEVICE void store(Global<T> p, int64_t n) const {
    if constexpr (kWidth > 1) {
      if (n >= kWidth) {
        ptx::st_global_v4(p, make_uint4(words[0], words[1], words[2], words[3]));
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (i < n) p[i] = element(i);
  }

 private:
  LLAMA_FAST_DEVICE T element(int i) const {
    if constexpr (sizeof(T) == 4)
      return bit_cast<T>(words[i]);
    else
      return T{static_cast<uint16_t>(words[i / kPerWord] >> (16 * (i % kPerWord)))};
  }

  LLAMA_FAST_DEVICE void load_elements(Global<const T> p, int64_t n) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      uint32_t bits = 0;
      if (i < n) {
        const T x = p[i];
        if constexpr (sizeof(T) == 4)
          bits = bit_cast<uint32_t>(x);
        else
          bits = x.bits;
      }
      if (i % kPerWord == 0)
        words[i / kPerWord] = bits;
      else
        words[i / kPerWord] |= bits << 16;
    }
  }
};

// Rows of a [R, C] tensor; an absent tensor's are never asked for.
template <class T>
struct Rows {
  Global<T> data;
  int64_t stride;
  explicit Rows(const Tensor& x) : data(x.ptr<T>()), stride(x.ndim > 1 ? x.stride[0] : 0) {}
  LLAMA_FAST_DEVICE Global<T> row(int64_t r) const { return data + r * stride; }
};

// Whether every row of a tensor starts on a 16-byte boundary (an absent tensor's do).
inline bool rows_aligned(const Tensor& x) {
  const int64_t bytes = x.dtype == DType::f32 ? 4 : 2;
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int i = 0; i + 1 < x.ndim; ++i) aligned = aligned && (x.size[i] <= 1 || x.stride[i] * bytes % 16 == 0);
  return aligned;
}

}  // namespace llama_fast::cuda
