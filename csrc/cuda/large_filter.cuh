// radial_filter of planes that no other kernel keeps on chip, r^2 <= 4: sums, then
//
//   gains_kernel   z[plane][slot] = weight x gain x sum
//   large_kernel   y = base x + sum over the modes of z phi, by words and runs of rows, the last planes first: L2 still has them
//
// Sums of a contiguous plane (plane_sums_kernel): a thread keeps a word of columns, 32 rows of it, and a block adds up. Of channels_last
// (pixel_sums_kernel): a thread keeps a word of channels and walks along the columns of a few rows, every so many of a team of threads.
// 2 reads + 1 write. Measured on an H200, 8 images of 64 channels at 200 x 334, us: contiguous fp32 121 (a copy 65; before, in slices, 199),
// channels_last fp32 162 and bf16 114 (33; before 239 and 203), where 55 had been predicted for bf16 from bytes and issue slots. Planes
// that fit into a block's shared memory are left there, which is up to 1.6 times as fast.
#pragma once

#include "resident_plan.cuh"

namespace spanet {

constexpr int kLargeThreads = 256, kLargeRows = 32, kLargeColumns = 512, kAtATime = 8;
constexpr int64_t kLargeBytes = 64 << 10;  // of the rows that a block of pixel_sums_kernel walks along, about

struct Large {
  int channels, height, width;
  int words, slices, chunks;     // words of a row: of a plane, or of all channels (channels_last); blocks along rows, along words
  int rows, parts, spans, span;  // of pixel_sums_kernel: rows, and how many blocks lie side by side in columns and in channels, of `span` words
  int sums;                      // partial ones of a plane
  int shells;
  int64_t planes;
  bool channels_last;
  float weight[kSlots];          // 0 for what is no mode
};

__device__ inline Wave4 wave_of(int position, int n) {
  const int nearest = 2 * position > n ? position - n : position;
  float c, s;
  cos_sin_pi(static_cast<float>(2 * nearest) / static_cast<float>(n), &c, &s);
  return {c, s, (c - s) * (c + s), 2 * s * c};
}

// v[a][k] += function a times the values.
template <int VEC>
__device__ void add_waves(const Wave4& wave, const float (&values)[VEC], float (&v)[5][VEC]) {
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    v[0][k] += values[k];
#pragma unroll
    for (int a = 1; a < 5; ++a) v[a][k] += wave.v[a - 1] * values[k];
  }
}

// v[a][k] += function a, whose waves are given, times the words at `from` and every `pitch` elements after it.
template <typename T, int VEC>
__device__ void walk(const T* from, int64_t pitch, const Wave4* waves, int step, int count, float (&v)[5][VEC]) {
#pragma unroll 1
  for (int begin = 0; begin < count; begin += kAtATime * step, from += kAtATime * pitch) {
    Columns<T, VEC> words[kAtATime];
#pragma unroll
    for (int i = 0; i < kAtATime; ++i)
      if (begin + i * step < count) words[i].load(from + i * pitch);
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      if (begin + i * step >= count) continue;
      float values[VEC];
      words[i].get(values);
      add_waves(waves[begin + i * step], values, v);
    }
  }
}

// partial[slice][plane][slot]
template <typename T, int VEC>
__global__ void __launch_bounds__(kLargeThreads) plane_sums_kernel(const __grid_constant__ Large plan, View x, float* partial) {
  __shared__ Wave4 rows[kLargeRows];
  __shared__ float sums[kLargeThreads / 32][kSlots];
  const int slice = static_cast<int>(blockIdx.x % plan.slices), thread = threadIdx.x, lane = thread % 32;
  const int64_t plane = blockIdx.x / plan.slices, batch = plane / plan.channels, channel = plane - batch * plan.channels;
  const int first = slice * kLargeRows, count = min(kLargeRows, plan.height - first);
  for (int i = thread; i < count; i += blockDim.x) rows[i] = wave_of(first + i, plan.height);
  __syncthreads();
  float z[kSlots] = {};
  for (int word = thread; word < plan.words; word += blockDim.x) {
    float v[5][VEC] = {};
    walk(static_cast<const T*>(x.data) + batch * x.b + channel * x.c + first * x.h + word * VEC, x.h, rows, 1, count, v);
#pragma unroll
    for (int k = 0; k < VEC; ++k) add_modes({v[0][k], v[1][k], v[2][k], v[3][k], v[4][k]}, wave_of(word * VEC + k, plan.width), z);
  }
  share_sums<kSlots>(5, z);
  if (lane < 8) sums[thread / 32][2 * lane] = z[0], sums[thread / 32][2 * lane + 1] = z[1];
  __syncthreads();
  if (thread >= kSlots) return;
  float sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) sum += sums[warp][thread];
  partial[(slice * plan.planes + plane) * kSlots + thread] = sum;
}

