// radial_filter and radial_filter_backward on the host.
#include "cuda/mode_coefficients.cuh"
#include "cuda/radial_filter_plan.cuh"
#include "runner.h"

template <typename T>
std::vector<char> run(Reader& in) {
  using W = Wide<T>;
  const bool backward = in.number() != 0;
  Shape shape{};
  for (int64_t* extent : {&shape.batch, &shape.channels, &shape.height, &shape.width}) *extent = in.number();
  shape.channels_last = in.number() != 0;
  const int64_t radius_squared = in.number(), shells = in.number(), shared_limit = in.number(), alignment_of_y = in.number();
  const Input x = read_input(in), second = read_input(in), third = read_input(in);
  HostDevice device(shared_limit);
  const int64_t elements = shape.batch * shape.channels * shape.height * shape.width;
  if (backward) {
    Memory gradients((1 + shells) * shape.channels * sizeof(W), 0);
    W* base_grad = static_cast<W*>(gradients.bytes.get());
    RadialFilter<T>::backward(shape, view_of(second, sizeof(T)), view_of(x, sizeof(T)), base_grad, base_grad + shape.channels, radius_squared,
                              device);
    return {reinterpret_cast<char*>(base_grad), reinterpret_cast<char*>(base_grad + (1 + shells) * shape.channels)};
  }
  Memory result((elements + alignment_of_y) * sizeof(T));
  T* y = static_cast<T*>(result.bytes.get()) + alignment_of_y;
  const View out = result_view(shape, y);
  const Profile<W> profile{second.data<W>(), third.data<W>(), second.strides[0], third.strides[0], third.strides[1]};
  RadialFilter<T>::forward(shape, view_of(x, sizeof(T)), out, profile, radius_squared, device);
  return {reinterpret_cast<char*>(y), reinterpret_cast<char*>(y + elements)};
}
