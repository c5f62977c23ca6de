// What the host functions hand to the kernels of one instruction set; see branch_norm_kernel.cpp.
#pragma once

#include "cpu/half.h"

namespace spanet {

// Pixels of a block; a contiguous map is taken plane by plane.
constexpr int64_t branch_norm_block = 64;

// Maps (images, channels, pixels), channels_last or contiguous: X the dtype of the branch, N that of its body.
template <class X, class N> struct BranchNorm {
  int64_t channels, pixels;
  bool last;
  const X* x;
  const float *moments, *weight, *bias;  // (images, 2): mean and 1 / deviation; (channels,)
  N* n;                                  // written forward, its gradient backward
  // of the sum scale o x + f: its gradient, and the scale; nullptr for no sum and no scale
  const X* sum_grad;
  const float* scale;
  X* x_grad;
  float* sums;         // (images, blocks, 3, channels): of n_grad o normal x, n_grad, sum_grad o x over the pixels of a block
  const float* slope;  // (images, 2): the means of weight o n_grad and of weight o n_grad o normal x

  // Of an image, in sums; of a contiguous map all of it.
  int64_t blocks() const { return last ? (pixels + branch_norm_block - 1) / branch_norm_block : 1; }
};

template <class X, class N> struct BranchNormKernels {
  // units [begin, end), blocks of pixels of an image, or planes where maps are contiguous
  void (*forward)(const BranchNorm<X, N>&, int64_t begin, int64_t end);
  void (*sums)(const BranchNorm<X, N>&, int64_t begin, int64_t end);
  void (*backward)(const BranchNorm<X, N>&, int64_t begin, int64_t end);
  // the sum scale o x + f, f standing in n, written to x_grad
  void (*add)(const BranchNorm<X, N>&, int64_t begin, int64_t end);
};

struct BranchNormSet {
  BranchNormKernels<float, float> f32;
  BranchNormKernels<Bf16, Bf16> bf16;
  BranchNormKernels<float, Bf16> mixed;
};

namespace plain { extern const BranchNormSet branch_norm_kernels; }
namespace avx2 { extern const BranchNormSet branch_norm_kernels; }
namespace avx512 { extern const BranchNormSet branch_norm_kernels; }

}  // namespace spanet
