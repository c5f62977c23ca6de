// What the host function hands to the kernels of one instruction set; see axial_conv_kernel.cpp.
#pragma once

#include "cpu/radial_filter_kernel.h"

namespace spanet {

// The size of a call, and its parameters as planes: (C, k) is a plane of one row per channel, (C,) one of a single pixel.
template <class T> struct AxialConv {
  int64_t images, channels, h, w, size;
  Planes<const T> row_weight, row_bias, column_weight, column_bias;
  Modes<T> modes;  // of the coefficients; none if they are not wanted

  // Sums that backward leaves for an image and a channel: k row weights, the row bias, k column weights, the column bias.
  int64_t sums() const { return 2 * size + 2; }
};

template <class T, class IO> struct AxialConvKernels {
  // units [begin, end) of image and chunk, a chunk being up to `lanes` adjacent channels
  void (*forward)(const AxialConv<T>&, Planes<const IO> x, Planes<IO> z, Planes<T> coefficients, int64_t begin, int64_t end);
  // the same; partial is (chunks, images, sums, lanes)
  void (*backward)(const AxialConv<T>&, Planes<const IO> grad, Planes<const IO> x, Planes<IO> x_grad, double* partial, int64_t begin,
                   int64_t end);
  // the sums over images of chunks [begin, end)
  void (*sum_images)(const AxialConv<T>&, const double* partial, Planes<T> row_weight, Planes<T> row_bias, Planes<T> column_weight,
                     Planes<T> column_bias, int64_t begin, int64_t end);
  int64_t lanes;
};

SPANET_DECLARE_KERNELS(axial_conv_kernels, AxialConvKernels)

}  // namespace spanet
