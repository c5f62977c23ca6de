// The operators that others of this folder are made of, with memory for their results. What they refuse they refuse before they write.
#pragma once

#include "cpu/tensor.h"

namespace spanet {

// y = F(x) + a o b, F(x) where there are no a and b. Of x = W^T c the modes of c, as mode_rows_into gives them without a profile, and W, of the
// dtype of x and contiguous, save the sums over x. added is written, what mode_rows_into gives with the profile. With any of it all are
// channels_last, float32 or bfloat16.
struct BesideFilter {
  const Tensor *a = nullptr, *b = nullptr, *modes = nullptr, *weight = nullptr, *added = nullptr;
};
// y and z have the shape, dtype and layout of x. y may be x.
void radial_filter_into(const Tensor& y, const Tensor& x, const Tensor& base, const Tensor& gain, int64_t radius_squared,
                        const BesideFilter& of = {});
void axial_conv_into(const Tensor& z, const Tensor& x, const Tensor& row_weight, const Tensor& row_bias, const Tensor& column_weight,
                     const Tensor& column_bias);

// How many modes K the disc has on planes like those of x.
int64_t mode_count(const Tensor& x, int64_t radius_squared);

// rows (B K, C), contiguous: <x, phi_k>, or <x o factor, phi_k>, of the modes inside the disc, none of them normalised, and with a profile
// what F adds of each, gain_k <x, phi_k> / |phi_k|^2; x and factor are channels_last, float32 or bfloat16.
void mode_rows_into(const Tensor& rows, const Tensor& x, const Tensor* factor, const Tensor* base, const Tensor* gain, int64_t radius_squared);

// The gradients of radial_filter to base and gain.
std::tuple<Tensor, Tensor> radial_filter_backward(const Tensor& grad, const Tensor& x, int64_t radius_squared);

// Those of axial_conv to x, of its shape, dtype and layout, and to row_weight, row_bias, column_weight and column_bias.
using AxialConvGrads = std::array<Tensor, 4>;
AxialConvGrads axial_conv_backward_into(const Tensor& x_grad, const Tensor& grad, const Tensor& x, const Tensor& row_weight,
                                        const Tensor& row_bias, const Tensor& column_weight);

// moments (B, 2), float32 and contiguous.
void image_moments_into(const Tensor& moments, const Tensor& x, double eps);

// The operands of pointwise_pair; nullptr for what is not there.
struct PairOperands {
  const Tensor *x = nullptr, *moments = nullptr, *norm_weight = nullptr, *norm_bias = nullptr, *factor = nullptr, *residual = nullptr;
  const Tensor *residual_scale = nullptr, *weight_in = nullptr, *bias_in = nullptr, *weight_out = nullptr, *bias_out = nullptr;
  bool by_slope = false;                               // gelu'(factor) is the factor
  const Tensor *before = nullptr, *after = nullptr;  // what the second product multiplies, before its GELU or factor and after, is written
};
void pointwise_pair_into(const Tensor& y, const PairOperands& of);

// The transpose of a weight of pointwise_pair.
Tensor transposed_weight(const Tensor& weight);

// y = x, of one shape, y channels_last and x contiguous, float32 or bfloat16, as many channels as pointwise_pair takes.
void to_channels_last(const Tensor& y, const Tensor& x);

// y += a o b, of one shape, dtype and layout, float32 or bfloat16.
void add_product(const Tensor& y, const Tensor& a, const Tensor& b);

// A side of outer_sum: data, or data o factor, or gelu(data), or its columns scaled, in float32.
struct OuterOperand {
  const Tensor *data = nullptr, *factor = nullptr;
  bool gelu = false;
  const Tensor* scale = nullptr;
};
// out (D, C) and sums (D,), or nullptr, float32 and contiguous; added to, or written.
void outer_sum_into(const Tensor& out, const Tensor* sums, const OuterOperand& left, const OuterOperand& right, bool add);

}  // namespace spanet
