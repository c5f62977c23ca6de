// mixer_branch and mixer_branch_backward on the CPU: the mixer of SPANet and its gradients, of the operators that they consist of.
//
//   t = W_in norm(x) + b_in    z = axial_conv(t)    y = scale o residual + W_out (z o (W F(z) + b)) + b_out
//
// They take a few images at a time, so that what they write between the first product and the last stays in the cache.

#include <algorithm>
#include <bit>
#include <memory>

#include "cpu/dispatch.h"
#include "cpu/operators.h"

namespace spanet {
namespace {

// Of a map of the images that are taken at a time, or of one image.
constexpr int64_t part_bytes = int64_t{2} << 20;
constexpr int64_t backward_part_bytes = int64_t{3} << 18;  // of more maps that are in use

// So many images of x from one on.
Tensor images_of(const Tensor& x, int64_t first, int64_t images) {
  char* data = static_cast<char*>(x.data_ptr()) + first * x.stride(0) * x.element_size();
  return over(data, std::array{images, x.size(1), x.size(2), x.size(3)}, std::array{x.stride(0), x.stride(1), x.stride(2), x.stride(3)},
              x.scalar_type());
}

// So many rows of a contiguous matrix from one on.
Tensor some_rows(const Tensor& matrix, int64_t first, int64_t rows) {
  const int64_t columns = matrix.size(1);
  char* data = static_cast<char*>(matrix.data_ptr()) + first * columns * matrix.element_size();
  return over(data, std::array{rows, columns}, std::array{columns, int64_t{1}}, matrix.scalar_type());
}

// A weight of the axial convolution as (C, k), without the axes of length 1 that a convolution's has, or a bias; bfloat16 in float32.
Tensor taps_of(const Tensor& value) {
  STD_TORCH_CHECK(value.dim() > 0 && value.is_contiguous(), "mixer_branch: weights and biases of the axial convolution must be contiguous");
  const int64_t channels = value.size(0), taps = channels ? value.numel() / channels : 0;
  const auto shaped = [&]<size_t N>(const std::array<int64_t, N>& sizes, const std::array<int64_t, N>& strides) {
    if (value.scalar_type() != ScalarType::BFloat16) return over(value.data_ptr(), sizes, strides, value.scalar_type());
    Tensor wide = empty(sizes, strides, ScalarType::Float);
    const Bf16* from = static_cast<const Bf16*>(value.data_ptr());
    float* to = static_cast<float*>(wide.data_ptr());
    for (int64_t i = 0; i < channels * taps; ++i) to[i] = std::bit_cast<float>(uint32_t{from[i].bits} << 16);
    return wide;
  };
  return value.dim() == 1 ? shaped(std::array{channels}, std::array{int64_t{1}})
                          : shaped(std::array{channels, taps}, std::array{taps, int64_t{1}});
}

// K, the modes of F, or 0 where they are not few beside pixels.
int64_t few_modes_of(const Tensor& x, int64_t radius_squared) {
  const int64_t modes = radius_squared < 0 ? 0 : mode_count(x, radius_squared);
  return 8 * modes <= x.size(2) * x.size(3) ? modes : 0;
}

// Returns, where t is wanted, what F adds of the few modes of z, (B K, C), which the gradients take.
Tensor mixer_branch(const Tensor& y, const std::optional<Tensor>& t, const std::optional<Tensor>& context, const Tensor& x,
                  const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps,
                  const std::optional<Tensor>& residual, const std::optional<Tensor>& residual_scale, const Tensor& in_weight,
                  const Tensor& in_bias, const Tensor& row_taps, const Tensor& row_addend, const Tensor& column_taps,
                  const Tensor& column_addend, const Tensor& weight, const Tensor& bias, const Tensor& base, const Tensor& gain,
                  const Tensor& out_weight, const Tensor& out_bias, int64_t radius_squared) {
  STD_TORCH_CHECK(x.dim() == 4, "mixer_branch: x must have shape (B, C, H, W)");
  check_like("mixer_branch", "y", y, x);
  if (t) check_like("mixer_branch", "t", *t, x);
  if (context) check_like("mixer_branch", "context", *context, x);
  if (residual) check_like("mixer_branch", "residual", *residual, x);
  const int64_t images = x.size(0), modes = x.numel() && t ? few_modes_of(x, radius_squared) : 0;
  Tensor added = empty(std::array{modes ? images * modes : 0, modes ? x.size(1) : 0}, ScalarType::Float);
  if (x.numel() == 0) return added;
  const Tensor row_weight = taps_of(row_taps), row_bias = taps_of(row_addend);
  const Tensor column_weight = taps_of(column_taps), column_bias = taps_of(column_addend);
  const int64_t image_bytes = x.numel() / images * x.element_size();
  const int64_t parts = std::min(images, (images * image_bytes + part_bytes - 1) / part_bytes), step = (images + parts - 1) / parts;
  const Tensor t_map = empty_channels_last(x, t && radius_squared < 0 ? 0 : step), z_map = empty_channels_last(x, step);
  std::optional<Tensor> moments;
  if (norm_weight) moments.emplace(empty(std::array{step, int64_t{2}}, ScalarType::Float));
  for (int64_t first = 0; first < images; first += step) {
    const int64_t count = std::min(step, images - first);
    const Tensor from = images_of(x, first, count), to = images_of(y, first, count);
    const Tensor projected = images_of(t ? *t : t_map, t ? first : 0, count), z = images_of(z_map, 0, count);
    std::optional<Tensor> rest, gated;
    if (residual) rest.emplace(images_of(*residual, first, count));
    if (context) gated.emplace(images_of(*context, first, count));
    if (moments && count < step) moments.emplace(empty(std::array{count, int64_t{2}}, ScalarType::Float));
    if (moments) image_moments_into(*moments, from, eps);
    pointwise_pair_into(projected, {.x = &from, .moments = pointer_to(moments), .norm_weight = pointer_to(norm_weight),
                                    .norm_bias = pointer_to(norm_bias), .weight_out = &in_weight, .bias_out = &in_bias});
    axial_conv_into(z, projected, row_weight, row_bias, column_weight, column_bias);
    std::optional<Tensor> filtered;  // where t was, unless that is wanted
    if (radius_squared >= 0) {
      filtered.emplace(images_of(t_map, 0, count));
      std::optional<Tensor> of_z;
      if (modes) of_z.emplace(some_rows(added, first * modes, count * modes));
      radial_filter_into(*filtered, z, base, gain, radius_squared, {.added = pointer_to(of_z)});
    }
    pointwise_pair_into(to, {.x = filtered ? &*filtered : &z, .factor = &z, .residual = pointer_to(rest),
                             .residual_scale = pointer_to(residual_scale), .weight_in = &weight, .bias_in = &bias,
                             .weight_out = &out_weight, .bias_out = &out_bias, .before = pointer_to(gated)});
  }
  return added;
}

// (B H W, C) of a channels_last map.
Tensor rows_of(const Tensor& x) {
  const int64_t c = x.size(1);
  return over(x.data_ptr(), std::array{x.size(0) * x.size(2) * x.size(3), c}, std::array{c, int64_t{1}}, x.scalar_type());
}

Tensor empty_gradient(const Tensor& like) {
  return like.dim() == 1 ? empty(std::array{like.size(0)}, ScalarType::Float)
                         : empty(std::array{like.size(0), like.size(1)}, ScalarType::Float);
}

// sum += more, or more where there is no sum yet.
void add_or_take(std::optional<Tensor>& sum, Tensor more) {
  if (!sum) return void(sum.emplace(std::move(more)));
  float* to = static_cast<float*>(sum->data_ptr());
  const float* from = static_cast<const float*>(more.data_ptr());
  for (int64_t i = 0, n = sum->numel(); i < n; ++i) to[i] += from[i];
}

using TwelveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// With c = z o W_out^T g and the context, ctx = W F(z) + b:
//
//   z_grad = F(W^T c) + W_out^T g o ctx    W_grad = sum c F(z)^T    W_out_grad = sum g (z o ctx)^T    W_in_grad = sum t_grad x^T
//
// Where modes are few beside pixels F(z) is not computed for it: sum c F(z)^T = sum c (base o z)^T + sum_k <c, phi_k> (gain_k o <z, phi_k>)^T
// over the modes of every image.
// With a negative radius_squared F is the identity: weight has taken base in. Where all images are taken at once nothing lives longer than
// it is needed.
TwelveTensors mixer_branch_backward(const Tensor& x_grad, const Tensor& grad, const Tensor& x, const Tensor& t, const Tensor& context,
                                    const Tensor& added, const Tensor& in_weight, const Tensor& row_weight, const Tensor& row_bias,
                                    const Tensor& column_weight, const Tensor& column_bias, const Tensor& weight, const Tensor& bias,
                                    const Tensor& base, const Tensor& gain, const Tensor& out_weight, int64_t radius_squared,
                                    bool profile_learns) {
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "mixer_branch_backward: x must have shape (B, C, H, W) and elements");
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == x.size(1), "mixer_branch_backward: bias must have shape (C,)");
  for (const Tensor* square : {&in_weight, &weight, &out_weight})
    STD_TORCH_CHECK(square->dim() == 2 && square->size(0) == x.size(1) && square->size(1) == x.size(1),
                    "mixer_branch_backward: in_weight, weight and out_weight must have shape (C, C)");
  check_like("mixer_branch_backward", "x_grad", x_grad, x);
  check_like("mixer_branch_backward", "grad", grad, x);
  check_like("mixer_branch_backward", "t", t, x);
  check_like("mixer_branch_backward", "context", context, x);
  for (const Tensor* kept : {&t, &context})
    STD_TORCH_CHECK(is_channels_last(*kept) || x.size(2) * x.size(3) == 1, "mixer_branch_backward: t and context must be channels_last");
  const int64_t images = x.size(0), c = x.size(1), image_bytes = images ? x.numel() / images * x.element_size() : 0;
  const int64_t most = std::max(backward_part_bytes, c * c * x.element_size());  // as many positions as channels are worth a sum of products
  const int64_t parts = std::max<int64_t>(1, std::min(images, (images * image_bytes + most - 1) / most)), step = (images + parts - 1) / parts;
  const bool filters = radius_squared >= 0;
  const int64_t pixels = x.size(2) * x.size(3), modes = few_modes_of(x, radius_squared);
  STD_TORCH_CHECK(added.numel() == 0 || (added.dim() == 2 && added.size(0) == images * modes && added.size(1) == c && added.is_contiguous() &&
                                         added.scalar_type() == ScalarType::Float),
                  "mixer_branch_backward: added must be empty, or what mixer_branch returned for x");
  const Tensor z = empty_channels_last(x, step), mixed = empty_channels_last(x, step), y_grad = empty_channels_last(x, step);
  std::optional<Tensor> in_transposed, transposed, out_transposed, in_grad[2], weight_grad[2], out_grad[2];
  const auto made = [](std::optional<Tensor>& kept, auto make) -> const Tensor& { return kept ? *kept : kept.emplace(make()); };
  const auto transpose = [&](std::optional<Tensor>& kept, const Tensor& of) -> const Tensor& {
    return made(kept, [&] { return transposed_weight(of); });
  };
  const auto done = [&](std::optional<Tensor>& kept) {
    if (parts == 1) kept.reset();
  };
  std::optional<Tensor> row[2], column[2], profile[2];
  const Tensor modes_of_c = empty(std::array{images * modes, c}, ScalarType::Float);
  const Tensor modes_of_z = added.numel() ? added.shared() : empty(std::array{images * modes, c}, ScalarType::Float);
  const bool mixes_modes = modes > 0 && modes * c <= 4 * pixels;  // to mix more of them costs more than to sum up anew
  for (int64_t first = 0; first < images; first += step) {
    const int64_t count = std::min(step, images - first);
    const bool add = first > 0;
    const auto here = [&](const Tensor& map) { return images_of(map, 0, count); };
    const auto as_rows = [&](const Tensor& given, const Tensor& map) {  // in a map that is not in use, if they are not
      Tensor part = images_of(given, first, count);
      if (is_channels_last(given)) return part;
      Tensor copy = here(map);
      to_channels_last(copy, part);
      return copy;
    };
    const Tensor g = as_rows(grad, mixed), hidden = images_of(t, first, count);
    const auto outer = [&](std::optional<Tensor>(&sums)[2], const Tensor& like, const OuterOperand& left, const OuterOperand& right) {
      const Tensor &grad = made(sums[0], [&] { return empty_gradient(like); }), &of_bias = made(sums[1], [&] { return empty_gradient(bias); });
      outer_sum_into(grad, &of_bias, left, right, add);
    };
    const Tensor zs = here(z), ms = here(mixed), ds = here(y_grad);
    const Tensor to = images_of(x_grad, first, count), ctx = images_of(context, first, count);
    const Tensor z_rows = rows_of(zs), ctx_rows = rows_of(ctx), d_rows = rows_of(ds), g_rows = rows_of(g);
    axial_conv_into(zs, hidden, row_weight, row_bias, column_weight, column_bias);
    outer(out_grad, out_weight, {&g_rows}, {&ctx_rows, &z_rows});
    pointwise_pair_into(ms, {.x = &g, .factor = &zs, .weight_in = &transpose(out_transposed, out_weight),
                             .weight_out = &transpose(transposed, weight), .before = &ds});
    done(out_transposed);
    done(transposed);
    if (filters && modes == 0) {
      const Tensor fs = empty_channels_last(x, count), f_rows = rows_of(fs);
      radial_filter_into(fs, zs, base, gain, radius_squared);
      outer(weight_grad, weight, {&d_rows, &z_rows}, {&f_rows});
    } else {
      outer(weight_grad, weight, {&d_rows, &z_rows}, {.data = &z_rows, .scale = modes ? &base : nullptr});
    }
    const Tensor modes_here = some_rows(modes_of_c, first * modes, count * modes);
    if (modes) {
      mode_rows_into(modes_here, ds, &zs, nullptr, nullptr, radius_squared);
      if (!added.numel()) mode_rows_into(some_rows(modes_of_z, first * modes, count * modes), zs, nullptr, &base, &gain, radius_squared);
    }
    if (profile_learns && filters) {
      auto [base_grad, gain_grad] = radial_filter_backward(ms, zs, radius_squared);
      add_or_take(profile[0], std::move(base_grad));
      add_or_take(profile[1], std::move(gain_grad));
    }
    const Tensor &z_grad = ms, &t_grad = zs;  // where the others are that are no longer needed
    if (filters)
      radial_filter_into(z_grad, ms, base, gain, radius_squared,
                         {.a = &ds, .b = &ctx, .modes = mixes_modes ? &modes_here : nullptr, .weight = &weight});
    else add_product(z_grad, ds, ctx);
    auto [row_grad, row_sums, column_grad, column_sums] = axial_conv_backward_into(t_grad, z_grad, hidden, row_weight, row_bias, column_weight);
    add_or_take(row[0], std::move(row_grad));
    add_or_take(row[1], std::move(row_sums));
    add_or_take(column[0], std::move(column_grad));
    add_or_take(column[1], std::move(column_sums));
    pointwise_pair_into(to, {.x = &t_grad, .weight_out = &transpose(in_transposed, in_weight)});
    done(in_transposed);
    const Tensor from = as_rows(x, y_grad), t_rows = rows_of(t_grad), x_rows = rows_of(from);
    outer(in_grad, in_weight, {&t_rows}, {&x_rows});
  }
  if (modes) outer_sum_into(*weight_grad[0], nullptr, {&modes_of_c}, {&modes_of_z}, true);
  for (std::optional<Tensor>& sum : profile)
    if (!sum) sum.emplace(empty(std::array{int64_t{0}}, ScalarType::Float));
  return {std::move(*in_grad[0]),     std::move(*in_grad[1]),     std::move(*row[0]),     std::move(*row[1]),
          std::move(*column[0]),      std::move(*column[1]),      std::move(*weight_grad[0]), std::move(*weight_grad[1]),
          std::move(*profile[0]),     std::move(*profile[1]),     std::move(*out_grad[0]), std::move(*out_grad[1])};
}

}  // namespace
}  // namespace spanet

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CPU, m) {
  m.impl("mixer_branch_backward", spanet::boxed<&spanet::mixer_branch_backward>);
  m.impl("mixer_branch", spanet::boxed<&spanet::mixer_branch>);
}
