// mode_coefficients, axial_conv and axial_conv_backward on the host.
#include <string>

#include "cuda/axial_conv.cuh"
#include "cuda/mode_coefficients.cuh"
#include "runner.h"

template <typename T>
std::vector<char> run(Reader& in) {
  using W = Wide<T>;
  enum { kModeCoefficients, kAxialConv, kAxialConvBackward };
  const int64_t op = in.number();
  Shape shape{};
  for (int64_t* extent : {&shape.batch, &shape.channels, &shape.height, &shape.width}) *extent = in.number();
  shape.channels_last = in.number() != 0;
  const int64_t radius_squared = in.number(), shared_limit = in.number(), alignment = in.number(), size = in.number(), count = in.number();
  std::vector<Input> inputs;
  for (int64_t k = 0; k < count; ++k) inputs.push_back(read_input(in));
  HostDevice device(shared_limit);
  const int64_t elements = shape.batch * shape.channels * shape.height * shape.width;
  const int64_t modes = shape.batch * shape.channels * functions(shape.height, radius_squared) * functions(shape.width, radius_squared);
  Memory result((elements + alignment) * sizeof(T)), coefficients(modes * sizeof(W)), gradients(2 * (size + 1) * shape.channels * sizeof(W));
  T* y = static_cast<T*>(result.bytes.get()) + alignment;
  const View out = result_view(shape, y);
  W* modes_out = static_cast<W*>(coefficients.bytes.get());
  W* gradient = static_cast<W*>(gradients.bytes.get());
  std::vector<char> bytes;
  const auto append = [&](const auto* data, int64_t n) {
    bytes.insert(bytes.end(), reinterpret_cast<const char*>(data), reinterpret_cast<const char*>(data + n));
  };
  const auto view = [&](int k, int64_t width) { return view_of(inputs[k], width); };
  const auto weights = [&](int first) {  // row_weight, row_bias, column_weight
    const Input &row = inputs[first], &bias = inputs[first + 1], &column = inputs[first + 2];
    return AxialWeights<W>{{row.data<W>(), row.strides[0], row.strides[1]}, {column.data<W>(), column.strides[0], column.strides[1]},
                           bias.data<W>(), nullptr, bias.strides[0], 0, static_cast<int>(size)};
  };
  if (op == kModeCoefficients) {
    ModeCoefficients<T>::forward(shape, view(0, sizeof(T)), modes_out, radius_squared, device);
    append(modes_out, modes);
  } else if (op == kAxialConv) {
    AxialWeights<W> all = weights(1);
    all.column_bias = inputs[4].data<W>();
    all.column_bias_c = inputs[4].strides[0];
    AxialConv<T>::forward(shape, view(0, sizeof(T)), out, all, modes_out, radius_squared, device);
    append(y, elements);
    append(modes_out, modes);
  } else {
    const int64_t channels = shape.channels, taps = channels * size;
    AxialConv<T>::backward(shape, view(0, sizeof(T)), view(1, sizeof(T)), out, weights(2),
                           {gradient, gradient + taps, gradient + taps + channels, gradient + 2 * taps + channels}, device);
    append(y, elements);
    append(gradient, 2 * (size + 1) * channels);
  }
  return bytes;
}
