// Reductions of small planes in one read, the two lowest frequencies of either axis: mode_coefficients (r^2 <= 8), and per image and
// channel what radial_filter_backward adds up over the batch (r^2 <= 4). Threads own words as in resident_filter.cuh, but keep sums only.
//
// Predicted for an H200, issue slots per element of 56 x 56 in 16 bits: loads and addresses 1, unpacking 1, sums 3.5,
// cosines 0.5, modes 1: 7, and as many for each of two operands; 14 are there while the 2 bytes arrive. Measured on an H200, us, both
// reductions of radial_filter_backward together, bf16 (fp32), contiguous: 48 (61) for (128, 64, 56, 56), where a copy takes 26 (49);
// 55 (39), 27 (31) and 87 (55) at 28, 14 and 7: too much for what is read; some of it can be the host's.
#pragma once

#include "resident.cuh"

namespace spanet {

constexpr int kProducts = 25, kProductSlots = 32;  // functions a and b at 5 a + b

// v[a] += sum over the rows of function a times the word of one operand, or of both at a time, then with dot += x grad.
template <typename T, int VEC, bool BOTH>
__device__ void sum_words(const Resident& plan, const char* x, const char* grad, float (&v)[1 + BOTH][5][VEC], float (&dot)[VEC]) {
  using Word = Columns<T, VEC>;
  constexpr int kOperands = 1 + BOTH;
  const char* from[2] = {x, grad};
  int pitch[2] = {plan.pitch_x, plan.pitch_y};
  const auto load = [&](Word (&words)[kOperands], int row) {
#pragma unroll
    for (int k = 0; k < kOperands; ++k) words[k].load(reinterpret_cast<const T*>(from[k] + static_cast<int64_t>(row) * pitch[k]));
  };
  const auto unpack = [&](const Word (&words)[kOperands], float (&values)[kOperands][VEC]) {
#pragma unroll
    for (int k = 0; k < kOperands; ++k) words[k].get(values[k]);
    if constexpr (BOTH)
#pragma unroll
      for (int c = 0; c < VEC; ++c) dot[c] += values[0][c] * values[1][c];
  };
  Word first[kOperands], middle[kOperands];
  load(first, 0);
  if (plan.middle) load(middle, plan.height / 2);
#pragma unroll 1
  for (int begin = 1; begin <= plan.pairs; begin += kRound) {
    Word up[kRound][kOperands], low[kRound][kOperands];
#pragma unroll
    for (int m = 0; m < kRound; ++m)
      if (begin + m <= plan.pairs) {
        load(up[m], begin + m);
        load(low[m], plan.height - begin - m);
      }
#pragma unroll
    for (int m = 0; m < kRound; ++m) {
      const Wave4 wave = plan.rows[begin + m];
      float above[kOperands][VEC], below[kOperands][VEC];
      unpack(up[m], above);
      unpack(low[m], below);
#pragma unroll
      for (int k = 0; k < kOperands; ++k) add_pair(wave, above[k], below[k], v[k]);
    }
  }
  float top[kOperands][VEC], half[kOperands][VEC];
  unpack(first, top);
  unpack(middle, half);
#pragma unroll
  for (int k = 0; k < kOperands; ++k)
#pragma unroll
    for (int c = 0; c < VEC; ++c) {
      v[k][0][c] += top[k][c] + half[k][c];
      v[k][1][c] += top[k][c] - half[k][c];
      v[k][3][c] += top[k][c] + half[k][c];
    }
}

// z[5 a + b] += v[a] times function b at a column with wave w.
__device__ inline void add_products(const float (&v)[5], const Wave4& w, float* z) {
#pragma unroll
  for (int a = 0; a < 5; ++a) {
    z[5 * a] += v[a];
#pragma unroll
    for (int b = 1; b < 5; ++b) z[5 * a + b] += w.v[b - 1] * v[a];
  }
}

// Sums of the word of a thread, each multiplied by the functions of its column: COUNT for each of the planes it spans. Two operands
// have the modes of the disc, and x has <x, grad> in slot 1.
template <typename T, int VEC, bool BOTH, int COUNT, bool ACROSS>
__device__ void sums_of_word(const Resident& plan, const char* x, const char* grad, const Wave4* columns, int column, bool exists,
                             float (&z)[1 + BOTH][COUNT]) {
  constexpr int kSpan = ACROSS ? COUNT / VEC : 0;
  float v[1 + BOTH][5][VEC] = {}, dot[VEC] = {};
  sum_words<T, VEC, BOTH>(plan, x, grad, v, dot);
#pragma unroll
  for (int k = 0; k <= BOTH; ++k)
#pragma unroll
    for (int c = 0; c < VEC; ++c) {
      float sums[5], part[COUNT] = {};
#pragma unroll
      for (int a = 0; a < 5; ++a) sums[a] = exists ? v[k][a][c] : 0;
      const Wave4 wave = columns[ACROSS ? column : column + c];
      if constexpr (BOTH) {
        float modes[kSlots] = {};
        if (k == 0) modes[1] = exists ? dot[c] : 0;
        add_modes(sums, wave, modes);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) part[slot] = modes[slot];
      } else {
        add_products(sums, wave, part);
      }
#pragma unroll
      for (int slot = 0; slot < (ACROSS ? kSpan : COUNT); ++slot) z[k][c * kSpan + slot] += part[slot];
    }
}

