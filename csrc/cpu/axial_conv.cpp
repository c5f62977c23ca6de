// axial_conv and axial_conv_backward on the CPU: checks, the way the work is cut, and the registration.
// The arithmetic is in axial_conv_kernel.cpp, compiled once per instruction set.

#include <memory>
#include <tuple>
#include <vector>

#include "cpu/axial_conv_kernel.h"
#include "cpu/dispatch.h"
#include "cpu/mode_table.h"
#include "cpu/operators.h"
#include "cpu/remembered.h"

namespace spanet {
namespace {

constexpr Compiled<AxialConvKernels> compiled = SPANET_COMPILED(axial_conv_kernels);

// A parameter (C, k) or (C,) as one row a channel.
template <class T> Planes<T> row_planes(const Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), 0, t.stride(0), 0, t.dim() == 2 ? t.stride(1) : 1};
}

// Work for a thread to be worth its start: this many elements.
constexpr int64_t grain = 16384;

void check(const char* name, const Tensor& parameter, const Tensor& x, int64_t size) {
  const bool shape = parameter.size(0) == x.size(1) && parameter.dim() == (size ? 2 : 1) && (!size || parameter.size(1) == size);
  STD_TORCH_CHECK(shape && parameter.scalar_type() == accumulator_dtype(x), "axial_conv: ", name,
                  " must have shape (C, k), k odd, or (C,), in the dtype of the accumulators");
}

template <class T>
AxialConv<T> problem(const Tensor& x, const Tensor& row_weight, const Tensor& row_bias, const Tensor& column_weight,
                     const Tensor& column_bias) {
  return {x.size(0), x.size(1), x.size(2), x.size(3), row_weight.size(1), row_planes<const T>(row_weight), row_planes<const T>(row_bias),
          row_planes<const T>(column_weight), row_planes<const T>(column_bias), {}};
}

// z, and its coefficients of the modes up to a radius, unless that is negative.
void convolve(const Tensor& x, const Tensor& row_weight, const Tensor& row_bias, const Tensor& column_weight, const Tensor& column_bias,
              int64_t radius_squared, const Tensor& z, void* coefficients) {
  const int64_t images = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t size = row_weight.dim() == 2 && row_weight.size(1) % 2 ? row_weight.size(1) : -1;
  check("row_weight", row_weight, x, size);
  check("row_bias", row_bias, x, 0);
  check("column_weight", column_weight, x, size);
  check("column_bias", column_bias, x, 0);
  if (x.numel() == 0) return;
  for_dtype("axial_conv", compiled, x.scalar_type(), channels, [&]<class T, class IO>(const AxialConvKernels<T, IO>& kernel) {
    AxialConv<T> op = problem<T>(x, row_weight, row_bias, column_weight, column_bias);
    std::shared_ptr<const ModeTable<T>> table;
    int64_t modes = 0;
    if (radius_squared >= 0) {
      table = remembered<ModeTable<T>>(h, w, radius_squared, Extent::square, kernel.lanes);
      op.modes = table->modes;
      modes = op.modes.inside;
    }
    const Planes<T> to{static_cast<T*>(coefficients), channels * modes, modes, 0, 1};
    const int64_t chunks = (channels + kernel.lanes - 1) / kernel.lanes;
    parallel(grain, images * chunks, h * w * kernel.lanes,
             [&](int64_t begin, int64_t end) { kernel.forward(op, planes<const IO>(x), planes<IO>(z), to, begin, end); });
  });
}

std::tuple<Tensor, Tensor> axial_conv(const Tensor& x, const Tensor& row_weight, const Tensor& row_bias, const Tensor& column_weight,
                                      const Tensor& column_bias, int64_t radius_squared) {
  STD_TORCH_CHECK(x.dim() == 4, "axial_conv: x must have shape (B, C, H, W)");
  const int64_t h = x.size(2), w = x.size(3);
  if (radius_squared > h * h + w * w) radius_squared = h * h + w * w;  // holds the whole spectrum
  const auto functions = [&](int64_t n) { return radius_squared < 0 ? 0 : axis_functions(n, radius_squared); };
  Tensor z = empty_in_layout_of(x), coefficients = empty_coefficients(x, functions(h), functions(w));
  convolve(x, row_weight, row_bias, column_weight, column_bias, radius_squared, z, coefficients.data_ptr());
  return {std::move(z), std::move(coefficients)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> axial_conv_backward(const Tensor& grad, const Tensor& x, const Tensor& row_weight,
                                                                       const Tensor& row_bias, const Tensor& column_weight) {
  STD_TORCH_CHECK(x.dim() == 4 && grad.dim() == 4, "axial_conv_backward: x and grad must have shape (B, C, H, W)");
  Tensor x_grad = empty_in_layout_of(x);
  AxialConvGrads grads = axial_conv_backward_into(x_grad, grad, x, row_weight, row_bias, column_weight);
  return {std::move(x_grad), std::move(grads[0]), std::move(grads[1]), std::move(grads[2]), std::move(grads[3])};
}

}  // namespace

AxialConvGrads axial_conv_backward_into(const Tensor& x_grad, const Tensor& grad, const Tensor& x, const Tensor& row_weight,
                                        const Tensor& row_bias, const Tensor& column_weight) {
  const int64_t images = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t size = row_weight.dim() == 2 && row_weight.size(1) % 2 ? row_weight.size(1) : -1;
  check("row_weight", row_weight, x, size);
  check("row_bias", row_bias, x, 0);
  check("column_weight", column_weight, x, size);
  check_like("axial_conv_backward", "grad", grad, x);
  Tensor row_weight_grad = zeros(x, {channels, size}), column_weight_grad = zeros(x, {channels, size});
  Tensor row_bias_grad = zeros(x, {channels}), column_bias_grad = zeros(x, {channels});
  if (x.numel() > 0)
    for_dtype("axial_conv", compiled, x.scalar_type(), channels, [&]<class T, class IO>(const AxialConvKernels<T, IO>& kernel) {
      const AxialConv<T> op = problem<T>(x, row_weight, row_bias, column_weight, row_bias);
      const int64_t chunks = (channels + kernel.lanes - 1) / kernel.lanes;
      const Tensor partial =
          empty(std::array{chunks, images, op.sums(), kernel.lanes}, ScalarType::Double);
      double* sums = static_cast<double*>(partial.data_ptr());
      parallel(grain, images * chunks, h * w * kernel.lanes, [&](int64_t begin, int64_t end) {
        kernel.backward(op, planes<const IO>(grad), planes<const IO>(x), planes<IO>(x_grad), sums, begin, end);
      });
      parallel(grain, chunks, images * op.sums() * kernel.lanes, [&](int64_t begin, int64_t end) {
        kernel.sum_images(op, sums, row_planes<T>(row_weight_grad), row_planes<T>(row_bias_grad), row_planes<T>(column_weight_grad),
                          row_planes<T>(column_bias_grad), begin, end);
      });
    });
  return {std::move(row_weight_grad), std::move(row_bias_grad), std::move(column_weight_grad), std::move(column_bias_grad)};
}

void axial_conv_into(const Tensor& z, const Tensor& x, const Tensor& row_weight, const Tensor& row_bias, const Tensor& column_weight,
                     const Tensor& column_bias) {
  convolve(x, row_weight, row_bias, column_weight, column_bias, -1, z, nullptr);
}

}  // namespace spanet

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CPU, m) {
  m.impl("axial_conv", spanet::boxed<&spanet::axial_conv>);
  m.impl("axial_conv_backward", spanet::boxed<&spanet::axial_conv_backward>);
}
