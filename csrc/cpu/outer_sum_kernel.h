// What the host function hands to the kernels of one instruction set; see outer_sum_kernel.cpp.
#pragma once

#include <cstdint>

namespace spanet {

// left (rows, D) and right (rows, C), whose rows are so many elements apart; out (D, C) is contiguous.
struct OuterSum {
  int64_t rows, left_columns, right_columns, left_stride, right_stride;
  const float *left, *right;
  float* out;
};

struct OuterSumKernels {
  // out[left_begin, left_end) x [right_begin, right_end), in blocks of left columns and vectors of right ones
  void (*run)(const OuterSum&, int64_t left_begin, int64_t left_end, int64_t right_begin, int64_t right_end);
  int64_t block, lanes;
};

namespace plain { extern const OuterSumKernels outer_sum_kernels; }
namespace avx2 { extern const OuterSumKernels outer_sum_kernels; }
namespace avx512 { extern const OuterSumKernels outer_sum_kernels; }

}  // namespace spanet
