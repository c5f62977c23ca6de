// gelu on the CPU: checks, the way the work is cut, and the registration.
// The arithmetic is in gelu_kernel.cpp, compiled once per instruction set.

#include "cpu/gelu_kernel.h"

#include "cpu/dispatch.h"

namespace spanet {
namespace {

constexpr Compiled<GeluKernels> compiled = SPANET_COMPILED(gelu_kernels);

// Work for a thread to be worth its start: this many elements.
constexpr int64_t grain = 16384;

constexpr int64_t block = 32;  // rows that are summed at once, then the sums: in fp64, and in the same order for any number of threads

std::tuple<Tensor, Tensor> gelu(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& grad) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "gelu: x must be contiguous of shape (N, D)");
  const int64_t rows = x.size(0), columns = x.size(1);
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == columns && bias->is_contiguous() &&
                            bias->scalar_type() == x.scalar_type()),
                  "gelu: bias must be contiguous of shape (D,), of the dtype of x");
  STD_TORCH_CHECK(!grad || (grad->dim() == 2 && grad->size(0) == rows && grad->size(1) == columns && grad->is_contiguous() &&
                            grad->scalar_type() == x.scalar_type()),
                  "gelu: grad must be contiguous, of the shape and dtype of x");
  Tensor a = empty(std::array{rows, columns}, x.scalar_type());
  Tensor sums = empty(std::array{grad ? columns : 0}, accumulator_dtype(x));
  for_dtype("gelu", compiled, x.scalar_type(), columns, [&]<class T, class IO>(const GeluKernels<T, IO>& kernel) {
    const auto data = [](const Tensor& t) { return static_cast<IO*>(t.data_ptr()); };
    const int64_t blocks = (rows + block - 1) / block, width = (columns + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
    const Tensor partial = grad ? zeros(x, {blocks, width}) : empty(std::array{int64_t{0}, width}, accumulator_dtype(x));
    const T* from = static_cast<const T*>(partial.data_ptr());
    const Gelu<T, IO> op{rows, columns, block, width, data(x), bias ? data(*bias) : nullptr, data(a), grad ? data(*grad) : nullptr,
                         static_cast<T*>(partial.data_ptr())};
    parallel(grain, blocks, block * columns, [&](int64_t begin, int64_t end) { kernel.run(op, begin, end); });
    for (int64_t i = 0; i < sums.numel(); ++i) {
      double sum = 0;
      for (int64_t k = 0; k < blocks; ++k) sum += from[k * width + i];
      static_cast<T*>(sums.data_ptr())[i] = T(sum);
    }
  });
  return {std::move(a), std::move(sums)};
}

}  // namespace
}  // namespace spanet

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CPU, m) {
  m.impl("gelu", spanet::boxed<&spanet::gelu>);
}
