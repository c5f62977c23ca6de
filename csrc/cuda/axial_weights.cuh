// Weights of axial_conv: where they are, and those of one channel in registers.
#pragma once

#include "tile.cuh"

namespace spanet {

constexpr int kTaps = 7;  // taps at a time

template <typename W>
struct Kernel {  // (C, k) weights of one axis
  const W* data;
  int64_t c, k;
};

template <typename W>
struct AxialWeights {
  Kernel<W> row, column;
  const W* row_bias;     // (C,), null for zeros
  const W* column_bias;
  int64_t row_bias_c, column_bias_c;
  int size;              // k
};

template <typename W, int K>
struct Taps {  // weights of one channel in registers
  W value[K];

  __device__ Taps(const Kernel<W>& kernel, int channel, int, bool reversed) {
#pragma unroll
    for (int d = 0; d < K; ++d) value[d] = kernel.data[channel * kernel.c + (reversed ? K - 1 - d : d) * kernel.k];
  }
  __device__ W operator[](int d) const { return value[d]; }
};

template <typename W>
struct Taps<W, 0> {  // or where they are
  const W* first;
  int64_t step;

  __device__ Taps(const Kernel<W>& kernel, int channel, int size, bool reversed)
      : first(kernel.data + channel * kernel.c + (reversed ? (size - 1) * kernel.k : 0)), step(reversed ? -kernel.k : kernel.k) {}
  __device__ W operator[](int d) const { return first[d * step]; }
};

}  // namespace spanet
