// radial_filter of planes beyond shared memory, r^2 <= 4: mode_coefficients, then
//
//   gains_kernel   z[plane][slot] = amplitude x gain x coefficient
//   large_kernel   y = base x + sum over the modes of z phi, by words and runs of rows
//
// 2 reads + 1 write. Issue slots per element in 16 bits: large_kernel 1 for the move, 1.5 for addresses, 1.5 for conversions, 5 for
// five functions and base, 3 for the waves of a column, over 32 rows: 12 of the 27 at copy speed. Measured on an H200, fp32,
// (8, 64, 200, 334): 198 us, of which mode_coefficients 120; a copy takes 65.
#pragma once

#include "resident_plan.cuh"
#include "strips_plan.cuh"

namespace spanet {

constexpr int kLargeThreads = 256, kLargeRows = 32, kRowsAtATime = 8;

struct Large {
  int channels, height, width;
  int words, slices, chunks;     // words of a row: of a plane, or of all channels (channels_last); blocks along rows, along words
  int functions_h, functions_w, shells;
  int64_t planes;
  bool channels_last;
  float amplitude[kSlots];       // 0 for what is no mode
};

__device__ inline Wave4 wave_of(int position, int n) {
  Wave4 wave;
#pragma unroll
  for (int f = 1; f <= 2; ++f) {
    const int turn = static_cast<int>(static_cast<unsigned>(f * position) % static_cast<unsigned>(n));
    const int nearest = 2 * static_cast<unsigned>(turn) > static_cast<unsigned>(n) ? turn - n : turn;
    cos_sin_pi(static_cast<float>(2 * nearest) / static_cast<float>(n), &wave.v[2 * f - 2], &wave.v[2 * f - 1]);
  }
  return wave;
}

__global__ void __launch_bounds__(kLargeThreads)
    gains_kernel(const __grid_constant__ Large plan, const float* coefficients, Profile<float> profile, float* z) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kLargeThreads + threadIdx.x, plane = k / kSlots;
  if (plane >= plan.planes) return;
  // functions a and b of each slot
  const int slot = static_cast<int>(k % kSlots), shell = slot / 4, member = slot % 4;
  const int a = shell == 1 ? (member < 2 ? 0 : member - 1) : shell == 2 ? 1 + member / 2 : shell == 3 ? (member < 2 ? 0 : member + 1) : 0;
  const int b = shell == 1 ? (member < 2 ? member + 1 : 0) : shell == 2 ? 1 + member % 2 : shell == 3 ? (member < 2 ? member + 3 : 0) : 0;
  float value = 0;
  if (shell < plan.shells && plan.amplitude[slot] != 0 && a < plan.functions_h && b < plan.functions_w)
    value = plan.amplitude[slot] * profile.gain[shell * profile.gain_s + plane % plan.channels * profile.gain_c] *
            coefficients[(plane * plan.functions_h + a) * plan.functions_w + b];
  z[k] = value;
}

template <typename T, int VEC>
__global__ void __launch_bounds__(kLargeThreads)
    large_kernel(const __grid_constant__ Large plan, View x, View y, const float* base, int64_t base_c, const float* z) {
  using Word = Columns<T, VEC>;
  __shared__ Wave4 rows[kLargeRows];
  const int chunk = static_cast<int>(blockIdx.x % plan.chunks), slice = static_cast<int>(blockIdx.x / plan.chunks % plan.slices);
  const int64_t part = blockIdx.x / plan.chunks / plan.slices;  // an image (channels_last) or a plane
  const int first = slice * kLargeRows, count = min(kLargeRows, plan.height - first), word = chunk * kLargeThreads + threadIdx.x;
  for (int i = threadIdx.x; i < count; i += blockDim.x) rows[i] = wave_of(first + i, plan.height);
  __syncthreads();
  if (word >= plan.words) return;
  const int per_pixel = plan.channels / VEC;
  const int64_t batch = plan.channels_last ? part : part / plan.channels;
  const int j = plan.channels_last ? word / per_pixel : word * VEC;
  const int channel = plan.channels_last ? (word - j * per_pixel) * VEC : static_cast<int>(part - batch * plan.channels);
  float u[5][VEC], scale[VEC];
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    const int c = plan.channels_last ? channel + k : channel;
    const auto* of_plane = reinterpret_cast<const Pack<float, 4>*>(z + (batch * plan.channels + c) * kSlots);
    float modes[kSlots], of_column[5];
#pragma unroll
    for (int slot = 0; slot < kSlots; slot += 4) {
      const Pack<float, 4> four = of_plane[slot / 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) modes[slot + i] = four.v[i];
    }
    waves_of_column(modes, wave_of(plan.channels_last ? j : j + k, plan.width), of_column);
#pragma unroll
    for (int a = 0; a < 5; ++a) u[a][k] = of_column[a];
    scale[k] = base[c * base_c];
  }
  const T* from = static_cast<const T*>(x.data) + batch * x.b + channel * x.c + j * x.w + first * x.h;
  T* to = static_cast<T*>(y.data) + batch * y.b + channel * y.c + j * y.w + first * y.h;
