// radial_filter of channels_last planes up to 56 rows, r^2 <= 4: one read, one write.
//
//   pixels_kernel    r^2 <= 1, 7 x 7 and 14 x 14: a warp owns 32 words of channels, a thread its word in all rows of the plane or in
//                    half of them; no sum across threads but of those halves
//   staged_kernel    from 29 rows: a block keeps 8 words of channels in shared memory, a thread owns a word and two columns. Two blocks to
//                    a multiprocessor, one computing while the other one moves
//   channels_kernel  the others: a block owns 8 words of channels, a thread a word and a column, in registers; two barriers
#pragma once

#include "radial_filter_gains.cuh"
#include "resident.cuh"

namespace spanet {

constexpr int kPixelThreads = 64;
constexpr int kStagedThreads = kResidentWords * 28;

// The gains of every mode of so many channels, 0 for what is none.
__device__ inline void fill_gains(const Resident& plan, const Profile<float>& profile, int first, int channels, Pack<float, kSlots>* modes) {
  for (int k = threadIdx.x; k < channels * kSlots; k += blockDim.x) {
    const int c = first + k / kSlots, slot = k % kSlots, shell = slot / 4;
    const bool exists = c < plan.channels && shell < plan.shells;
    modes[k / kSlots].v[slot] = exists ? plan.weight[slot] * profile.gain[shell * profile.gain_s + c * profile.gain_c] : 0;
  }
}

template <typename T, int VEC, int SIZE, int TEAMS>
__global__ void __launch_bounds__(kPixelThreads, SIZE * SIZE <= 49 * TEAMS ? 8 : 6)
    pixels_kernel(const __grid_constant__ Resident plan, View x, View y, Profile<float> profile) {
  constexpr int kRows = SIZE / TEAMS, kPairs = (SIZE - 1) / 2;
  static_assert(SIZE % TEAMS == 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = warp % TEAMS;
  const unsigned own = blockIdx.x * (kPixelThreads / TEAMS) + warp / TEAMS * 32 + lane, word = min(own, plan.planes - 1);
  const unsigned batch = word / plan.words, channel = (word - batch * plan.words) * VEC;
  const auto at = [&](const View& view, int pitch, int r, int j) {  // row r of the team, column j
    char* first = static_cast<char*>(view.data) + (batch * view.b + channel) * static_cast<int64_t>(sizeof(T));
    return reinterpret_cast<T*>(first + static_cast<int64_t>(team * kRows + r) * pitch + j * static_cast<int>(view.w * sizeof(T)));
  };
  Columns<T, VEC> pixels[kRows][SIZE];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int j = 0; j < SIZE; ++j) pixels[r][j].load(at(x, plan.pitch_x, r, j));
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
    pixels[r][0].get(sum[0]);
    pixels[r][0].get(sum[1]);
#pragma unroll
    for (int j = 1; j <= kPairs; ++j) {
      float left[VEC], right[VEC];
      pixels[r][j].get(left);
      pixels[r][SIZE - j].get(right);
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
    if (SIZE % 2 == 0) pixels[r][SIZE / 2].get(middle);
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
  for (int i = 0; i < kRows * SIZE; ++i)
#pragma unroll
    for (auto& part : pixels[i / SIZE][i % SIZE].words.v) keep(part);  // not unpacked ones
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
  if (own >= plan.planes) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const Wave4& wave = waves[team * kRows + r];
    float of_row[VEC];
#pragma unroll
    for (int k = 0; k < VEC; ++k) of_row[k] = z[0][k] + (wave.v[0] * z[3][k] + wave.v[1] * z[4][k]);
#pragma unroll
    for (int j = 0; j < SIZE; ++j) {
      float values[VEC];
      pixels[r][j].get(values);
#pragma unroll
      for (int k = 0; k < VEC; ++k) values[k] = base[k] * values[k] + (of_row[k] + along_row[j][k]);
      Columns<T, VEC> result;
      result.set(values);
      result.store(at(y, plan.pitch_y, r, j));
    }
  }
}

template <typename T, int VEC>
__global__ void __launch_bounds__(kStagedThreads, 2)
    staged_kernel(const __grid_constant__ Resident plan, View x, View y, Profile<float> profile) {
  constexpr int kChannels = kResidentWords * VEC, kPiece = 16 / sizeof(T), kPieces = kChannels / kPiece;
  using Word = Columns<T, VEC>;
  DYNAMIC_SHARED(memory);
  auto* modes = reinterpret_cast<Pack<float, kSlots>*>(memory);  // of each channel: first the gains
  auto* columns = reinterpret_cast<Wave4*>(modes + kChannels);
  auto* sums = reinterpret_cast<float*>(columns + plan.width);
  T* tile = reinterpret_cast<T*>(sums + blockDim.x / 32 * kChannels * kSlots);  // [row][column][channel]
  const unsigned batch = blockIdx.x / plan.chunks;
  const int chunk = static_cast<int>(blockIdx.x - batch * plan.chunks) * kChannels, pitch = plan.width * kChannels;
  {
    const int place = threadIdx.x / kPieces, piece = threadIdx.x % kPieces * kPiece, rows = blockDim.x / kPieces / plan.width;
    const int row = place / plan.width, column = place - row * plan.width, channel = chunk + piece;
    const T* from = static_cast<const T*>(x.data) + batch * x.b + channel + column * x.w;
    for (int i = row; row < rows && i < plan.height; i += rows) {
      T* to = tile + i * pitch + column * kChannels + piece;
      if (channel < plan.channels) copy_word_async(to, from + i * x.h);
      else *reinterpret_cast<Pack<uint32_t, 4>*>(to) = {};
    }
  }
  const int half = (plan.width + 1) / 2, own = threadIdx.x % kResidentWords * VEC, channel = min(chunk + own, plan.channels - VEC);
  const int first = threadIdx.x / kResidentWords, j[2] = {min(first, half - 1), min(first + half, plan.width - 1)};
  const bool inside[2] = {first < half, first + half < plan.width};
  float base[VEC];
#pragma unroll
  for (int k = 0; k < VEC; ++k) base[k] = profile.base[(channel + k) * profile.base_c];
  fill_gains(plan, profile, chunk, kChannels, modes);
  copies_wait();
  load_waves(plan, columns);

  const T* word[2] = {tile + j[0] * kChannels + own, tile + j[1] * kChannels + own};
  const auto read = [&](int side, int row, float (&values)[VEC]) {
    Word from;
    from.load(word[side] + row * pitch);
    from.get(values);
  };
  float v[2][5][VEC];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    float top[VEC], middle[VEC] = {};
    read(side, 0, top);
    if (plan.middle) read(side, plan.height / 2, middle);
    start_sums(top, middle, v[side]);
  }
#pragma unroll 3
  for (int m = 1; m <= plan.pairs; ++m) {
    const Wave4 wave = plan.rows[m];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float up[VEC], low[VEC];
      read(side, m, up);
      read(side, plan.height - m, low);
      add_pair(wave, up, low, v[side]);
    }
  }
  float z[VEC * kSlots];
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    float of_columns[kSlots] = {};
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float of_word[5];
#pragma unroll
      for (int a = 0; a < 5; ++a) of_word[a] = inside[side] ? v[side][a][k] : 0;
      add_modes(of_word, columns[j[side]], of_columns);
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) z[k * kSlots + slot] = of_columns[slot];
  }
  sum_columns<VEC, kSlots>(z, sums, [&](int c, int slot, float sum) { modes[c].v[slot] *= sum; });
  __syncthreads();

  float u[2][5][VEC];
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    float of_channel[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) of_channel[slot] = modes[own + k].v[slot];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float of_word[5];
      waves_of_column(of_channel, columns[j[side]], of_word);
