// The exact GELU and its slope, in fp32. Included once by a file that is compiled per instruction set, like simd.h.
//
//   gelu(h) = h Phi(h) = max(h, 0) - t Phi(-t),   t = |h|
//   slope(h) = Phi(h) + h phi(h),   that of t Phi(-t) where h < 0 and 1 less it where h > 0
//
// On [0, end] the two functions of t are polynomials in 2 t / end - 1, beyond it their values at the end: minimax fits.
#pragma once

#include "cpu/simd.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

template <int N> struct Tail {
  float end, terms[N];  // the highest power first
};

// Phi(-t), for a GELU to 4e-7, where PyTorch's fp32 errs by 1e-6.
constexpr Tail<16> tail_of_numbers{5.5f, {-0.00558056595f, 0.00532761978f, 0.0301311124f, -0.043508002f, -0.0490751352f, 0.133205494f,
                                          -0.0349252235f, -0.163058874f, 0.218434852f, -0.0513972174f, -0.177165405f, 0.271889747f,
                                          -0.206808051f, 0.0945579348f, -0.0250080628f, 0.00297977417f}};
// The same to 1.4e-5, where bf16 rounds by up to 4e-3 of the value.
constexpr Tail<10> tail_of_pairs{4.4f, {-0.0169292852f, 0.0282012057f, 0.0401872848f, -0.119978246f, 0.0476827905f, 0.138779013f,
                                        -0.242884792f, 0.189044968f, -0.0780001475f, 0.0139002877f}};
// The slope of t Phi(-t), to 3e-8.
constexpr Tail<19> slope_of_numbers{
    5.5f,
    {-0.0254552066f, 0.0197646003f, 0.154520735f, -0.170361504f, -0.367531747f, 0.633238673f, 0.267451644f, -1.23334873f, 0.622974157f,
    1.04499388f, -1.6629318f, 0.425128013f, 1.14348459f, -1.36866152f, 0.476376951f, 0.260142982f, -0.336862117f, 0.139103338f,
    -0.0220275521f}};
// The same to 3.1e-5.
constexpr Tail<12> slope_of_pairs{4.6f, {0.065893963f, 0.0682551488f, -0.383079827f, -0.0815157369f, 0.874064445f, -0.414241314f,
                                         -0.731721878f, 0.956550837f, -0.28951934f, -0.224643111f, 0.214340359f, -0.054397624f}};

template <int N> SIMD_INLINE Vec<float> within(const Tail<N>& tail, Vec<float> h) {
  return at_most((Vec<float>)((Simd<float>::U)h & 0x7fffffffu), tail.end);
}

template <int N> SIMD_INLINE Vec<float> polynomial(const Tail<N>& tail, Vec<float> t) {
  const Vec<float> at = t * (2 / tail.end) - 1.0f;
  Vec<float> sum = Vec<float>{} + tail.terms[0];
#pragma GCC unroll 32
  for (int i = 1; i < N; ++i) sum = sum * at + tail.terms[i];
  return sum;
}

template <int N> SIMD_INLINE Vec<float> gelu(Vec<float> h, const Tail<N>& tail) {
  const Vec<float> t = within(tail, h);
  return at_least(h, 0.0f) - t * polynomial(tail, t);
}

template <int N> SIMD_INLINE Vec<float> gelu_slope(Vec<float> h, const Tail<N>& tail) {
  const Vec<float> inner = polynomial(tail, within(tail, h));
  return h > 0.0f ? 1.0f - inner : inner;
}

}  // namespace
}  // namespace SIMD_NAME
}  // namespace spanet
