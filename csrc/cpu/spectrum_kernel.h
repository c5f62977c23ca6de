// What the host function hands to the kernels of one instruction set; see spectrum_kernel.cpp.
#pragma once

#include "cpu/radial_filter_kernel.h"

namespace spanet {

// Some planes (images, channels) of a map, a group of them at a time on one thread: several if they are adjacent channels of pixels that
// are evenly apart.
struct Part {
  int64_t images, channels, h, w, group = 1;
  int64_t planes() const { return images * channels; }
  int64_t groups() const { return (channels + group - 1) / group; }
};

// The half spectra of planes: (H, bins) of row transforms, and turned, so that the columns' transforms run along adjacent elements,
// (columns, H) of those bins alone whose column reaches into the disc.
struct Bins {
  int64_t h, w, columns, shells;
  const int32_t* shell;  // (columns, H): `shells` outside the disc
  int64_t bins() const { return w / 2 + 1; }
};

// Complex numbers are pairs of T. Units [begin, end) are images x groups in read and write, planes in turn and turn_back, channels in
// scale and products.
template <class T, class IO> struct SpectrumKernels {
  void (*read)(const Part&, Planes<const IO> x, T* planes, int64_t begin, int64_t end);
  void (*write)(const Part&, const T* planes, Planes<IO> y, int64_t begin, int64_t end);
  void (*turn)(const Bins&, const T* rows, T* turned, int64_t begin, int64_t end);
  // the way back; of channel c the bins that were not turned are multiplied with rest[c rest_stride]
  void (*turn_back)(const Bins&, const Part&, const T* turned, const T* rest, int64_t rest_stride, T* rows, int64_t begin, int64_t end);
  // every bin times values[c stride + its shell]
  void (*scale)(const Bins&, const Part&, const T* values, int64_t stride, T* turned, int64_t begin, int64_t end);
  // sums of conj(a) b over the bins of every shell, (channels, shells), and of p q over the planes, (channels), are added to
  void (*products)(const Bins&, const Part&, const T* a, const T* b, const T* p, const T* q, double* of_shell, double* total, int64_t begin,
                   int64_t end);
  int64_t lanes;
};

SPANET_DECLARE_KERNELS(spectrum_kernels, SpectrumKernels)

}  // namespace spanet
