// Operators axial_conv and axial_conv_backward on NVIDIA GPUs: tensors in, launches out (axial_conv.cu).
#include "tensors.h"

namespace {

using namespace spanet;

void check_weights(const char* op, const char* name, const Tensor& weight, int64_t dim, int64_t size, const Tensor& x) {
  const bool fits = weight.dim() == dim && weight.size(0) == x.size(1) && (dim == 1 || weight.size(1) == size);
  STD_TORCH_CHECK(fits && weight.scalar_type() == wide_type(x.scalar_type()), op, ": ", name, " does not match x");
}

int64_t size_of(const char* op, const Tensor& row_weight) {
  STD_TORCH_CHECK(row_weight.dim() == 2 && row_weight.size(1) % 2 == 1 && row_weight.size(1) <= kMaxExtent, op,
                  ": row_weight must have shape (C, k) with an odd k");
  return row_weight.size(1);
}

template <typename W>
AxialWeights<W> weights_of(const Tensor& row, const Tensor& row_bias, const Tensor& column) {
  return {{static_cast<const W*>(row.data_ptr()), row.stride(0), row.stride(1)},
          {static_cast<const W*>(column.data_ptr()), column.stride(0), column.stride(1)},
          static_cast<const W*>(row_bias.data_ptr()), nullptr, row_bias.stride(0), 0, static_cast<int>(row.size(1))};
}

std::tuple<Tensor, Tensor> axial_conv_cuda(const Tensor& x, const Tensor& row_weight, const Tensor& row_bias, const Tensor& column_weight,
                                           const Tensor& column_bias, int64_t radius_squared) {
  const Shape shape = shape_of("axial_conv", x);
  const int64_t size = size_of("axial_conv", row_weight);
  check_weights("axial_conv", "row_weight", row_weight, 2, size, x);
  check_weights("axial_conv", "row_bias", row_bias, 1, size, x);
  check_weights("axial_conv", "column_weight", column_weight, 2, size, x);
  check_weights("axial_conv", "column_bias", column_bias, 1, size, x);
  Tensor z = result_like(x, shape, x.scalar_type());
  Tensor coefficients = torch::stable::new_empty(
      x, {shape.batch, shape.channels, functions(shape.height, radius_squared), functions(shape.width, radius_squared)}, row_weight.scalar_type());
  if (x.numel() == 0) return {z, coefficients};
  Call call("axial_conv", x);
  dispatch("axial_conv", x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    AxialWeights<Wide<T>> weights = weights_of<Wide<T>>(row_weight, row_bias, column_weight);
    weights.column_bias = static_cast<const Wide<T>*>(column_bias.data_ptr());
    weights.column_bias_c = column_bias.stride(0);
    AxialConv<T>::forward(shape, view_of(x), view_of(z), weights, static_cast<Wide<T>*>(coefficients.data_ptr()), radius_squared, call);
  });
  return {z, coefficients};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> axial_conv_backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& row_weight,
                                                                            const Tensor& row_bias, const Tensor& column_weight) {
  const Shape shape = shape_of("axial_conv_backward", x);
  const int64_t size = size_of("axial_conv_backward", row_weight);
  check_like("axial_conv_backward", "grad", grad, x);
  check_weights("axial_conv_backward", "row_weight", row_weight, 2, size, x);
  check_weights("axial_conv_backward", "row_bias", row_bias, 1, size, x);
  check_weights("axial_conv_backward", "column_weight", column_weight, 2, size, x);
  Tensor x_grad = result_like(x, shape, x.scalar_type());
  const auto zeros = [&](std::initializer_list<int64_t> sizes) { return torch::stable::new_zeros(row_weight, sizes); };
  Tensor row_grad = zeros({shape.channels, size}), row_bias_grad = zeros({shape.channels});
  Tensor column_grad = zeros({shape.channels, size}), column_bias_grad = zeros({shape.channels});
  if (x.numel() > 0) {
    Call call("axial_conv_backward", x);
    dispatch("axial_conv_backward", x.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using W = Wide<T>;
      const auto data = [](const Tensor& t) { return static_cast<W*>(t.data_ptr()); };
      AxialConv<T>::backward(shape, view_of(grad), view_of(x), view_of(x_grad), weights_of<W>(row_weight, row_bias, column_weight),
                             {data(row_grad), data(row_bias_grad), data(column_grad), data(column_bias_grad)}, call);
    });
  }
  return {x_grad, row_grad, row_bias_grad, column_grad, column_bias_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CUDA, m) {
  m.impl("axial_conv", TORCH_BOX(&axial_conv_cuda));
  m.impl("axial_conv_backward", TORCH_BOX(&axial_conv_backward_cuda));
}