#pragma unroll
      for (int a = 0; a < 5; ++a) u[side][a][k] = of_word[a];
    }
  }
  const bool exists = chunk + own < plan.channels;
  char* to[2];
#pragma unroll
  for (int side = 0; side < 2; ++side)
    to[side] = static_cast<char*>(y.data) + (batch * y.b + channel + j[side] * y.w) * static_cast<int64_t>(sizeof(T));
  const auto write = [&](int side, int row, const float (&values)[VEC]) {
    Word result;
    result.set(values);
    if (exists && inside[side]) result.store(reinterpret_cast<T*>(to[side] + static_cast<int64_t>(row) * plan.pitch_y));
  };
  const auto edge = [&](int row, float sign) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float values[VEC];
      read(side, row, values);
      correct_edge(sign, base, u[side], values);
      write(side, row, values);
    }
  };
  edge(0, 1);
  if (plan.middle) edge(plan.height / 2, -1);
#pragma unroll 3
  for (int m = 1; m <= plan.pairs; ++m) {
    const Wave4 wave = plan.rows[m];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float up[VEC], low[VEC];
      read(side, m, up);
      read(side, plan.height - m, low);
      correct_pair(wave, base, u[side], up, low);
      write(side, m, up);
      write(side, plan.height - m, low);
    }
  }
}

