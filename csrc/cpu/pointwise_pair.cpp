// pointwise_pair and image_moments on the CPU: checks, the way the work is cut, and the registration.
// The arithmetic is in pointwise_pair_kernel.cpp, compiled once per instruction set.

#include "cpu/pointwise_pair_kernel.h"

#include <cmath>

#include "cpu/dispatch.h"
#include "cpu/operators.h"

namespace spanet {
namespace {

// What is written besides y, for later, leaves the caches to others from this size on.
constexpr int64_t stream_bytes = int64_t{1} << 20;

const PointwisePairKernels& kernels() { return SPANET_BEST(pointwise_pair_kernels); }

const PointwisePairEngine<Bf16>& bf16_engine() {
  static const Capability capability = cpu_capability();
  if (capability == Capability::amx) return kernels().bf16_tiles;
  return capability == Capability::avx512_bf16 ? kernels().bf16_dot : kernels().bf16;
}

// to = the transposes of so many matrices, one behind the other.
void transpose(const Tensor& to, const Tensor& from, int64_t matrices, int64_t rows, int64_t columns) {
  const auto run = [&]<class IO>(void (*kernel)(const IO*, int64_t, int64_t, int64_t, int64_t, IO*)) {
    constexpr int64_t grain = 16384, step = pointwise_pair_channels;
    const int64_t steps = rows / step;
    parallel(grain, matrices * steps, step * columns, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t matrix = at / steps * rows * columns, row = at % steps * step;
        kernel(static_cast<const IO*>(from.data_ptr()) + matrix, rows, columns, row, row + step, static_cast<IO*>(to.data_ptr()) + matrix);
      }
    });
  };
  if (from.scalar_type() == ScalarType::Float) run(kernels().f32_transposed);
  else if (from.scalar_type() == ScalarType::BFloat16) run(kernels().bf16_transposed);
  else STD_TORCH_CHECK(false, "pointwise_pair: tensors must be float32 or bfloat16");
}

void check_vector(const char* name, const Tensor* vector, const Tensor& x, int64_t size) {
  STD_TORCH_CHECK(!vector || (vector->dim() == 1 && vector->size(0) == size && vector->is_contiguous() &&
                              vector->scalar_type() == x.scalar_type()),
                  "pointwise_pair: ", name, " must be contiguous with ", size, " elements of the dtype of x");
}

void check_weight(const char* name, const Tensor& weight, const Tensor& x, int64_t in) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == in && weight.is_contiguous() && weight.scalar_type() == x.scalar_type(),
                  "pointwise_pair: ", name, " must be contiguous with one column per channel, of the dtype of x");
  STD_TORCH_CHECK(weight.size(0) % pointwise_pair_channels == 0 && in % pointwise_pair_channels == 0,
                  "pointwise_pair: channels must be multiples of ", pointwise_pair_channels, ", ", name, " has ", weight.size(0), " x ",
                  in);
}

void pointwise_pair(const Tensor& y, const Tensor& x, const std::optional<Tensor>& moments, const std::optional<Tensor>& norm_weight,
                    const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& factor, const std::optional<Tensor>& residual,
                    const std::optional<Tensor>& residual_scale, const std::optional<Tensor>& weight_in,
                    const std::optional<Tensor>& bias_in, const Tensor& weight_out, const std::optional<Tensor>& bias_out,
                    const std::optional<Tensor>& before) {
  pointwise_pair_into(y, {.x = &x, .moments = pointer_to(moments), .norm_weight = pointer_to(norm_weight),
                          .norm_bias = pointer_to(norm_bias), .factor = pointer_to(factor), .residual = pointer_to(residual),
                          .residual_scale = pointer_to(residual_scale), .weight_in = pointer_to(weight_in), .bias_in = pointer_to(bias_in),
                          .weight_out = &weight_out, .bias_out = pointer_to(bias_out), .before = pointer_to(before)});
}

