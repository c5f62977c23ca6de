// The exact GELU and its gradient in one pass, for the instruction set this file is compiled for (simd.h).
//
//   h = x + b,   a = h Phi(h),   grad *= Phi(h) + h phi(h),   sums = column sums of that grad
//
// x is read once, a written once, grad read and written once. With t = |h| and the tail T(t) = t Phi(-t),   h Phi(h) = max(h, 0) - T(t),   and its derivative is T'(t) for h < 0, 1 - T'(t) for h > 0.
// Sums go over the rows of a block here.

#include "cpu/gelu_kernel.h"

#include "cpu/simd.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

#define UNROLL _Pragma("GCC unroll 32")

// T and T' as polynomials in 2 t / end - 1 on [0, end], and their values at the end beyond it: minimax fits, to 3e-8.
constexpr float end_of_tail = 5.5f;
constexpr float tail[] = {0.00819436461f, -0.0605762117f, 0.191264153f, -0.30876559f,  0.178930908f,  0.261600316f,
                          -0.628187478f,  0.452285707f,   0.150844961f, -0.520623446f, 0.273374438f,  0.185871363f,
                          -0.25829187f,   0.0125689637f,  0.0997837558f, -0.0290697254f, -0.0159132369f, 0.00670864666f};
constexpr float tail_slope[] = {-0.0220275521f, 0.139103338f, -0.336862117f, 0.260142982f, 0.476376951f, -1.36866152f, 1.14348459f,
                                0.425128013f,   -1.6629318f,  1.04499388f,   0.622974157f, -1.23334873f, 0.267451644f, 0.633238673f,
                                -0.367531747f,  -0.170361504f, 0.154520735f, 0.0197646003f, -0.0254552066f};

template <int N> SIMD_INLINE Vec<float> polynomial(Vec<float> x, const float (&terms)[N]) {
  Vec<float> sum = Vec<float>{} + terms[N - 1];
  UNROLL
  for (int i = N - 2; i >= 0; --i) sum = sum * x + terms[i];
  return sum;
}

SIMD_INLINE Vec<float> place_in_tail(Vec<float> h) {
  const Vec<float> t = at_most((Vec<float>)((Simd<float>::U)h & 0x7fffffffu), end_of_tail);
  return t * (2 / end_of_tail) - 1.0f;
}
SIMD_INLINE Vec<float> value(Vec<float> h) { return at_least(h, 0.0f) - polynomial(place_in_tail(h), tail); }
SIMD_INLINE Vec<float> slope(Vec<float> h) {
  const Vec<float> inner = polynomial(place_in_tail(h), tail_slope);
  return h > 0.0f ? 1.0f - inner : inner;
}

// fp64, of which speed is not asked.
SIMD_INLINE double phi_integral(double h) { return 0.5 * __builtin_erfc(-h * 0.70710678118654752440); }
SIMD_INLINE Vec<double> value(Vec<double> h) {
  for (int64_t l = 0; l < lanes_of<double>; ++l) h[l] *= phi_integral(h[l]);
  return h;
}
SIMD_INLINE Vec<double> slope(Vec<double> h) {
  for (int64_t l = 0; l < lanes_of<double>; ++l)
    h[l] = phi_integral(h[l]) + h[l] * 0.39894228040143267794 * __builtin_exp(-0.5 * h[l] * h[l]);
  return h;
}

// n elements of a row, up to a vector; adds the new gradient to sum.
template <bool gradient, class T, class IO> SIMD_INLINE void vector(const IO* x, const IO* bias, IO* a, IO* grad, T* sum, int64_t n) {
  const bool whole = n >= lanes_of<T>;
  const auto read = [&](const IO* p) { return whole ? load<T>(p) : load_part<T>(p, n); };
  const auto write = [&](IO* p, Vec<T> v) { whole ? store<T>(p, v) : store_part<T>(p, v, n); };
  const Vec<T> h = bias ? read(x) + read(bias) : read(x);
  if constexpr (gradient) {
    const Vec<T> product = read(grad) * slope(h), total = load_raw<Vec<T>>(sum) + product;
    write(grad, product);
    std::memcpy(sum, &total, sizeof total);
  }
  write(a, value(h));
}

template <bool gradient, class T, class IO> void rows(const Gelu<T, IO>& op, int64_t begin, int64_t end, T* sums) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t i = 0; i < op.columns; i += lanes_of<T>) {
      const int64_t at = row * op.columns + i;
      vector<gradient>(op.x + at, op.bias ? op.bias + i : nullptr, op.a + at, gradient ? op.grad + at : nullptr,
                       gradient ? sums + i : nullptr, op.columns - i);
    }
}

template <class T, class IO> void run(const Gelu<T, IO>& op, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * op.block, last = first + op.block < op.rows ? first + op.block : op.rows;
    op.grad ? rows<true>(op, first, last, op.sums + block * op.width) : rows<false>(op, first, last, op.sums);
  }
}

template <class T, class IO> constexpr GeluKernels<T, IO> kernels{run<T, IO>, lanes_of<T>};

}  // namespace

extern const KernelSet<GeluKernels> gelu_kernels{kernels<float, float>, kernels<float, Bf16>, kernels<float, Half>, kernels<double, double>
#if SIMD_BYTES == 64
                                                 ,
                                                 kernels<float, NativeBf16>
#endif
};

}  // namespace SIMD_NAME
}  // namespace spanet
