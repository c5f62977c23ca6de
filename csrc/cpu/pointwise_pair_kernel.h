// What the host function hands to the kernels of one instruction set; see pointwise_pair_kernel.cpp.
#pragma once

#include "cpu/half.h"

namespace spanet {

// x (B, in, P) and factor (B, hidden, P) of one layout, y and residual (B, out, P) of another: contiguous or channels_last; factor and
// residual may be nullptr. Where all are channels_last they are one image of B P pixels. Weights (hidden, in) and (out, hidden) are
// contiguous, biases may be nullptr.
template <class IO> struct PointwisePair {
  int64_t images, pixels, in, hidden, out;
  bool x_last, y_last;
  const IO *x, *factor, *residual, *weight_in, *bias_in, *weight_out, *bias_out;
  IO* y;

  int64_t strips(int64_t strip) const { return images * strips_of_image(strip); }
  int64_t strips_of_image(int64_t strip) const { return (pixels + strip - 1) / strip; }
};

struct PointwisePairKernels {
  // strips [begin, end) of `strip` pixels of an image, the last of every image shorter
  void (*f32)(const PointwisePair<float>&, int64_t begin, int64_t end);
  void (*bf16)(const PointwisePair<Bf16>&, int64_t begin, int64_t end);
  void (*bf16_dot)(const PointwisePair<Bf16>&, int64_t begin, int64_t end);  // by AVX512_BF16, or nullptr
  int64_t strip;
};

namespace plain { extern const PointwisePairKernels pointwise_pair_kernels; }
namespace avx2 { extern const PointwisePairKernels pointwise_pair_kernels; }
namespace avx512 { extern const PointwisePairKernels pointwise_pair_kernels; }

// The channels of every tensor must be a multiple of this.
constexpr int64_t pointwise_pair_channels = 32;

}  // namespace spanet