// h_grad = gelu'(h) o W_out^T grad, x_grad = W_in^T h_grad: a pair whose factor is a slope.
void pointwise_mlp_backward(const Tensor& x_grad, const Tensor& h_grad, const Tensor& grad, const Tensor& h, const Tensor& weight_in,
                            const Tensor& weight_out) {
  const Tensor first = transposed_weight(weight_out), second = transposed_weight(weight_in);
  pointwise_pair_into(x_grad, {.x = &grad, .factor = &h, .weight_in = &first, .weight_out = &second, .by_slope = true, .after = &h_grad});
}

Tensor image_moments(const Tensor& x, double eps) {
  STD_TORCH_CHECK(x.dim() == 4, "image_moments: x must have shape (B, C, H, W)");
  Tensor out = empty(std::array{x.size(0), int64_t{2}}, ScalarType::Float);
  image_moments_into(out, x, eps);
  return out;
}

}  // namespace

void pointwise_pair_into(const Tensor& y, const PairOperands& of) {
  const auto& [x_, moments, norm_weight, norm_bias, factor, residual, residual_scale, weight_in, bias_in, weight_out_, bias_out, by_slope,
               before, after] = of;
  const Tensor &x = *x_, &weight_out = *weight_out_;
  STD_TORCH_CHECK(x.dim() == 4, "pointwise_pair: x must have shape (B, C, H, W)");
  const int64_t b = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t hidden = weight_in ? weight_in->size(0) : c, out = weight_out.size(0);
  STD_TORCH_CHECK(c > 0 && hidden > 0, "pointwise_pair: x and weight_out must have input channels");
  if (weight_in) check_weight("weight_in", *weight_in, x, c);
  check_weight("weight_out", weight_out, x, hidden);
  check_vector("bias_in", bias_in, x, hidden);
  check_vector("bias_out", bias_out, x, out);
  check_vector("norm_weight", norm_weight, x, c);
  check_vector("norm_bias", norm_bias, x, c);
  check_vector("residual_scale", residual_scale, x, out);
  const auto fits = [&](const Tensor& t, int64_t channels) {
    const bool shape = t.dim() == 4 && t.size(0) == b && t.size(1) == channels && t.size(2) == h && t.size(3) == w;
    return shape && t.scalar_type() == x.scalar_type();
  };
  const bool single = h * w == 1;  // then both layouts are one
  const bool x_last = single || !x.is_contiguous(), y_last = single || !y.is_contiguous();
  const bool factor_last = factor && (single || !factor->is_contiguous());
  STD_TORCH_CHECK(is_dense(x, x_last), "pointwise_pair: x must be contiguous or channels_last");
  if (moments) check_moments("pointwise_pair", *moments, x);
  STD_TORCH_CHECK(!factor || (weight_in && fits(*factor, hidden) && is_dense(*factor, factor_last)),
                  "pointwise_pair: factor must have shape (B, hidden, H, W), in the dtype of x, contiguous or channels_last, and needs weight_in");
  STD_TORCH_CHECK(fits(y, out) && is_dense(y, y_last),
                  "pointwise_pair: y must have shape (B, out, H, W), in the dtype of x, contiguous or channels_last");
  STD_TORCH_CHECK(!residual || (fits(*residual, out) && is_dense(*residual, y_last)),
                  "pointwise_pair: residual must have shape (B, out, H, W), in the dtype and layout of y");
  for (const Tensor* written : {before, after})
    STD_TORCH_CHECK(!written || (weight_in && fits(*written, hidden) && is_dense(*written, true)), "pointwise_pair: ",
                    written == before ? "before" : "after",
                    " must have shape (B, hidden, H, W), in the dtype of x and channels_last, and needs weight_in");
  if (y.numel() == 0) return;
  const bool stream = before && before->numel() * before->element_size() >= stream_bytes;
  const auto run = [&]<class IO>(const PointwisePairEngine<IO>& engine) {
    const auto data = [](const Tensor& t) { return static_cast<const IO*>(t.data_ptr()); };
    const auto given = [&](const Tensor* t) { return t ? data(*t) : nullptr; };
    const auto written = [](const Tensor* t) { return t ? static_cast<IO*>(t->data_ptr()) : nullptr; };
    const float* of_images = moments ? static_cast<const float*>(moments->data_ptr()) : nullptr;
    const PointwisePair<IO> op{b * h * w, h * w, c, hidden, out, x_last, y_last, factor_last, by_slope, stream, data(x), given(factor),
                               given(residual), given(residual_scale), given(weight_in), given(bias_in), data(weight_out), given(bias_out),
                               of_images, given(norm_weight), given(norm_bias), static_cast<IO*>(y.data_ptr()), written(before),
                               written(after)};
    parallel(1, op.vectors(engine.lanes), 1, [&](int64_t begin, int64_t end) { engine.run(op, begin, end); });
  };
  if (x.scalar_type() == ScalarType::Float) run(kernels().f32);
  else if (x.scalar_type() == ScalarType::BFloat16) run(bf16_engine());
  else STD_TORCH_CHECK(false, "pointwise_pair: x must be float32 or bfloat16");
}

