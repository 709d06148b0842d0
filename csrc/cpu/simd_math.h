// What is built on VecF alike for every instruction set. No include guard: see simd.h.

namespace llama_fast::cpu::LF_ISA {

// e^x within 1 ulp of float32 where the result is normal; 0 below x = -103.98, +inf above 88.73, NaN for NaN.
// Argument reduction x = n ln2 + r, |r| <= ln2 / 2, with ln2 in two parts (Cody and Waite 1980), and a polynomial of
// degree 6 in r with the coefficients of Cephes' expf.
LF_INLINE VecF exp(VecF x) {
  x = max(VecF(-104.0F), x);  // the order of the operands keeps a NaN
  x = min(VecF(89.0F), x);
  const VecF n = round(x * VecF(1.44269504088896341F));
  VecF r = fma(n, VecF(-0.693359375F), x);
  r = fma(n, VecF(2.12194440e-4F), r);
  VecF p = fma(VecF(1.9875691500e-4F), r, VecF(1.3981999507e-3F));
  p = fma(p, r, VecF(8.3334519073e-3F));
  p = fma(p, r, VecF(4.1665795894e-2F));
  p = fma(p, r, VecF(1.6666665459e-1F));
  p = fma(p, r, VecF(5.0000001201e-1F));
  p = fma(p, r * r, r + VecF(1.0F));
  if constexpr (kScalesByAnyPower) return scale_by_power_of_two(p, n);
  // n runs from -150 to 128, more than a float's exponent: scale in two steps
  const VecF half = round(n * VecF(0.5F));
  return scale_by_power_of_two(scale_by_power_of_two(p, half), n - half);
}

// e^x within 2^-16 of its value, for results that are rounded to half precision: two thirds of the instructions of exp.
// 2^(n + f), |f| <= 1/2, with a polynomial of degree 4 fitted for the least relative error, 2.6e-6.
LF_INLINE VecF exp_for_half(VecF x) {
  VecF y = x * VecF(1.44269504088896341F);
  y = max(VecF(-150.0F), y);  // the order of the operands keeps a NaN
  y = min(VecF(129.0F), y);
  const VecF n = round(y), f = y - n;
  VecF p = fma(VecF(9.570079855620861e-3F), f, VecF(5.591783672571182e-2F));
  p = fma(p, f, VecF(2.40247443318367e-1F));
  p = fma(p, f, VecF(6.931217908859253e-1F));
  p = fma(p, f, VecF(9.999992847442627e-1F));
  if constexpr (kScalesByAnyPower) return scale_by_power_of_two(p, n);
  const VecF half = round(n * VecF(0.5F));
  return scale_by_power_of_two(scale_by_power_of_two(p, half), n - half);
}

// 1 / (1 + e^-x), as exact as a result of type T shows.
template <class T>
LF_INLINE VecF sigmoid(VecF x) {
  const VecF minus_x = VecF(0.0F) - x;
  if constexpr (std::is_same_v<T, float>)
    return VecF(1.0F) / (VecF(1.0F) + exp(minus_x));
  else
    return VecF(1.0F) / (VecF(1.0F) + exp_for_half(minus_x));
}

}  // namespace llama_fast::cpu::LF_ISA
