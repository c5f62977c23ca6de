// Operators radial_filter and radial_filter_backward on NVIDIA GPUs: tensors in, launches out (radial_filter.cu).
#include "tensors.h"

namespace {

using namespace spanet;

Tensor radial_filter_cuda(const Tensor& x, const Tensor& base, const Tensor& gain, int64_t radius_squared) {
  const Shape shape = shape_of("radial_filter", x);
  const ScalarType type = x.scalar_type(), wide = wide_type(type);
  STD_TORCH_CHECK(base.dim() == 1 && base.size(0) == shape.channels && base.scalar_type() == wide, "radial_filter: base does not match x");
  STD_TORCH_CHECK(gain.dim() == 2 && gain.size(1) == shape.channels && gain.scalar_type() == wide, "radial_filter: gain does not match x");
  Tensor y = result_like(x, shape, type);
  if (x.numel() == 0) return y;
  // 16 bits beyond four frequencies are added up block by block, so in fp32
  if (is_16_bit(type) && integer_root(spectrum_limit(shape, radius_squared)) > 4) {
    Tensor wide_x = result_like(x, shape, wide);
    torch::stable::copy_(wide_x, x);
    torch::stable::copy_(y, radial_filter_cuda(wide_x, base, gain, radius_squared));
    return y;
  }
  Call call("radial_filter", x);
  dispatch("radial_filter", type, [&](auto element) {
    using T = decltype(element);
    const Profile<Wide<T>> profile{static_cast<const Wide<T>*>(base.data_ptr()), static_cast<const Wide<T>*>(gain.data_ptr()), base.stride(0),
                                   gain.stride(0), gain.stride(1)};
    RadialFilter<T>::forward(shape, view_of(x), view_of(y), profile, radius_squared, call);
  });
  return y;
}

std::tuple<Tensor, Tensor> radial_filter_backward_cuda(const Tensor& grad, const Tensor& x, int64_t radius_squared) {
  const Shape shape = shape_of("radial_filter_backward", x);
  const ScalarType type = x.scalar_type(), wide = wide_type(type);
  check_like("radial_filter_backward", "grad", grad, x);
  const auto shells = shell_table(radius_squared);
  const int64_t count = 1 + *std::max_element(shells.begin(), shells.end());
  Tensor base_grad = torch::stable::new_zeros(x, {shape.channels}, wide), gain_grad = torch::stable::new_zeros(x, {count, shape.channels}, wide);
  if (x.numel() == 0) return {base_grad, gain_grad};
  Call call("radial_filter_backward", x);
  dispatch("radial_filter_backward", type, [&](auto element) {
    using T = decltype(element);
    RadialFilter<T>::backward(shape, view_of(grad), view_of(x), static_cast<Wide<T>*>(base_grad.data_ptr()),
                              static_cast<Wide<T>*>(gain_grad.data_ptr()), radius_squared, call);
  });
  return {base_grad, gain_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CUDA, m) {
  m.impl("radial_filter", TORCH_BOX(&radial_filter_cuda));
  m.impl("radial_filter_backward", TORCH_BOX(&radial_filter_backward_cuda));
}
