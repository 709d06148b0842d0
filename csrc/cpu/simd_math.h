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
  // n runs from -150 to 128, more than a float's exponent: scale in two steps
  const VecF half = round(n * VecF(0.5F));
  return scale_by_power_of_two(scale_by_power_of_two(p, half), n - half);
}

// 1 / (1 + e^-x)
LF_INLINE VecF sigmoid(VecF x) { return VecF(1.0F) / (VecF(1.0F) + exp(VecF(0.0F) - x)); }

}  // namespace llama_fast::cpu::LF_ISA
