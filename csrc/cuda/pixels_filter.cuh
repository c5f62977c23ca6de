// radial_filter of planes of 7 x 7 and 14 x 14, r^2 <= 1: a thread owns all rows of a plane or half of them in registers; no sum across
// threads but of those halves. One read, one write.
//
// channels_last: a warp owns 32 words of channels, so that its loads are adjacent. Measured on an H200, bf16 (fp32), share of a copy's
// speed: 14 x 14 0.86 (0.96), 7 x 7 0.82 (0.94). Contiguous: 64 or 32 planes, one run of memory, pass through shared memory; 14 to 16
// instructions an element by count, where resident_filter.cuh has 23 and 54. Not measured.
#pragma once

#include "resident.cuh"

namespace spanet {

constexpr int kPixelThreads = 64;

// A row of pixels in registers: channels_last a word of VEC channels each; contiguous, of one plane, pairs of columns where they are even.
template <typename T, int VEC, int SIZE, bool LAST>
struct Pixels {
  static constexpr int kWide = LAST ? VEC : SIZE % 2 == 0 ? 2 : 1, kStep = LAST ? 1 : kWide, kWords = SIZE / kStep;
  Columns<T, kWide> words[kWords];

  __device__ void get(int j, float (&out)[VEC]) const {
    if constexpr (LAST) {
      words[j].get(out);
    } else {
      float of_word[kWide];
      words[j / kStep].get(of_word);
      out[0] = of_word[j % kStep];
    }
  }
  __device__ void set(const float (&in)[SIZE][VEC]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float of_word[kWide];
#pragma unroll
      for (int k = 0; k < kWide; ++k) of_word[k] = LAST ? in[w][k] : in[w * kStep + k][0];
      words[w].set(of_word);
    }
  }
};

template <typename T, int VEC, int SIZE, int TEAMS, bool LAST>
__global__ void __launch_bounds__(kPixelThreads, SIZE * SIZE <= 49 * TEAMS ? 8 : 6)
    pixels_kernel(const __grid_constant__ Resident plan, View x, View y, Profile<float> profile) {
  constexpr int kRows = SIZE / TEAMS, kPairs = (SIZE - 1) / 2, kPlanes = kPixelThreads / TEAMS;
  static_assert(SIZE % TEAMS == 0 && (LAST || VEC == 1));
  using Row = Pixels<T, VEC, SIZE, LAST>;
  __shared__ Pack<uint32_t, 4> memory[LAST ? 1 : kPlanes * SIZE * SIZE * sizeof(T) / 16];
  T* tile = reinterpret_cast<T*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = warp % TEAMS, place = warp / TEAMS * 32 + lane;
  const unsigned own = blockIdx.x * kPlanes + place, word = min(own, plan.planes - 1);
  const unsigned batch = word / plan.words, channel = (word - batch * plan.words) * VEC;
  const int held = static_cast<int>(min(plan.planes - blockIdx.x * kPlanes, static_cast<unsigned>(kPlanes))) * SIZE * SIZE;  // in the tile
  const auto run = [&](const View& view) { return static_cast<T*>(view.data) + static_cast<int64_t>(blockIdx.x) * kPlanes * SIZE * SIZE; };
  const auto at = [&](const View& view, int pitch, int r, int j) {  // row r of the team, column j
    if constexpr (!LAST) return tile + (place * SIZE + team * kRows + r) * SIZE + j;
    char* first = static_cast<char*>(view.data) + (batch * view.b + channel) * static_cast<int64_t>(sizeof(T));
    return reinterpret_cast<T*>(first + static_cast<int64_t>(team * kRows + r) * pitch + j * static_cast<int>(view.w * sizeof(T)));
  };
  if constexpr (!LAST) {
    const T* from = run(x);
    traverse_run<T>(
        held, 0, [&](int e, int k) { copy_word_async(tile + e, from + k); }, [&](int e, int k) { tile[e] = from[k]; });
    copies_wait();
    __syncthreads();
  }
  Row rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int w = 0; w < Row::kWords; ++w) rows[r].words[w].load(at(x, plan.pitch_x, r, w * Row::kStep));
  float base[VEC], gain[2][VEC];
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    base[k] = profile.base[(channel + k) * profile.base_c];
#pragma unroll
    for (int shell = 0; shell < 2; ++shell)
      gain[shell][k] = shell < plan.shells ? profile.gain[shell * profile.gain_s + (channel + k) * profile.gain_c] : 0;
  }

  // z: of the constant, cosine and sine along the row, cosine and sine along the column
  const Wave4* waves = plan.columns;  // of rows as well
  float z[5][VEC] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sum[3][VEC] = {};
    rows[r].get(0, sum[0]);
    rows[r].get(0, sum[1]);