struct ResidentPlace {  // of a thread in a contiguous tensor
  int lane, column;
  unsigned own, batch, channel;
  bool inside;

  __device__ explicit ResidentPlace(const Resident& plan) {
    lane = threadIdx.x & ((1 << plan.shift) - 1);
    own = blockIdx.x * static_cast<unsigned>(32 * kResidentWarps >> plan.shift) + (threadIdx.x >> plan.shift);
    const unsigned plane = min(own, plan.planes - 1);
    batch = plane / plan.channels;
    channel = plane - batch * plan.channels;
    inside = lane < plan.words;
  }
};

template <typename T>
__device__ const char* element(const View& view, int64_t offset) {
  return static_cast<const char*>(view.data) + offset * static_cast<int64_t>(sizeof(T));
}

// out[plane][a][b]; contiguous.
template <typename T, int VEC>
__global__ void __launch_bounds__(kResidentWarps * 32, 4) products_kernel(const __grid_constant__ Resident plan, View x, float* out) {
  DYNAMIC_SHARED(memory);
  auto* columns = reinterpret_cast<Wave4*>(memory);
  load_waves(plan, columns);
  const ResidentPlace place(plan);
  const int column = min(place.lane, plan.words - 1) * VEC;
  float z[1][kProductSlots] = {};
  sums_of_word<T, VEC, false, kProductSlots, false>(plan, element<T>(x, place.batch * x.b + place.channel * x.c + column), nullptr, columns, column,
                                                    place.inside, z);
  share_sums<kProductSlots>(plan.shift, z[0]);
  if (place.lane >= 8 || place.own >= plan.planes) return;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int slot = 4 * place.lane + k, a = slot / 5, b = slot % 5;
    if (a < plan.functions_h && b < plan.functions_w)
      out[(static_cast<int64_t>(place.own) * plan.functions_h + a) * plan.functions_w + b] = z[0][k] * plan.amplitude[slot];
  }
}

// out[image][0][channel] = <x, grad>, out[image][1 + shell][channel] = sum over the modes of the shell of their coefficients' products.
template <typename T, int VEC>
__global__ void __launch_bounds__(kResidentWarps * 32, 4) shells_kernel(const __grid_constant__ Resident plan, View x, View grad, float* out) {
  DYNAMIC_SHARED(memory);
  auto* columns = reinterpret_cast<Wave4*>(memory);
  load_waves(plan, columns);
  const ResidentPlace place(plan);
  const int column = min(place.lane, plan.words - 1) * VEC, share = place.lane & 7, shell = share / 2;
  float z[2][kSlots] = {};
  sums_of_word<T, VEC, true, kSlots, false>(plan, element<T>(x, place.batch * x.b + place.channel * x.c + column),
                                            element<T>(grad, place.batch * grad.b + place.channel * grad.c + column), columns, column,
                                            place.inside, z);
  share_sums<kSlots>(plan.shift, z[0]);
  share_sums<kSlots>(plan.shift, z[1]);
  float sum = plan.weight[2 * share] * (z[0][0] * z[1][0]);
  if (share > 0) sum += plan.weight[2 * share + 1] * (z[0][1] * z[1][1]);
  sum += exchange(sum, 1);
  if (place.lane >= 8 || place.own >= plan.planes) return;
  float* row = out + static_cast<int64_t>(place.batch) * (1 + plan.shells) * plan.channels + place.channel;
  if (share == 0) row[0] = z[0][1];
  if (share % 2 == 0 && shell < plan.shells) row[(1 + shell) * static_cast<int64_t>(plan.channels)] = sum;
}

