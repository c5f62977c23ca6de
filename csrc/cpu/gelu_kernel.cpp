// The exact GELU and its gradient in one pass, for the instruction set this file is compiled for (simd.h).
//
//   h = x + b,   a = h Phi(h),   grad *= Phi(h) + h phi(h),   sums = column sums of that grad
//
// x is read once, a written once, grad read and written once. Sums go over the rows of a block here.

#include "cpu/gelu_kernel.h"

#include "cpu/gelu.h"
#include "cpu/simd.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

// Of h, of memory in IO.
template <class IO> SIMD_INLINE Vec<float> value(Vec<float> h) {
  if constexpr (is_bf16<IO>) return gelu(h, tail_of_pairs);
  else return gelu(h, tail_of_numbers);
}
template <class IO> SIMD_INLINE Vec<float> slope(Vec<float> h) {
  if constexpr (is_bf16<IO>) return gelu_slope(h, slope_of_pairs);
  else return gelu_slope(h, slope_of_numbers);
}

// fp64, of which speed is not asked.
SIMD_INLINE double phi_integral(double h) { return 0.5 * __builtin_erfc(-h * 0.70710678118654752440); }
template <class> SIMD_INLINE Vec<double> value(Vec<double> h) {
  for (int64_t l = 0; l < lanes_of<double>; ++l) h[l] *= phi_integral(h[l]);
  return h;
}
template <class> SIMD_INLINE Vec<double> slope(Vec<double> h) {
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
    const Vec<T> product = read(grad) * slope<IO>(h), total = load_raw<Vec<T>>(sum) + product;
    write(grad, product);
    std::memcpy(sum, &total, sizeof total);
  }
  write(a, value<IO>(h));
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

SPANET_DEFINE_KERNELS(gelu_kernels, GeluKernels, SPANET_NATIVE_KERNELS)

}  // namespace SIMD_NAME
}  // namespace spanet