#pragma unroll 1
  for (int begin = 0; begin < count; begin += kRowsAtATime, from += kRowsAtATime * x.h, to += kRowsAtATime * y.h) {
    Word words[kRowsAtATime];
#pragma unroll
    for (int i = 0; i < kRowsAtATime; ++i)
      if (begin + i < count) words[i].load(from + i * x.h);
#pragma unroll
    for (int i = 0; i < kRowsAtATime; ++i) {
      if (begin + i >= count) continue;
      const Wave4 wave = rows[begin + i];
      float values[VEC];
      words[i].get(values);
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        const float even = u[0][k] + wave.v[0] * u[1][k] + wave.v[2] * u[3][k], odd = wave.v[1] * u[2][k] + wave.v[3] * u[4][k];
        values[k] = scale[k] * values[k] + (even + odd);
      }
      words[i].set(values);
      words[i].store(to + i * y.h);
    }
  }
}

// False where another kernel has to do it.
template <typename T>
bool run_large_filter(const Shape& shape, const View& x, const View& y, const Profile<float>& profile, int64_t radius_squared, Device& device) {
  const int64_t limit = spectrum_limit(shape, radius_squared), rows = functions(shape.height, limit), columns = functions(shape.width, limit);
  const auto fits = [&](int vec) {
    const auto suits = [&](const View& view) {
      return shape.channels_last ? words_in_pixels(shape, view, sizeof(T), vec) : words_in_rows(shape, view, sizeof(T), vec);
    };
    return suits(x) && suits(y);
  };
  const int vec = fits(2) ? 2 : fits(1) ? 1 : 0;
  if (vec == 0 || limit > 4 || shape.width * shape.channels > kMaxBlocks) return false;
  // as on axes of 8, where the same frequencies are doubled, but for the area
  const Shape small{shape.batch, shape.channels, std::min<int64_t>(shape.height, 8), std::min<int64_t>(shape.width, 8), false};
  const Resident known = make_resident(small, limit);
  Large plan{};
  plan.channels = static_cast<int>(shape.channels);
  plan.height = static_cast<int>(shape.height);
  plan.width = static_cast<int>(shape.width);
  plan.words = static_cast<int>((shape.channels_last ? shape.channels * shape.width : shape.width) / vec);
  plan.slices = static_cast<int>(ceil_div(shape.height, kLargeRows));
  plan.chunks = static_cast<int>(ceil_div(plan.words, kLargeThreads));
  plan.functions_h = static_cast<int>(rows);
  plan.functions_w = static_cast<int>(columns);
  plan.shells = known.shells;
  plan.planes = shape.batch * shape.channels;
  plan.channels_last = shape.channels_last;
  const double areas = static_cast<double>(small.height * small.width) / static_cast<double>(shape.height * shape.width);
  for (int k = 0; k < kSlots; ++k) plan.amplitude[k] = static_cast<float>(std::sqrt(known.weight[k] * areas));
  auto* of_planes = static_cast<float*>(device.allocate(plan.planes * rows * columns * sizeof(float)));
  auto* z = static_cast<float*>(device.allocate(plan.planes * kSlots * sizeof(float)));
  ModeCoefficients<T>::forward(shape, x, of_planes, limit, device);
  launch(gains_kernel, ceil_div(plan.planes * kSlots, kLargeThreads), kLargeThreads, 0, device.stream, plan, static_cast<const float*>(of_planes), profile,
         z);
  const int64_t of_image = (shape.channels_last ? 1 : shape.channels), blocks = int64_t{plan.slices} * plan.chunks;
  const int64_t images = std::max<int64_t>(1, kMaxBlocks / (blocks * of_image));
  for (int64_t image = 0; image < shape.batch; image += images) {
    const auto run = [&](auto kernel) {
      launch(kernel, std::min(images, shape.batch - image) * of_image * blocks, kLargeThreads, 0, device.stream, plan, from_image(x, image, sizeof(T)),
             from_image(y, image, sizeof(T)), profile.base, profile.base_c, static_cast<const float*>(z + image * shape.channels * kSlots));
    };
    if (vec == 2) run(large_kernel<T, 2>);
    else run(large_kernel<T, 1>);
  }
  return true;
}

}  // namespace spanet
