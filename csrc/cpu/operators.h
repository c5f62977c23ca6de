// The operators that others of this folder are made of, with memory for their results. What they refuse they refuse before they write.
#pragma once

#include "cpu/tensor.h"

namespace spanet {

// y and z have the shape, dtype and layout of x.
void radial_filter_into(const Tensor& y, const Tensor& x, const Tensor& base, const Tensor& gain, int64_t radius_squared);
void axial_conv_into(const Tensor& z, const Tensor& x, const Tensor& row_weight, const Tensor& row_bias, const Tensor& column_weight,
                     const Tensor& column_bias);

// moments (B, 2), float32 and contiguous.
void image_moments_into(const Tensor& moments, const Tensor& x, double eps);

// The operands of pointwise_pair; nullptr for what is not there.
struct PairOperands {
  const Tensor *x = nullptr, *moments = nullptr, *norm_weight = nullptr, *norm_bias = nullptr, *factor = nullptr, *residual = nullptr;
  const Tensor *residual_scale = nullptr, *weight_in = nullptr, *bias_in = nullptr, *weight_out = nullptr, *bias_out = nullptr;
  const Tensor* before_gelu = nullptr;  // written
};
void pointwise_pair_into(const Tensor& y, const PairOperands& of);

}  // namespace spanet