Tensor transposed_weight(const Tensor& weight) {
  check_weight("weight", weight, weight, weight.dim() == 2 ? weight.size(1) : 0);
  Tensor to = empty(std::array{weight.size(1), weight.size(0)}, weight.scalar_type());
  transpose(to, weight, 1, weight.size(0), weight.size(1));
  return to;
}

void to_channels_last(const Tensor& y, const Tensor& x) {
  STD_TORCH_CHECK(x.size(1) % pointwise_pair_channels == 0, "pointwise_pair: channels must be a multiple of ", pointwise_pair_channels);
  transpose(y, x, x.size(0), x.size(1), x.size(2) * x.size(3));
}

void add_product(const Tensor& y, const Tensor& a, const Tensor& b) {
  const auto run = [&]<class IO>(void (*kernel)(const IO*, const IO*, IO*, int64_t)) {
    constexpr int64_t grain = 16384, step = 1024;
    const int64_t n = y.numel();
    parallel(grain, (n + step - 1) / step, step, [&](int64_t begin, int64_t end) {
      const auto from = [&](const Tensor& t) { return static_cast<IO*>(t.data_ptr()) + begin * step; };
      kernel(from(a), from(b), from(y), (end * step < n ? end * step : n) - begin * step);
    });
  };
  if (y.scalar_type() == ScalarType::Float) run(kernels().f32_add_product);
  else run(kernels().bf16_add_product);
}

void image_moments_into(const Tensor& out, const Tensor& x, double eps) {
  STD_TORCH_CHECK(is_dense(x, !x.is_contiguous()), "image_moments: x must be contiguous or channels_last");
  const int64_t b = x.size(0), n = x.size(1) * x.size(2) * x.size(3);
  const auto run = [&]<class IO>(Moments (*kernel)(const IO*, int64_t)) {
    const IO* data = static_cast<const IO*>(x.data_ptr());
    float* moments = static_cast<float*>(out.data_ptr());
    parallel(1, b, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Moments found = kernel(data + i * n, n);
        moments[2 * i] = static_cast<float>(found.mean);
        moments[2 * i + 1] = static_cast<float>(1 / std::sqrt(found.spread / n + eps));
      }
    });
  };
  if (x.scalar_type() == ScalarType::Float) run(kernels().f32_moments);
  else if (x.scalar_type() == ScalarType::BFloat16) run(kernels().bf16_moments);
  else STD_TORCH_CHECK(false, "image_moments: x must be float32 or bfloat16");
}

}  // namespace spanet

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CPU, m) {
  m.impl("pointwise_pair", spanet::boxed<&spanet::pointwise_pair>);
  m.impl("pointwise_mlp_backward", spanet::boxed<&spanet::pointwise_mlp_backward>);
  m.impl("image_moments", spanet::boxed<&spanet::image_moments>);
}
