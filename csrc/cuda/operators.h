// What the operators hand to the kernels: tensors as pointers and strides, and the launches of every dtype. No torch header and no CUDA
// header: the launches are compiled by nvcc, the operators by the host compiler.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "modes.h"

namespace spanet {

template <typename T> struct WideOf { using type = float; };
template <> struct WideOf<double> { using type = double; };
template <typename T> using Wide = typename WideOf<T>::type;  // of parameters, coefficients and sums

enum class Move : int { kElements, kWords, kRun };  // element-wise; aligned 16-byte words; one run, any alignment

struct View {  // a (B, C, H, W) tensor in global memory, strides in elements
  void* data;
  int64_t b, c, h, w;
  Move move;
};

struct Shape {
  int64_t batch, channels, height, width;
  bool channels_last;
};

struct Device {
  void* stream;
  int shared_limit;                            // bytes of shared memory that a block may have
  virtual void* allocate(int64_t bytes) = 0;   // memory that lives until the launches are done
};

inline int64_t spectrum_limit(const Shape& shape, int64_t radius_squared) {
  const int64_t u = shape.height / 2, v = shape.width / 2;
  return std::min(radius_squared, u * u + v * v);
}

inline int64_t functions(int64_t n, int64_t radius_squared) {
  return radius_squared < 0 ? 0 : axis_functions(n, std::min(radius_squared, (n / 2) * (n / 2)));  // the disc of -1 is empty
}

template <typename W>
struct Profile {  // base (C,) and gain (S, C)
  const W* base;
  const W* gain;
  int64_t base_c, gain_s, gain_c;
};

template <typename T>
struct RadialFilter {  // radial_filter.cu
  static void forward(const Shape& shape, View x, View y, const Profile<Wide<T>>& profile, int64_t radius_squared, Device& device);
  static void backward(const Shape& shape, View grad, View x, Wide<T>* base_grad, Wide<T>* gain_grad, int64_t radius_squared, Device& device);
};

template <typename T>
struct ModeCoefficients {  // mode_coefficients.cu
  static void forward(const Shape& shape, const View& x, Wide<T>* coefficients, int64_t radius_squared, Device& device);
};

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

template <typename T>
struct AxialConv {  // axial_conv.cu
  // A negative radius_squared asks for no coefficients.
  static void forward(const Shape& shape, const View& x, const View& z, const AxialWeights<Wide<T>>& weights, Wide<T>* coefficients,
                      int64_t radius_squared, Device& device);
  // gradients: of row_weight, row_bias, column_weight, column_bias.
  static void backward(const Shape& shape, const View& grad, const View& x, const View& x_grad, const AxialWeights<Wide<T>>& weights,
                       const std::array<Wide<T>*, 4>& gradients, Device& device);
};

}  // namespace spanet