template <typename T, int VEC, int SIZE, int KNOWN>
__global__ void __launch_bounds__((kResidentWords * SIZE + 31) / 32 * 32, SIZE <= 14 ? 6 : SIZE <= 28 ? 4 : 1)
    channels_kernel(const __grid_constant__ Resident plan, View x, View y, Profile<float> profile) {
  constexpr int kChannels = kResidentWords * VEC;
  DYNAMIC_SHARED(memory);
  auto* columns = reinterpret_cast<Wave4*>(memory);
  auto* modes = reinterpret_cast<Pack<float, kSlots>*>(columns + plan.width);  // of each channel: first the gains
  auto* sums = reinterpret_cast<float*>(modes + kChannels);
  const unsigned batch = blockIdx.x / plan.chunks;
  const int chunk = static_cast<int>(blockIdx.x - batch * plan.chunks) * kChannels;
  const int column = threadIdx.x / kResidentWords, own = threadIdx.x % kResidentWords * VEC;
  const bool inside = column < plan.width, active = inside && chunk + own < plan.channels;
  const int j = min(column, plan.width - 1), channel = min(chunk + own, plan.channels - VEC);  // threads to spare read what another one owns
  Rows<T, VEC, SIZE, KNOWN> rows;
  rows.load(plan, {plan, true, x, batch * x.b + channel + j * x.w, plan.pitch_x});
  float base[VEC];
#pragma unroll
  for (int k = 0; k < VEC; ++k) base[k] = profile.base[(channel + k) * profile.base_c];
  fill_gains(plan, profile, chunk, kChannels, modes);
  load_waves(plan, columns);

  float v[5][VEC], z[VEC * kSlots] = {};
  rows.sum(plan, v);
  rows.keep_words();
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    float of_word[5], of_column[kSlots] = {};
#pragma unroll
    for (int a = 0; a < 5; ++a) of_word[a] = inside ? v[a][k] : 0;
    add_modes(of_word, columns[j], of_column);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) z[k * kSlots + slot] = of_column[slot];
  }
  sum_columns<VEC, kSlots>(z, sums, [&](int c, int slot, float sum) { modes[c].v[slot] *= sum; });
  __syncthreads();

  float u[5][VEC];
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    float of_column[kSlots], of_word[5];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) of_column[slot] = modes[own + k].v[slot];
    waves_of_column(of_column, columns[j], of_word);
#pragma unroll
    for (int a = 0; a < 5; ++a) u[a][k] = of_word[a];
  }
  rows.apply(plan, {plan, active, y, batch * y.b + channel + j * y.w, plan.pitch_y}, base, u);
}

}  // namespace spanet