struct ChannelsPlace {  // of a thread in a channels_last tensor
  unsigned batch;
  int chunk, own, column, channel, j;
  bool inside;

  __device__ ChannelsPlace(const Resident& plan, int vec) {
    batch = blockIdx.x / plan.chunks;
    chunk = static_cast<int>(blockIdx.x - batch * plan.chunks) * kResidentWords * vec;
    column = threadIdx.x / kResidentWords;
    own = threadIdx.x % kResidentWords * vec;
    inside = column < plan.width;
    j = min(column, plan.width - 1);
    channel = min(chunk + own, plan.channels - vec);
  }
};

// products_kernel of channels_last tensors.
template <typename T, int VEC>
__global__ void __launch_bounds__(kResidentWords* kResidentColumns)
    channels_products_kernel(const __grid_constant__ Resident plan, View x, float* out) {
  DYNAMIC_SHARED(memory);
  auto* columns = reinterpret_cast<Wave4*>(memory);
  load_waves(plan, columns);
  const ChannelsPlace place(plan, VEC);
  float z[1][VEC * kProductSlots] = {};
  sums_of_word<T, VEC, false, VEC * kProductSlots, true>(plan, element<T>(x, place.batch * x.b + place.channel + place.j * x.w), nullptr, columns,
                                                         place.j, place.inside, z);
  sum_columns<VEC, kProductSlots>(z[0], reinterpret_cast<float*>(columns + plan.width), [&](int c, int slot, float sum) {
    const int a = slot / 5, b = slot % 5;
    if (place.chunk + c >= plan.channels || a >= plan.functions_h || b >= plan.functions_w) return;
    const int64_t plane = static_cast<int64_t>(place.batch) * plan.channels + place.chunk + c;
    out[(plane * plan.functions_h + a) * plan.functions_w + b] = sum * plan.amplitude[slot];
  });
}

// shells_kernel of channels_last tensors.
template <typename T, int VEC>
__global__ void __launch_bounds__(kResidentWords* kResidentColumns)
    channels_shells_kernel(const __grid_constant__ Resident plan, View x, View grad, float* out) {
  constexpr int kChannels = kResidentWords * VEC;
  DYNAMIC_SHARED(memory);
  auto* columns = reinterpret_cast<Wave4*>(memory);
  auto* modes = reinterpret_cast<Pack<float, kSlots>*>(columns + plan.width);  // of each channel
  auto* sums = reinterpret_cast<float*>(modes + kChannels);
  load_waves(plan, columns);
  const ChannelsPlace place(plan, VEC);
  float z[2][VEC * kSlots] = {};
  sums_of_word<T, VEC, true, VEC * kSlots, true>(plan, element<T>(x, place.batch * x.b + place.channel + place.j * x.w),
                                                 element<T>(grad, place.batch * grad.b + place.channel + place.j * grad.w), columns, place.j,
                                                 place.inside, z);
  sum_columns<VEC, kSlots>(z[0], sums, [&](int c, int slot, float sum) { modes[c].v[slot] = sum; });
  __syncthreads();
  sum_columns<VEC, kSlots>(z[1], sums, [&](int c, int slot, float sum) {
    if (slot != 1) modes[c].v[slot] *= sum * plan.weight[slot];
  });
  __syncthreads();
  for (int k = threadIdx.x; k < kChannels * (1 + plan.shells); k += blockDim.x) {
    const int c = k % kChannels, row = k / kChannels, first = 4 * (row - 1);
    if (place.chunk + c >= plan.channels) continue;
    float sum = row < 2 ? modes[c].v[row == 0] : modes[c].v[first] + modes[c].v[first + 1] + (modes[c].v[first + 2] + modes[c].v[first + 3]);
    out[(static_cast<int64_t>(place.batch) * (1 + plan.shells) + row) * plan.channels + place.chunk + c] = sum;
  }
}

}  // namespace spanet
