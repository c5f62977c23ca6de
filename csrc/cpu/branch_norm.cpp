// branch_norm, branch_norm_backward and branch_sum on the CPU: checks, the way the work is cut, and the registration.
// The arithmetic is in branch_norm_kernel.cpp, compiled once per instruction set.

#include "cpu/branch_norm_kernel.h"

#include <vector>

#include "cpu/dispatch.h"

namespace spanet {
namespace {

// Work for a thread to be worth its start: this many elements.
constexpr int64_t grain = 16384;

const BranchNormSet& kernels() { return SPANET_BEST(branch_norm_kernels); }

void check_map(const char* name, const Tensor& map, const Tensor& x, bool same_dtype) {
  bool fits = map.dim() == 4 && (!same_dtype || map.scalar_type() == x.scalar_type());
  for (int k = 0; fits && k < 4; ++k) fits = map.size(k) == x.size(k) && (map.size(k) == 1 || map.stride(k) == x.stride(k));
  STD_TORCH_CHECK(fits, "branch_norm: ", name, " must have the shape, layout", same_dtype ? " and dtype of x" : " of x");
}

void check_vector(const char* name, const Tensor& vector, const Tensor& x) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == x.size(1) && vector.is_contiguous() && vector.scalar_type() == ScalarType::Float,
                  "branch_norm: ", name, " must be contiguous float32 of shape (C,)");
}

// Calls f(kernels, problem, units, elements of one) for maps of x and n.
template <class F> void for_maps(const Tensor& x, const Tensor& n, F f) {
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
  const auto run = [&]<class X, class N>(const BranchNormKernels<X, N>& kernel) {
    BranchNorm<X, N> op{};
    op.channels = channels, op.pixels = pixels, op.last = !x.is_contiguous();
    op.x = static_cast<const X*>(x.data_ptr());
    op.n = static_cast<N*>(n.data_ptr());
    if (op.last) f(kernel, op, x.size(0) * op.blocks(), branch_norm_block * channels);
    else f(kernel, op, x.size(0) * channels, pixels);
  };
  const ScalarType of_x = x.scalar_type(), of_n = n.scalar_type();
  if (of_x == ScalarType::Float && of_n == ScalarType::Float) run(kernels().f32);
  else if (of_x == ScalarType::BFloat16 && of_n == ScalarType::BFloat16) run(kernels().bf16);
  else if (of_x == ScalarType::Float && of_n == ScalarType::BFloat16) run(kernels().mixed);
  else STD_TORCH_CHECK(false, "branch_norm: x and n must be float32 or bfloat16, n not wider than x");
}

void check_x(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "branch_norm: x must have shape (B, C, H, W)");
  STD_TORCH_CHECK(is_dense(x, !x.is_contiguous()), "branch_norm: x must be contiguous or channels_last");
}

void branch_norm(const Tensor& n, const Tensor& x, const Tensor& moments, const Tensor& weight, const Tensor& bias) {
  check_x(x);
  check_map("n", n, x, false);
  check_moments("branch_norm", moments, x);
  check_vector("weight", weight, x);
  check_vector("bias", bias, x);
  for_maps(x, n, [&](const auto& kernel, auto op, int64_t units, int64_t elements) {
    op.moments = static_cast<const float*>(moments.data_ptr());
    op.weight = static_cast<const float*>(weight.data_ptr());
    op.bias = static_cast<const float*>(bias.data_ptr());
    parallel(grain, units, elements, [&](int64_t begin, int64_t end) { kernel.forward(op, begin, end); });
  });
}

