// radial_filter and radial_filter_backward on the host.
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
  std::vector<Memory> workspaces;
  const auto allocate = [&](int64_t bytes) { return workspaces.emplace_back(bytes).bytes.get(); };
  const int64_t elements = shape.batch * shape.channels * shape.height * shape.width;
  if (backward) {
    Memory gradients((1 + shells) * shape.channels * sizeof(W), 0);
    W* base_grad = static_cast<W*>(gradients.bytes.get());
    run_backward<T>(shape, view_of(second, sizeof(T)), view_of(x, sizeof(T)), base_grad, base_grad + shape.channels, radius_squared, shared_limit,
                    allocate, nullptr);
    return {reinterpret_cast<char*>(base_grad), reinterpret_cast<char*>(base_grad + (1 + shells) * shape.channels)};
  }
  Memory result((elements + alignment_of_y) * sizeof(T));
  T* y = static_cast<T*>(result.bytes.get()) + alignment_of_y;
  const View out = result_view(shape, y);
  const Profile<W> profile{second.data<W>(), third.data<W>(), second.strides[0], third.strides[0], third.strides[1]};
  run_filter<T>(shape, view_of(x, sizeof(T)), out, profile, radius_squared, shared_limit, allocate, nullptr);
  return {reinterpret_cast<char*>(y), reinterpret_cast<char*>(y + elements)};
}
