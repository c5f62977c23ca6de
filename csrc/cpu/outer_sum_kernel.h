// What the host function hands to the kernels of one instruction set; see outer_sum_kernel.cpp.
#pragma once

#include "cpu/half.h"

namespace spanet {

// Rows of so many columns, `stride` elements apart: data, or data o factor, or gelu(data), or columns times their scale.
template <class IO> struct OuterSide {
  int64_t columns, stride, factor_stride;
  const IO *data, *factor;
  bool gelu;
  const float* scale;
};

// out (left.columns, right.columns) is contiguous; sums (left.columns), or nullptr. Where `add`, they are added to.
template <class IO> struct OuterSum {
  int64_t rows;
  OuterSide<IO> left, right;
  float *out, *sums;
  bool add;
};

// out[left_begin, left_end) x [right_begin, right_end), in vectors of columns; the sums of those left ones.
template <class IO>
using OuterSumRun = void (*)(const OuterSum<IO>&, int64_t left_begin, int64_t left_end, int64_t right_begin, int64_t right_end);

struct OuterSumKernels {
  OuterSumRun<float> f32;
  OuterSumRun<Bf16> bf16, bf16_dot;  // the last by AVX512_BF16, or nullptr
  int64_t lanes;
};

namespace plain { extern const OuterSumKernels outer_sum_kernels; }
namespace avx2 { extern const OuterSumKernels outer_sum_kernels; }
namespace avx512 { extern const OuterSumKernels outer_sum_kernels; }

}  // namespace spanet
