// mixer_branch on the CPU: the mixer of SPANet without a gradient, of the operators that it consists of.
//
//   t = W_in norm(x) + b_in    z = axial_conv(t)    y = scale o residual + W_out (z o (W F(z) + b)) + b_out
//
// It takes a few images at a time, so that what it writes between its first product and its last stays in the cache, in memory of the
// calling thread that is there from call to call: no page of it is mapped anew.

#include <algorithm>
#include <memory>

#include "cpu/dispatch.h"
#include "cpu/operators.h"

namespace spanet {
namespace {

// Of a map of the images that are taken at a time, or of one image.
constexpr int64_t part_bytes = int64_t{2} << 20;

// (B, C, H, W) of memory that stays the caller's.
Tensor over(void* data, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& strides, ScalarType type) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(data, 4, sizes.data(), strides.data(), 0, code_of(type),
                                                                   aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// So many images of x from one on.
Tensor images_of(const Tensor& x, int64_t first, int64_t images) {
  char* data = static_cast<char*>(x.data_ptr()) + first * x.stride(0) * x.element_size();
  return over(data, {images, x.size(1), x.size(2), x.size(3)}, {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}, x.scalar_type());
}

// As many images of the shape and dtype of x as channels_last.
Tensor channels_last_over(void* data, const Tensor& x, int64_t images) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  return over(data, {images, c, h, w}, {h * w * c, 1, w * c, c}, x.scalar_type());
}

// Two maps of so many bytes, on cache lines of their own. What is larger than a part goes back when the call ends.
class Maps {
 public:
  explicit Maps(int64_t bytes) : bytes_((bytes + 63) / 64 * 64) {
    constexpr int64_t most = 2 * part_bytes;
    thread_local std::unique_ptr<char[]> kept;
    std::unique_ptr<char[]>& memory = 2 * bytes_ > most ? own_ : kept;
    if (!memory) memory = std::make_unique_for_overwrite<char[]>(std::max(2 * bytes_, most) + 64);
    first_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63});
  }
  char* operator[](int64_t i) const { return first_ + i * bytes_; }

 private:
  int64_t bytes_;
  std::unique_ptr<char[]> own_;
  char* first_;
};

void mixer_branch(const Tensor& y, const std::optional<Tensor>& t, const Tensor& x, const std::optional<Tensor>& norm_weight,
                  const std::optional<Tensor>& norm_bias, double eps, const std::optional<Tensor>& residual,
                  const std::optional<Tensor>& residual_scale, const Tensor& in_weight, const Tensor& in_bias, const Tensor& row_weight,
                  const Tensor& row_bias, const Tensor& column_weight, const Tensor& column_bias, const Tensor& weight, const Tensor& bias,
                  const Tensor& base, const Tensor& gain, const Tensor& out_weight, const Tensor& out_bias, int64_t radius_squared) {
  STD_TORCH_CHECK(x.dim() == 4, "mixer_branch: x must have shape (B, C, H, W)");
  check_like("mixer_branch", "y", y, x);
  if (t) check_like("mixer_branch", "t", *t, x);
  if (residual) check_like("mixer_branch", "residual", *residual, x);
  if (x.numel() == 0) return;
  const auto of = [](const std::optional<Tensor>& given) { return given ? &*given : nullptr; };
  const int64_t images = x.size(0), image_bytes = x.numel() / images * x.element_size();
  const int64_t parts = std::min(images, (images * image_bytes + part_bytes - 1) / part_bytes), step = (images + parts - 1) / parts;
  const Maps maps(step * image_bytes);
  std::optional<Tensor> moments;
  if (norm_weight) moments.emplace(empty(std::array{step, int64_t{2}}, ScalarType::Float));
  for (int64_t first = 0; first < images; first += step) {
    const int64_t count = std::min(step, images - first);
    const Tensor from = images_of(x, first, count), to = images_of(y, first, count);
    const Tensor projected = t ? images_of(*t, first, count) : channels_last_over(maps[0], x, count);
    const Tensor z = channels_last_over(maps[1], x, count);
    std::optional<Tensor> added;
    if (residual) added.emplace(images_of(*residual, first, count));
    if (moments && count < step) moments.emplace(empty(std::array{count, int64_t{2}}, ScalarType::Float));
    if (moments) image_moments_into(*moments, from, eps);
    pointwise_pair_into(projected, {.x = &from, .moments = of(moments), .norm_weight = of(norm_weight), .norm_bias = of(norm_bias),
                                    .weight_out = &in_weight, .bias_out = &in_bias});
    axial_conv_into(z, projected, row_weight, row_bias, column_weight, column_bias);
    std::optional<Tensor> filtered;  // where t was, unless that is wanted
    if (radius_squared >= 0) {
      filtered.emplace(channels_last_over(maps[0], x, count));
      radial_filter_into(*filtered, z, base, gain, radius_squared);
    }
    pointwise_pair_into(to, {.x = filtered ? &*filtered : &z, .factor = &z, .residual = of(added), .residual_scale = of(residual_scale),
                             .weight_in = &weight, .bias_in = &bias, .weight_out = &out_weight, .bias_out = &out_bias});
  }
}

}  // namespace
}  // namespace spanet

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CPU, m) {
  m.impl("mixer_branch", spanet::boxed<&spanet::mixer_branch>);
}