#pragma unroll
    for (int j = 1; j <= kPairs; ++j) {
      float left[VEC], right[VEC];
      rows[r].get(j, left);
      rows[r].get(SIZE - j, right);
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        const float even = left[k] + right[k], odd = left[k] - right[k];
        sum[0][k] += even;
        sum[1][k] += waves[j].v[0] * even;
        sum[2][k] += waves[j].v[1] * odd;
      }
    }
    const Wave4& wave = waves[team * kRows + r];
    float middle[VEC] = {};
    if (SIZE % 2 == 0) rows[r].get(SIZE / 2, middle);
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      const float all = sum[0][k] + middle[k];
      z[0][k] += all;
      z[1][k] += sum[1][k] - middle[k];
      z[2][k] += sum[2][k];
      z[3][k] += wave.v[0] * all;
      z[4][k] += wave.v[1] * all;
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int w = 0; w < Row::kWords; ++w)
#pragma unroll
      for (auto& part : rows[r].words[w].words.v) keep(part);  // not unpacked ones
  if constexpr (TEAMS > 1) {
    __shared__ float sums[kPixelThreads / 32][5 * VEC][32];
#pragma unroll
    for (int i = 0; i < 5 * VEC; ++i) sums[warp][i][lane] = z[i / VEC][i % VEC];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 5 * VEC; ++i) {
      float sum = 0;
#pragma unroll
      for (int other = 0; other < TEAMS; ++other) sum += sums[warp - team + other][i][lane];
      z[i / VEC][i % VEC] = sum;
    }
  }
#pragma unroll
  for (int i = 0; i < 5; ++i)
#pragma unroll
    for (int k = 0; k < VEC; ++k) z[i][k] *= gain[i > 0][k] * plan.weight[i == 0 ? 0 : 3 + i];

  float along_row[SIZE][VEC];
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    along_row[0][k] = z[1][k];
    if (SIZE % 2 == 0) along_row[SIZE / 2][k] = -z[1][k];
#pragma unroll
    for (int j = 1; j <= kPairs; ++j) {
      const float even = waves[j].v[0] * z[1][k], odd = waves[j].v[1] * z[2][k];
      along_row[j][k] = even + odd;
      along_row[SIZE - j][k] = even - odd;
    }
  }
  if (LAST && own >= plan.planes) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const Wave4& wave = waves[team * kRows + r];
    float of_row[VEC], values[SIZE][VEC];
#pragma unroll
    for (int k = 0; k < VEC; ++k) of_row[k] = z[0][k] + (wave.v[0] * z[3][k] + wave.v[1] * z[4][k]);
#pragma unroll
    for (int j = 0; j < SIZE; ++j) {
      rows[r].get(j, values[j]);
#pragma unroll
      for (int k = 0; k < VEC; ++k) values[j][k] = base[k] * values[j][k] + (of_row[k] + along_row[j][k]);
    }
    rows[r].set(values);
#pragma unroll
    for (int w = 0; w < Row::kWords; ++w) rows[r].words[w].store(at(y, plan.pitch_y, r, w * Row::kStep));
  }
  if constexpr (!LAST) {
    __syncthreads();
    T* to = run(y);
    traverse_run<T>(
        held, 0, [&](int e, int k) { copy_word(to + k, tile + e); }, [&](int e, int k) { to[k] = tile[e]; });
  }
}

}  // namespace spanet
