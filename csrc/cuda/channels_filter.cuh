// radial_filter of channels_last planes up to 56 rows, r^2 <= 4: one read, one write.
//
//   staged_kernel    from 29 rows: a block keeps 8 words of channels in shared memory, a thread a word and two columns. Two blocks to a
//                    multiprocessor. Measured on an H200 at 56 x 56, share of a copy's speed: 0.53 (fp32 0.62); a column to a thread and
//                    28 warps 0.48 (0.62), rows of a warp on tensor cores 0.52 (in fp32 without them 0.57), with half of the instructions
//   channels_kernel  the others: a block owns 8 words of channels, a thread a word and a column, in registers; two barriers
#pragma once

#include "radial_filter_gains.cuh"
#include "resident.cuh"

namespace spanet {

constexpr int kStagedThreads = kResidentWords * 28;

// The gains of every mode of so many channels, 0 for what is none.
__device__ inline void fill_gains(const Resident& plan, const Profile<float>& profile, int first, int channels, Pack<float, kSlots>* modes) {
  for (int k = threadIdx.x; k < channels * kSlots; k += blockDim.x) {
    const int c = first + k / kSlots, slot = k % kSlots, shell = slot / 4;
    const bool exists = c < plan.channels && shell < plan.shells;
    modes[k / kSlots].v[slot] = exists ? plan.weight[slot] * profile.gain[shell * profile.gain_s + c * profile.gain_c] : 0;
  }
}

// z += the modes of a word at a column with wave w, of its sums v over the rows.
template <int VEC>
__device__ void add_column(const float (&v)[5][VEC], bool inside, const Wave4& w, float (&z)[VEC * kSlots]) {
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    float of_word[5], of_channel[kSlots];
#pragma unroll
    for (int a = 0; a < 5; ++a) of_word[a] = inside ? v[a][k] : 0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) of_channel[slot] = z[k * kSlots + slot];
    add_modes(of_word, w, of_channel);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) z[k * kSlots + slot] = of_channel[slot];
  }
}

// u[a] of a word from the modes of its channels, at a column with wave w.
template <int VEC>
__device__ void corrections(const Pack<float, kSlots>* modes, const Wave4& w, float (&u)[5][VEC]) {
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    float of_channel[kSlots], of_word[5];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) of_channel[slot] = modes[k].v[slot];
    waves_of_column(of_channel, w, of_word);
#pragma unroll
    for (int a = 0; a < 5; ++a) u[a][k] = of_word[a];
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
  float z[VEC * kSlots] = {};
#pragma unroll
  for (int side = 0; side < 2; ++side) add_column(v[side], inside[side], columns[j[side]], z);
  sum_columns<VEC, kSlots>(z, sums, [&](int c, int slot, float sum) { modes[c].v[slot] *= sum; });
  __syncthreads();

  float u[2][5][VEC];
#pragma unroll
  for (int side = 0; side < 2; ++side) corrections(modes + own, columns[j[side]], u[side]);
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
  add_column(v, inside, columns[j], z);
  sum_columns<VEC, kSlots>(z, sums, [&](int c, int slot, float sum) { modes[c].v[slot] *= sum; });
  __syncthreads();

  float u[5][VEC];
  corrections(modes + own, columns[j], u);
  rows.apply(plan, {plan, active, y, batch * y.b + channel + j * y.w, plan.pitch_y}, base, u);
}

}  // namespace spanet
