// Operator mode_coefficients on NVIDIA GPUs: tensor in, launches out (mode_coefficients.cu).
#include "tensors.h"

namespace {

using namespace spanet;

Tensor mode_coefficients_cuda(const Tensor& x, int64_t radius_squared) {
  const Shape shape = shape_of("mode_coefficients", x);
  const int64_t rows = functions(shape.height, radius_squared), columns = functions(shape.width, radius_squared);
  Tensor out = torch::stable::new_empty(x, {shape.batch, shape.channels, rows, columns}, wide_type(x.scalar_type()));
  if (out.numel() == 0) return out;
  Call call("mode_coefficients", x);
  dispatch("mode_coefficients", x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    ModeCoefficients<T>::forward(shape, view_of(x), static_cast<Wide<T>*>(out.data_ptr()), radius_squared, call);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CUDA, m) {
  m.impl("mode_coefficients", TORCH_BOX(&mode_coefficients_cuda));
}
