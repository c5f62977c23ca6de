// What the host function hands to the kernels of one instruction set; see radial_filter_kernel.cpp.
#pragma once

#include "cpu/half.h"

namespace spanet {

// One axis of length n: its nc cosines (f = 0, 1, ...) first, then its ns sines (f = 1, 2, ...).
// The functions are not normalised, their largest value is 1: the constant is exact and costs no product.
// table has one row of nc + ns amplitudes for each of i = 0, the pairs (i, n - i) with 0 < i < n/2, and n/2 if n is even.
template <class T> struct Axis {
  int64_t n, nc, ns;
  const T* table;
  const T* functions;   // (nc + ns, n)
  const T* transposed;  // (n, padded), rows of functions^T filled up with zeros
  int64_t padded;
  int64_t count() const { return nc + ns; }
  int64_t pairs() const { return (n - 1) / 2; }
};

template <class T> struct Modes {
  Axis<T> rows, columns;
  const int32_t* shell;  // (A_H, A_W): index of the mode's shell, -1 outside the disc
  const double* scale;   // (A_H, A_W): 1 / squared norm of the mode
  int64_t shells;
};

template <class IO> struct Planes {  // (B, C, H, W) with strides in elements
  IO* data;
  int64_t b, c, h, w;
};

template <class T> struct Profile {
  const T* base;
  const T* gain;
  int64_t base_stride, gain_shell, gain_channel;
};

// How a range of work is cut: by columns, one plane after the other; by lanes, chunks of adjacent channels
// of one image; packed, chunks of channels that are first gathered side by side.
enum class Cut { columns, lanes, packed };

template <class T, class IO> struct Kernels {
  // forward over units [begin, end): planes (columns) or image x chunk (lanes, packed)
  void (*filter)(Cut, const Modes<T>&, Planes<const IO> x, Planes<IO> y, const Profile<T>&, int64_t channels, int64_t chunk, bool stream,
                 int64_t begin, int64_t end);
  // gradient of the profile over units [begin, end): channels (columns) or chunks (lanes, packed), each over all images;
  // sums is (A_H A_W + 1, C): the products of every mode, not normalised, then <grad, x>
  void (*backward)(Cut, const Modes<T>&, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t channels,
                   int64_t chunk, int64_t begin, int64_t end);
  int64_t lanes;
};

// Working memory of the calling thread, kept from call to call; aligned to 64 bytes, contents undefined.
void* thread_scratch(int64_t bytes);

#define SPANET_DECLARE_KERNELS(SIMD)           \
  namespace SIMD {                             \
  extern const Kernels<float, float> f32;      \
  extern const Kernels<float, Bf16> bf16;      \
  extern const Kernels<float, Half> f16;       \
  extern const Kernels<double, double> f64;    \
  }
SPANET_DECLARE_KERNELS(plain)
SPANET_DECLARE_KERNELS(avx2)
SPANET_DECLARE_KERNELS(avx512)

}  // namespace spanet
