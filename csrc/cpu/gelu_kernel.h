// What the host function hands to the kernels of one instruction set; see gelu_kernel.cpp.
#pragma once

#include "cpu/radial_filter_kernel.h"

namespace spanet {

// x, a and grad are (rows, columns), bias is (columns,) or null. If a gradient is wanted, sums is (blocks, width), width being columns
// rounded up to whole vectors, and all zero; else grad is null.
template <class T, class IO> struct Gelu {
  int64_t rows, columns, block, width;
  const IO *x, *bias;
  IO *a, *grad;
  T* sums;
};

template <class T, class IO> struct GeluKernels {
  void (*run)(const Gelu<T, IO>&, int64_t begin, int64_t end);  // blocks [begin, end) of so many rows
  int64_t lanes;
};

SPANET_DECLARE_KERNELS(gelu_kernels, GeluKernels)

}  // namespace spanet
