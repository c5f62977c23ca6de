// Which reductions the kernels on registers take, and their launches. Runs on the host.
#pragma once

#include "resident_modes.cuh"
#include "resident_plan.cuh"
#include "strips_plan.cuh"

namespace spanet {

// Words per thread of these operands, 0 where another kernel has to do it.
template <typename T>
int reduction_words(const Shape& shape, std::initializer_list<View> operands) {
  if (sizeof(T) == 8 || std::max(shape.height, shape.width) > kResidentColumns) return 0;
  for (int vec : {2, 1}) {
    if (shape.channels_last && vec != (sizeof(T) == 2 ? 2 : 1)) continue;
    bool fit = shape.channels_last || shape.width <= 32 * vec;
    for (const View& view : operands)
      fit = fit && (shape.channels_last ? words_in_pixels(shape, view, sizeof(T), vec) : words_in_rows(shape, view, sizeof(T), vec));
    if (fit) return vec;
  }
  return 0;
}

// Launches of a reduction; run(kernel launch arguments) gets blocks, threads, bytes of shared memory, the plan and the first image.
template <typename T, typename Run>
void reduce_resident(const Shape& shape, Resident plan, int vec, int count, bool modes, Run run) {
  const int64_t chunk = kResidentWords * vec;
  int64_t threads = 32 * kResidentWarps, floats = 4 * shape.width;
  if (shape.channels_last) {
    plan.chunks = static_cast<int>(ceil_div(shape.channels, chunk));
    threads = ceil_div(shape.width * kResidentWords, 32) * 32;
    floats += chunk * (count * threads / 32 + (modes ? kSlots : 0));
  } else {
    share_lanes(plan, static_cast<int>(shape.width) / vec);
  }
  in_images(shape, [&](int64_t image, int64_t planes) {
    plan.planes = static_cast<unsigned>(planes);
    const int64_t blocks = shape.channels_last ? planes / shape.channels * plan.chunks : ceil_div(planes, threads >> plan.shift);
    run(blocks, static_cast<int>(threads), static_cast<int>(floats * sizeof(float)), plan, image);
  });
}

// False where another kernel has to do it.
template <typename T>
bool run_resident_coefficients(const Shape& shape, const View& x, float* out, int64_t radius_squared, void* stream) {
  const int vec = reduction_words<T>(shape, {x});
  if (vec == 0 || radius_squared > 8 || radius_squared < 0) return false;
  Resident plan = make_resident(shape, radius_squared);
  plan.pitch_x = row_pitch(shape, x, sizeof(T));
  plan.functions_h = static_cast<int>(functions(shape.height, radius_squared));
  plan.functions_w = static_cast<int>(functions(shape.width, radius_squared));
  for (int k = 0; k < kProducts; ++k) {
    const auto twice = [](int64_t function, int64_t n) { return function > 0 && (function + 1) / 2 * 2 != n ? 2 : 1; };
    const double area = static_cast<double>(shape.height * shape.width);
    plan.amplitude[k] = static_cast<float>(std::sqrt(twice(k / 5, shape.height) * twice(k % 5, shape.width) / area));
  }
  const auto run = [&](auto kernel) {
    reduce_resident<T>(shape, plan, vec, kProductSlots, false, [&](int64_t blocks, int threads, int bytes, const Resident& part, int64_t image) {
      launch(kernel, blocks, threads, bytes, stream, part, from_image(x, image, sizeof(T)),
             out + image * shape.channels * plan.functions_h * plan.functions_w);
    });
    return true;
  };
  if (shape.channels_last) return run(channels_products_kernel<T, sizeof(T) == 2 ? 2 : 1>);
  return vec == 2 ? run(products_kernel<T, 2>) : run(products_kernel<T, 1>);
}

// False where another kernel has to do it.
template <typename T>
bool run_resident_backward(const Shape& shape, const View& grad, const View& x, float* base_grad, float* gain_grad, int64_t radius_squared,
                           Device& device) {
  const int vec = reduction_words<T>(shape, {x, grad});
  if (vec == 0 || spectrum_limit(shape, radius_squared) > 4) return false;
  Resident plan = make_resident(shape, radius_squared);
  plan.pitch_x = row_pitch(shape, x, sizeof(T));
  plan.pitch_y = row_pitch(shape, grad, sizeof(T));
  const int64_t row = (1 + plan.shells) * shape.channels;
  float* of_images = static_cast<float*>(device.allocate(shape.batch * row * sizeof(float)));
  const auto run = [&](auto kernel) {
    reduce_resident<T>(shape, plan, vec, kSlots, true, [&](int64_t blocks, int threads, int bytes, const Resident& part, int64_t image) {
      launch(kernel, blocks, threads, bytes, device.stream, part, from_image(x, image, sizeof(T)), from_image(grad, image, sizeof(T)),
             of_images + image * row);
    });
    const Parts<float> parts{{base_grad, gain_grad}, {shape.channels, row - shape.channels}};
    sum_partial(of_images, shape.batch, row, parts, device.stream);
    return true;
  };
  if (shape.channels_last) return run(channels_shells_kernel<T, sizeof(T) == 2 ? 2 : 1>);
  return vec == 2 ? run(shells_kernel<T, 2>) : run(shells_kernel<T, 1>);
}

}  // namespace spanet
