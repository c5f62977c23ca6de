// What the host function hands to the kernels of one instruction set; see pointwise_pair_kernel.cpp.
#pragma once

#include "cpu/half.h"

namespace spanet {

// x (B, in, P), factor (B, hidden, P), y and residual (B, out, P), these two of one layout, are contiguous or channels_last. Weights
// (hidden, in) and (out, hidden) are contiguous. Only x, weight_out and y are always there; without weight_in, hidden is in and the only
// product is that of weight_out. before and after (B, hidden, P), channels_last, become g, past the caches if `stream`, and h.
template <class IO> struct PointwisePair {
  int64_t pixels, image_pixels;  // B P and P
  int64_t in, hidden, out;
  bool x_last, y_last, factor_last, by_slope, stream;
  const IO *x, *factor, *residual, *residual_scale, *weight_in, *bias_in, *weight_out, *bias_out;
  const float* moments;  // (B, 2): mean and 1 / deviation of the images of x
  const IO *norm_weight, *norm_bias;
  IO *y, *before, *after;

  int64_t vectors(int64_t lanes) const { return (pixels + lanes - 1) / lanes; }
};

// Mean and sum of squared distances from it.
struct Moments {
  double mean, spread;
};

template <class IO> struct PointwisePairEngine {
  // vectors [begin, end) of `lanes` pixels, of which the last one may have fewer
  void (*run)(const PointwisePair<IO>&, int64_t begin, int64_t end);
  int64_t lanes;
};

struct PointwisePairKernels {
  PointwisePairEngine<float> f32;
  PointwisePairEngine<Bf16> bf16, bf16_dot, bf16_tiles;  // the last two by AVX512_BF16 and AMX, or nothing
  Moments (*f32_moments)(const float* x, int64_t n);
  Moments (*bf16_moments)(const Bf16* x, int64_t n);
  // y += a o b
  void (*f32_add_product)(const float* a, const float* b, float* y, int64_t n);
  void (*bf16_add_product)(const Bf16* a, const Bf16* b, Bf16* y, int64_t n);
  // to (columns, rows), of rows [begin, end) of from, in multiples of pointwise_pair_channels
  void (*f32_transposed)(const float* from, int64_t rows, int64_t columns, int64_t begin, int64_t end, float* to);
  void (*bf16_transposed)(const Bf16* from, int64_t rows, int64_t columns, int64_t begin, int64_t end, Bf16* to);
};

namespace plain { extern const PointwisePairKernels pointwise_pair_kernels; }
namespace avx2 { extern const PointwisePairKernels pointwise_pair_kernels; }
namespace avx512 { extern const PointwisePairKernels pointwise_pair_kernels; }

// The channels of every tensor must be a multiple of this.
constexpr int64_t pointwise_pair_channels = 32;

}  // namespace spanet
