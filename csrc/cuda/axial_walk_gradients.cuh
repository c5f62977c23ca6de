// Gradients of the weights of axial_conv with 7 taps in channels_last (axial_walk.cuh).
//
// A thread walks down two channels and two columns. The seven rows of g that meet t[i], and of which u[i] is made, are in registers; a row
// replaces the oldest. t, u, d row and d column: 28 multiply-adds per element. Rows arrive seven at a time while seven are computed.
// Sums of a thread are added over the slice in one order, partial sums of slices and images by a second launch.
#pragma once

#include "axial_walk.cuh"
#include "strips.cuh"

namespace spanet {

template <typename T> constexpr int kGradientColumns = sizeof(T) == 2 ? 2 : 1;  // as registers allow
constexpr int kGradientStages = 2;
constexpr int kGradients = 2 * (kTaps + 1);  // of a channel

// partial[batch and slice]: d row (C, k), d row_bias (C), d column (C, k), d column_bias (C).
template <typename T, bool WORDS>
__global__ void __launch_bounds__(kWalkThreads, WORDS ? 2 : 1)
    axial_conv_gradients_kernel(const __grid_constant__ Walk plan, View grad, View x, AxialWeights<float> weights, float* partial) {
  constexpr int N = kGradientColumns<T>, kBand = kTaps;
  DYNAMIC_SHARED(memory);
  const Walker<N> own(plan);
  T* const tile = reinterpret_cast<T*>(own.memory(plan, memory));
  const int begin = own.row - kWalkHalo, end = own.row + own.rows + kWalkHalo;  // rows of g; x follows three rows behind
  const Rows<T, N, 0, WORDS> of_grad(plan, own, grad, tile);
  const Rows<T, N, kWalkHalo, WORDS> of_x(plan, own, x, tile + plan.stage_rows * plan.pitch_without_halo);
  const auto load = [&](int band) {
    const int first = begin + band * kBand, at = band % kGradientStages * kBand;
    of_grad.load(plan, own, grad, first, kBand, max(begin, 0), min(end, plan.height), at);
    of_x.load(plan, own, x, first - kWalkHalo, kBand, own.row, own.row + own.rows, at);
  };
  load(0);
  const int channel = own.active ? own.channel + 2 * own.pair : 0;
  const PairTaps row(weights.row, channel, plan.channels, false), column(weights.column, channel, plan.channels, false);
  float row_bias[2], g[kTaps][N][2] = {}, of_row[kTaps + 1][2] = {}, of_column[kTaps + 1][2] = {};
  load_bias(weights.row_bias, weights.row_bias_c, channel, plan.channels, row_bias);
#pragma unroll 1
  for (int band = 0; begin + band * kBand < end; ++band) {
    copies_wait();
    __syncthreads();
    load(band + 1);
    if (!own.active) continue;
    const T* grads = of_grad.of(plan, own, band % kGradientStages * kBand);
    const T* elements = of_x.of(plan, own, band % kGradientStages * kBand);
#pragma unroll
    for (int k = 0; k < kBand; ++k) {
      const int i = begin + band * kBand + k, j = i - kWalkHalo;
      const bool exists = i >= 0 && i < plan.height;
#pragma unroll
      for (int v = 0; v < N; ++v) {
        if (exists) load_pair(grads + k * plan.pitch_without_halo + walk_slot<T, N>(v), g[k][v]);
        else g[k][v][0] = g[k][v][1] = 0;
      }
      if (j < own.row || j >= own.row + own.rows) continue;
      float window[N + kTaps - 1][2];
#pragma unroll
      for (int e = 0; e < N + kTaps - 1; ++e) load_pair(elements + k * plan.pitch + walk_slot<T, N>(e), window[e]);
#pragma unroll
      for (int v = 0; v < N; ++v)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float t = row_bias[c], u = 0;
#pragma unroll
          for (int d = 0; d < kTaps; ++d) t += row.value[d][c] * window[v + d][c];
#pragma unroll
          for (int d = 0; d < kTaps; ++d) {
            const float meets = g[(k - d + kTaps) % kTaps][v][c];  // row j - d + 3
            u += column.value[d][c] * meets;
            of_column[d][c] += t * meets;
          }
#pragma unroll
          for (int d = 0; d < kTaps; ++d) of_row[d][c] += u * window[v + d][c];
          of_row[kTaps][c] += u;
          of_column[kTaps][c] += g[(k - kWalkHalo + kTaps) % kTaps][v][c];
        }
    }
  }
  copies_wait();
  __syncthreads();
  const int threads = plan.groups * kWalkPairs;
  float* const sums = reinterpret_cast<float*>(tile);  // [value][channel of the pair][thread]
#pragma unroll
  for (int k = 0; k < kGradients; ++k)
#pragma unroll
    for (int c = 0; c < 2; ++c) sums[(2 * k + c) * threads + own.thread] = own.active ? (k <= kTaps ? of_row[k % (kTaps + 1)][c] : of_column[k % (kTaps + 1)][c]) : 0.f;
  __syncthreads();
  if (!own.unit) return;
  float* const out = partial + (static_cast<int64_t>(own.batch) * plan.slices() + own.slice) * kGradients * plan.channels;
#pragma unroll 1
  for (int at = own.thread; at < kGradients * kUnitChannels; at += threads) {
    const int k = at / kUnitChannels, c = at % kUnitChannels, d = k % (kTaps + 1);
    if (own.channel + c >= plan.channels) continue;
    const float* from = sums + (2 * k + c % 2) * threads + c / 2;
    float sum = 0;
    for (int group = 0; group < plan.groups; ++group) sum += from[group * kWalkPairs];
    float* to = out + (k <= kTaps ? 0 : static_cast<int64_t>(plan.channels) * (kTaps + 1));
    if (d < kTaps) to[static_cast<int64_t>(own.channel + c) * kTaps + d] = sum;
    else to[static_cast<int64_t>(plan.channels) * kTaps + own.channel + c] = sum;
  }
}

template <typename T>
Walk gradients_walk(const Shape& shape) {
  Walk plan = make_walk<T, kGradientColumns<T>>(shape);
  plan.stage_rows = kGradientStages * kTaps;
  const int tiles = plan.stage_rows * (plan.pitch + plan.pitch_without_halo) * static_cast<int>(sizeof(T));
  plan.unit_bytes = std::max<int>(tiles, kGradients * 2 * plan.groups * kWalkPairs * sizeof(float));
  plan.bytes = plan.together * plan.unit_bytes;
  return plan;
}

// Sums of images and slices into partial, which has 16 C numbers for each.
template <typename T>
void launch_gradients(const Shape& shape, const View& grad, const View& x, const AxialWeights<float>& weights, float* partial, void* stream) {
  Walk plan = gradients_walk<T>(shape);
  const auto run = [&](auto kernel) {
    in_launches(plan, [&](int64_t blocks) { launch(kernel, blocks, plan.threads, plan.bytes, stream, plan, grad, x, weights, partial); });
  };
  const bool words = words_of_channels(shape, grad, sizeof(T), 16) && words_of_channels(shape, x, sizeof(T), 16);
  spread_copies<T>(plan, words);
  if (words) run(axial_conv_gradients_kernel<T, true>);
  else run(axial_conv_gradients_kernel<T, false>);
}

}  // namespace spanet
