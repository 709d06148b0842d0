// Run-time value to compile-time type, once, without macros.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "ops.h"

namespace llama_fast {

// Storage types of the two half-precision formats; arithmetic on them happens in float32 vectors (cpu/simd.h).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Calls f(T{}) with T = float, bf16 or f16.
template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      throw std::invalid_argument("dtype: expected float32, bfloat16 or float16");
  }
}

// Calls f(bool_constant<value>).
template <class F>
void with_bool(bool value, F&& f) {
  if (value)
    f(std::true_type{});
  else
    f(std::false_type{});
}

}  // namespace llama_fast