// partial[rows][part][plane][slot]
template <typename T, int VEC>
__global__ void __launch_bounds__(kLargeThreads) pixel_sums_kernel(const __grid_constant__ Large plan, View x, float* partial) {
  __shared__ Wave4 columns[kLargeColumns];
  __shared__ float sums[kSlots][kLargeThreads];
  unsigned at = blockIdx.x;
  const auto next = [&](int count) { const unsigned index = at % count; at /= count; return static_cast<int>(index); };
  const int of_channels = next(plan.spans), part = next(plan.parts), slab = next(plan.sums / plan.parts);
  const int64_t batch = at;
  const int thread = threadIdx.x, teams = blockDim.x / plan.span, team = thread / plan.span, own = thread - team * plan.span;
  const int column = part * kLargeColumns, count = min(kLargeColumns, plan.width - column), word = of_channels * plan.span + own;
  for (int j = thread; j < count; j += blockDim.x) columns[j] = wave_of(column + j, plan.width);
  __syncthreads();
  float z[VEC][kSlots] = {};
  const bool active = team < teams && word * VEC < plan.channels;
  for (int i = slab * plan.rows; active && i < min(plan.height, (slab + 1) * plan.rows); ++i) {
    float v[5][VEC] = {};
    const T* from = static_cast<const T*>(x.data) + batch * x.b + i * x.h + (column + team) * x.w + word * VEC;
    walk(from, teams * x.w, columns + team, teams, count - team, v);
    const Wave4 wave = wave_of(i, plan.height);
#pragma unroll
    for (int k = 0; k < VEC; ++k) add_modes({v[0][k], v[1][k], v[2][k], v[3][k], v[4][k]}, wave, z[k]);
  }
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) sums[slot][thread] = z[k][slot];
    __syncthreads();
    for (int task = thread; task < plan.span * kSlots; task += blockDim.x) {
      const int slot = task % kSlots, w = task / kSlots, channel = (of_channels * plan.span + w) * VEC + k;
      float sum = 0;
      for (int t = 0; t < teams; ++t) sum += sums[slot][t * plan.span + w];
      // v is of columns here, the wave of a row: functions a and b trade places
      const int pair = slot / 2, other = slot == 9 ? 10 : slot == 10 ? 9 : pair == 2 || pair == 3 || pair >= 6 ? slot ^ 2 : slot;
      if (channel < plan.channels) partial[((slab * plan.parts + part) * plan.planes + batch * plan.channels + channel) * kSlots + other] = sum;
    }
    __syncthreads();
  }
}

// One block to a plane.
__global__ void __launch_bounds__(kLargeThreads)
    gains_kernel(const __grid_constant__ Large plan, const float* partial, Profile<float> profile, float* z) {
  constexpr int kLanes = kLargeThreads / kSlots;
  __shared__ float sums[kLanes][kSlots];
  const int64_t plane = blockIdx.x;
  const int slot = threadIdx.x % kSlots, lane = threadIdx.x / kSlots, shell = slot / 4;
  float sum = 0;
#pragma unroll 4
  for (int k = lane; k < plan.sums; k += kLanes) sum += partial[(k * plan.planes + plane) * kSlots + slot];
  sums[lane][slot] = sum;
  __syncthreads();
  if (lane > 0) return;
  for (int other = 1; other < kLanes; ++other) sum += sums[other][slot];
  const bool exists = shell < plan.shells && plan.weight[slot] != 0;
  z[plane * kSlots + slot] = exists ? plan.weight[slot] * profile.gain[shell * profile.gain_s + plane % plan.channels * profile.gain_c] * sum : 0;
}