std::tuple<Tensor, Tensor, Tensor> branch_norm_backward(const Tensor& x_grad, const Tensor& n_grad, const Tensor& x, const Tensor& moments,
                                                        const Tensor& weight, const std::optional<Tensor>& sum_grad,
                                                        const std::optional<Tensor>& scale) {
  check_x(x);
  check_map("x_grad", x_grad, x, true);
  check_map("n_grad", n_grad, x, false);
  check_moments("branch_norm", moments, x);
  check_vector("weight", weight, x);
  if (sum_grad) check_map("sum_grad", *sum_grad, x, true);
  if (scale) check_vector("scale", *scale, x);
  STD_TORCH_CHECK(!scale || sum_grad, "branch_norm: a scale needs sum_grad");
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  Tensor weight_grad = zeros(x, {channels}), bias_grad = zeros(x, {channels}), scale_grad = zeros(x, {scale ? channels : 0});
  for_maps(x, n_grad, [&](const auto& kernel, auto op, int64_t units, int64_t elements) {
    const int64_t blocks = op.blocks();
    const Tensor sums = empty(std::array{images * blocks * 3 * channels}, ScalarType::Float);
    op.moments = static_cast<const float*>(moments.data_ptr());
    op.weight = static_cast<const float*>(weight.data_ptr());
    using Map = decltype(op.x);
    op.sum_grad = sum_grad ? static_cast<Map>(sum_grad->data_ptr()) : nullptr;
    op.scale = scale ? static_cast<const float*>(scale->data_ptr()) : nullptr;
    op.x_grad = static_cast<std::remove_const_t<std::remove_pointer_t<Map>>*>(x_grad.data_ptr());
    op.sums = static_cast<float*>(sums.data_ptr());
    parallel(grain, units, elements, [&](int64_t begin, int64_t end) { kernel.sums(op, begin, end); });
    // of an image, of them the slopes, of all images
    std::vector<double> of_image(3 * channels), all(3 * channels);
    std::vector<float> slope(2 * images);
    for (int64_t image = 0; image < images; ++image) {
      std::fill(of_image.begin(), of_image.end(), 0.0);
      for (int64_t block = 0; block < blocks; ++block) {
        const float* from = op.sums + (image * blocks + block) * 3 * channels;
        for (int64_t k = 0; k < 3 * channels; ++k) of_image[k] += from[k];
      }
      double alone = 0, with_u = 0;
      for (int64_t c = 0; c < channels; ++c) with_u += op.weight[c] * of_image[c], alone += op.weight[c] * of_image[channels + c];
      slope[2 * image] = static_cast<float>(alone / (channels * pixels));
      slope[2 * image + 1] = static_cast<float>(with_u / (channels * pixels));
      for (int64_t k = 0; k < 3 * channels; ++k) all[k] += of_image[k];
    }
    op.slope = slope.data();
    parallel(grain, units, elements, [&](int64_t begin, int64_t end) { kernel.backward(op, begin, end); });
    const auto store = [&](const Tensor& to, int64_t first) {
      for (int64_t c = 0; c < to.size(0); ++c) static_cast<float*>(to.data_ptr())[c] = static_cast<float>(all[first + c]);
    };
    store(weight_grad, 0);
    store(bias_grad, channels);
    store(scale_grad, 2 * channels);
  });
  return {std::move(weight_grad), std::move(bias_grad), std::move(scale_grad)};
}

void branch_sum(const Tensor& y, const Tensor& f, const Tensor& x, const std::optional<Tensor>& scale) {
  check_x(x);
  check_map("y", y, x, true);
  check_map("f", f, x, false);
  if (scale) check_vector("scale", *scale, x);
  for_maps(x, f, [&](const auto& kernel, auto op, int64_t units, int64_t elements) {
    using Map = decltype(op.x);
    op.scale = scale ? static_cast<const float*>(scale->data_ptr()) : nullptr;
    op.x_grad = static_cast<std::remove_const_t<std::remove_pointer_t<Map>>*>(y.data_ptr());
    parallel(grain, units, elements, [&](int64_t begin, int64_t end) { kernel.add(op, begin, end); });
  });
}

}  // namespace
}  // namespace spanet

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CPU, m) {
  m.impl("branch_norm", spanet::boxed<&spanet::branch_norm>);
  m.impl("branch_norm_backward", spanet::boxed<&spanet::branch_norm_backward>);
  m.impl("branch_sum", spanet::boxed<&spanet::branch_sum>);
}
