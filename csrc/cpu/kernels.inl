// The kernels, written once over a Simd type. Included by one translation unit per instruction set, inside its namespace.
// See kernels.h for the contracts and the order of reduction.

constexpr int kW = Simd::kWidth;
using V = Simd::V;

// Not std::min and std::max: an inline function shared between translation units could be kept in the copy that was
// compiled for the newest instruction set.
template <class A>
constexpr A lesser(A a, A b) {
  return b < a ? b : a;
}
template <class A>
inline A greater(A a, A b) {
  return a < b ? b : a;
}
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// e^x in single precision, error below 2 ulp on [-87, 87], clamped outside (Cephes expf).
inline V exp_ps(V x) {
  // The limits come first: max and min return a NaN only if it is their second operand.
  x = Simd::min(Simd::set1(87.0f), Simd::max(Simd::set1(-87.0f), x));
  V n = Simd::round(Simd::mul(x, Simd::set1(1.44269504f)));
  V r = Simd::fma(n, Simd::set1(-0.693359375f), x);
  r = Simd::fma(n, Simd::set1(2.12194440e-4f), r);
  V p = Simd::set1(1.9875691500e-4f);
  p = Simd::fma(p, r, Simd::set1(1.3981999507e-3f));
  p = Simd::fma(p, r, Simd::set1(8.3334519073e-3f));
  p = Simd::fma(p, r, Simd::set1(4.1665795894e-2f));
  p = Simd::fma(p, r, Simd::set1(1.6666665459e-1f));
  p = Simd::fma(p, r, Simd::set1(5.0000001201e-1f));
  p = Simd::fma(Simd::mul(r, r), p, Simd::add(r, Simd::set1(1.0f)));
  return Simd::mul(p, Simd::pow2i(n));
}

#include "linear.inl"

#include "many_rows.inl"

#include "int4.inl"

#include "int8_rows.inl"

#include "rows.inl"

#include "attention.inl"

#include "encoder_attention.inl"

#include "cross_attention.inl"

#include "sampling.inl"

const KernelTable kTable = {Simd::kName, linear, widen, linear_many, linear_int8, linear_int4, quantize_rows, rms_norm, layer_norm, gelu, swiglu,
                            gather,      rotate, write_kv,    attention,   combine,
                            pack_window, encoder_attention, write_page, cross_attention, cross_weights,
                            logit_peaks, mask_logits, token_weights, weight_blocks, sum_from, collect};