template <typename T, int VEC>
__global__ void __launch_bounds__(kLargeThreads)
    large_kernel(const __grid_constant__ Large plan, View x, View y, const float* base, int64_t base_c, const float* z) {
  using Word = Columns<T, VEC>;
  __shared__ Wave4 rows[kLargeRows];
  const unsigned at = gridDim.x - 1 - blockIdx.x;
  const int chunk = static_cast<int>(at % plan.chunks), slice = static_cast<int>(at / plan.chunks % plan.slices);
  const int64_t part = at / plan.chunks / plan.slices;  // an image (channels_last) or a plane
  const int first = slice * kLargeRows, count = min(kLargeRows, plan.height - first), word = chunk * blockDim.x + threadIdx.x;
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
  for (int begin = 0; begin < count; begin += kAtATime, from += kAtATime * x.h, to += kAtATime * y.h) {
    Word words[kAtATime];
#pragma unroll
    for (int i = 0; i < kAtATime; ++i)
      if (begin + i < count) words[i].load(from + i * x.h);
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
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
  const int64_t limit = spectrum_limit(shape, radius_squared);
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
  const int64_t of_pixel = shape.channels / vec, words = shape.channels_last ? of_pixel * shape.width : shape.width / vec;
  Large plan{};
  plan.channels = static_cast<int>(shape.channels);
  plan.height = static_cast<int>(shape.height);
  plan.width = static_cast<int>(shape.width);
  plan.words = static_cast<int>(words);
  plan.slices = static_cast<int>(ceil_div(shape.height, kLargeRows));
  plan.chunks = static_cast<int>(ceil_div(words, kLargeThreads));
  plan.spans = static_cast<int>(ceil_div(of_pixel, kLargeThreads));
  plan.span = static_cast<int>(ceil_div(of_pixel, plan.spans));
  plan.parts = static_cast<int>(ceil_div(shape.width, kLargeColumns));
  const int64_t row_bytes = shape.channels * std::min<int64_t>(shape.width, kLargeColumns) * sizeof(T);
  plan.rows = static_cast<int>(std::min({ceil_div(kLargeBytes, row_bytes), int64_t{kLargeRows}, shape.height}));
  plan.sums = shape.channels_last ? static_cast<int>(ceil_div(shape.height, plan.rows)) * plan.parts : plan.slices;
  plan.shells = known.shells;
  plan.channels_last = shape.channels_last;
  const double areas = static_cast<double>(small.height * small.width) / static_cast<double>(shape.height * shape.width);
  for (int k = 0; k < kSlots; ++k) plan.weight[k] = static_cast<float>(known.weight[k] * areas);
  const int64_t sums_blocks = shape.channels_last ? int64_t{plan.sums} * plan.spans : shape.channels * plan.slices;
  const int64_t blocks = (shape.channels_last ? 1 : shape.channels) * plan.slices * plan.chunks, of_image = shape.channels * kSlots * sizeof(float);
  const int64_t most = std::min(kWorkspaceBytes / (of_image * plan.sums), kMaxBlocks / std::max(sums_blocks, blocks));
  const int64_t images = std::clamp<int64_t>(most, 1, shape.batch);  // of a launch
  auto* partial = static_cast<float*>(device.allocate(images * of_image * plan.sums));
  auto* z = static_cast<float*>(device.allocate(images * of_image));
  const int threads = static_cast<int>(ceil_div(ceil_div(words, plan.chunks), 32) * 32);
  const auto run = [&](auto vec_constant) {
    constexpr int VEC = decltype(vec_constant)::value;
    for (int64_t image = 0; image < shape.batch; image += images) {
      const View from = from_image(x, image, sizeof(T)), to = from_image(y, image, sizeof(T));
      const int64_t count = std::min(images, shape.batch - image);
      plan.planes = count * shape.channels;
      if (shape.channels_last) launch(pixel_sums_kernel<T, VEC>, count * sums_blocks, kLargeThreads, 0, device.stream, plan, from, partial);
      else launch(plane_sums_kernel<T, VEC>, count * sums_blocks, threads, 0, device.stream, plan, from, partial);
      launch(gains_kernel, plan.planes, kLargeThreads, 0, device.stream, plan, static_cast<const float*>(partial), profile, z);
      launch(large_kernel<T, VEC>, count * blocks, threads, 0, device.stream, plan, from, to, profile.base, profile.base_c,
             static_cast<const float*>(z));
    }
  };
  if (vec == 2) run(Constant<2>{});
  else run(Constant<1>{});
  return true;
}

}  // namespace spanet
