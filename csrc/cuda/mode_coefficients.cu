// Operators mode_coefficients and add_modes on NVIDIA GPUs: tensors in, launches out (see mode_coefficients.cuh).
#include "mode_coefficients.cuh"
#include "tensors.cuh"

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
    run_mode_coefficients<T>(shape, view_of(x), static_cast<Wide<T>*>(out.data_ptr()), radius_squared, call.shared_limit, call.allocator(),
                             call.stream);
  });
  return out;
}

Tensor add_modes_cuda(const Tensor& x, const Tensor& coefficients, const std::optional<Tensor>& factor, int64_t radius_squared) {
  const Shape shape = shape_of("add_modes", x);
  const int64_t expected[4] = {shape.batch, shape.channels, functions(shape.height, radius_squared), functions(shape.width, radius_squared)};
  bool fits = coefficients.dim() == 4 && coefficients.scalar_type() == wide_type(x.scalar_type());
  for (int k = 0; fits && k < 4; ++k) fits = coefficients.size(k) == expected[k];
  STD_TORCH_CHECK(fits, "add_modes: coefficients must have shape (", expected[0], ", ", expected[1], ", ", expected[2], ", ", expected[3],
                  ") and the accumulators' dtype");
  if (factor) check_like("add_modes", "factor", *factor, x);
  Tensor y = result_like(x, shape, x.scalar_type());
  if (x.numel() == 0) return y;
  Call call("add_modes", x);
  dispatch("add_modes", x.scalar_type(), [&](auto element) {
    run_add_modes<decltype(element)>(shape, view_of(x), view_of(coefficients), factor ? view_of(*factor) : View{}, view_of(y), radius_squared,
                                     call.shared_limit, call.stream);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CUDA, m) {
  m.impl("mode_coefficients", TORCH_BOX(&mode_coefficients_cuda));
  m.impl("add_modes", TORCH_BOX(&add_modes_cuda));
}
