// Weights of axial_conv and where they are.
#pragma once

#include "tile.cuh"

namespace spanet {

constexpr int kTaps = 7;  // taps at a time

template <typename W>
struct Taps {  // weights of one channel, where they are
  const W* first;
  int64_t step;

  __device__ Taps(const Kernel<W>& kernel, int channel, int size, bool reversed)
      : first(kernel.data + channel * kernel.c + (reversed ? (size - 1) * kernel.k : 0)), step(reversed ? -kernel.k : kernel.k) {}
  __device__ W operator[](int d) const { return first[d * step]; }
};

}  // namespace spanet
