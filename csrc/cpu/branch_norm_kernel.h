// What the host functions hand to the kernels of one instruction set; see branch_norm_kernel.cpp.
#pragma once

#include "cpu/half.h"

namespace spanet {

// Maps (images, channels, pixels), channels_last or contiguous: X the dtype of the branch, N that of its body.
template <class X, class N> struct BranchNorm {
  int64_t images, channels, pixels;
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
};

// Pixels of a block; of a contiguous map a block is a plane.
constexpr int64_t branch_norm_block = 64;

template <class X, class N> struct BranchNormKernels {
  // units [begin, end), blocks of pixels of an image, or planes where maps are contiguous
  void (*forward)(const BranchNorm<X, N>&, int64_t begin, int64_t end);
  void (*sums)(const BranchNorm<X, N>&, int64_t begin, int64_t end);
  void (*backward)(const BranchNorm<X, N>&, int64_t begin, int64_t end);
  // n += scale o x, n being f in N, written to x_grad in X
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
