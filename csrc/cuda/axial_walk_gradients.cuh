// Gradients of the weights of axial_conv with 7 taps in channels_last (axial_walk.cuh).
//
// The seven rows of g that meet t[i], and of which u[i] is made, are in registers; a row replaces the oldest. t, u, d row and d column:
// 28 multiply-adds per element. A thread owns two channels and two columns (fp32: one). Rows arrive seven at a time while seven are
// computed. Sums of a thread are added over the slice in one order, partial sums of slices and images by a second launch. Rows of g
// outside the plane are zeros: NaN and infinity in t reach the gradients of all taps of their channel.
//
// Issue slots per element in bf16, counted in the code for sm_90: 28 multiply-adds, 2 additions, 2.5 loads from shared memory, 5
// conversions, 8 for asynchronous copies, 8 for addresses, predicates and loops: 53 (fp32: no conversions, 4 loads). Predicted for an
// H200, 128 x 64 x 56 x 56: 46 us of issue slots, 60 us expected. Measured: 75; with the gradient of x 126 (fp32 164).
#pragma once

#include "axial_walk.cuh"
#include "strips.cuh"

namespace spanet {

template <typename T> constexpr int kGradientColumns = sizeof(T) == 2 ? 2 : 1;  // as registers allow
constexpr int kGradientStages = 2;
constexpr int kGradients = 2 * (kTaps + 1);  // of a channel

template <int N, int C>
struct GradientsWalk {  // N columns of C channels on the way down
  WalkTaps<C> row, column;
  float row_bias[C];
  float g[kTaps][N][C] = {};  // rows i - 6 .. i, row i in place k for some k
  float of_row[kTaps + 1][C] = {}, of_column[kTaps + 1][C] = {};  // sums, those of the biases last

  __device__ GradientsWalk(const AxialWeights<float>& weights, int channel, int channels)
      : row(weights.row, channel, channels, false), column(weights.column, channel, channels, false) {
    load_bias(weights.row_bias, weights.row_bias_c, channel, channels, row_bias);
  }

  // Row i - 3 of x, three columns more on either side, meets the rows of g.
  __device__ void advance(const float (&x)[N + kTaps - 1][C], int k) {
#pragma unroll
    for (int v = 0; v < N; ++v)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float t = row_bias[c], u = 0;
#pragma unroll
        for (int d = 0; d < kTaps; ++d) t += row.value[d][c] * x[v + d][c];
#pragma unroll
        for (int d = 0; d < kTaps; ++d) {
          const float meets = g[(k - d + kTaps) % kTaps][v][c];  // row i - d
          u += column.value[d][c] * meets;
          of_column[d][c] += t * meets;
        }
#pragma unroll
        for (int d = 0; d < kTaps; ++d) of_row[d][c] += u * x[v + d][c];
        of_row[kTaps][c] += u;
        of_column[kTaps][c] += g[(k - kWalkHalo + kTaps) % kTaps][v][c];
      }
  }

  // Sum k of row and bias, then of column and bias, of a channel.
  __device__ float sum(int k, int c) const { return k <= kTaps ? of_row[k % (kTaps + 1)][c] : of_column[k % (kTaps + 1)][c]; }
};

// Where sum k of a channel lies in a row of partial: d row (C, k), d row_bias (C), d column (C, k), d column_bias (C).
__device__ inline int64_t place_of_gradient(int k, int channel, int channels) {
  const int d = k % (kTaps + 1);
  const int64_t first = k <= kTaps ? 0 : static_cast<int64_t>(channels) * (kTaps + 1);
  return first + (d < kTaps ? static_cast<int64_t>(channel) * kTaps + d : static_cast<int64_t>(channels) * kTaps + channel);
}

// partial[batch and slice][place_of_gradient].
template <typename T, bool WORDS>
__global__ void __launch_bounds__(kWalkThreads, WORDS ? 2 : 1)
    axial_conv_gradients_kernel(const __grid_constant__ Walk plan, View grad, View x, AxialWeights<float> weights, float* partial) {
  constexpr int N = kGradientColumns<T>, kBand = kTaps;
  DYNAMIC_SHARED(memory);
  const Walker<N> own(plan);
  T* const tile = reinterpret_cast<T*>(own.memory(plan, memory));
  const int begin = own.row - kWalkHalo, end = own.row + own.rows + kWalkHalo;  // rows of g; x follows three rows behind
  const SliceRows<T, N, 0, WORDS> of_grad(plan, own, grad, tile);
  const SliceRows<T, N, kWalkHalo, WORDS> of_x(plan, own, x, tile + plan.stage_rows * plan.pitch_without_halo);
  const auto load = [&](int band) {
    const int first = begin + band * kBand, at = band % kGradientStages * kBand;
    of_grad.load(plan, own, grad, first, kBand, max(begin, 0), min(end, plan.height), at);
    of_x.load(plan, own, x, first - kWalkHalo, kBand, own.row, own.row + own.rows, at);
  };
  load(0);
  const int channel = own.active ? own.channel + 2 * own.pair : 0;
  GradientsWalk<N, 2> walk(weights, channel, plan.channels);
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
        if (exists) load_pair(grads + k * plan.pitch_without_halo + walk_slot<T, N>(v), walk.g[k][v]);
        else walk.g[k][v][0] = walk.g[k][v][1] = 0;
      }
      if (j < own.row || j >= own.row + own.rows) continue;
      float window[N + kTaps - 1][2];
#pragma unroll
      for (int e = 0; e < N + kTaps - 1; ++e) load_pair(elements + k * plan.pitch + walk_slot<T, N>(e), window[e]);
      walk.advance(window, k);
    }
  }
  copies_wait();
  __syncthreads();
  const int threads = plan.groups * kWalkPairs;
  float* const sums = reinterpret_cast<float*>(tile);  // [value][channel of the pair][thread]
#pragma unroll
  for (int k = 0; k < kGradients; ++k)
#pragma unroll
    for (int c = 0; c < 2; ++c) sums[(2 * k + c) * threads + own.thread] = own.active ? walk.sum(k, c) : 0.f;
  __syncthreads();
  if (!own.unit) return;
  float* const out = partial + (static_cast<int64_t>(own.batch) * plan.slices() + own.slice) * kGradients * plan.channels;
#pragma unroll 1
  for (int at = own.thread; at < kGradients * kUnitChannels; at += threads) {
    const int k = at / kUnitChannels, c = at % kUnitChannels;
    if (own.channel + c >= plan.channels) continue;
    const float* from = sums + (2 * k + c % 2) * threads + c / 2;
    double sum = 0;  // few numbers, and no rounding is added
    for (int group = 0; group < plan.groups; ++group) sum += from[group * kWalkPairs];
    out[place_of_gradient(k, own.channel + c, plan.channels)] = static_cast<float>(sum);
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

// Sums of images and slices into what allocate(rows) returns, 16 C numbers for each of the rows.
template <typename T, typename Allocate>
void launch_gradients(const Shape& shape, const View& grad, const View& x, const AxialWeights<float>& weights, Allocate allocate, void* stream) {
  Walk plan = gradients_walk<T>(shape);
  float* partial = allocate(shape.batch * plan.slices());
  const auto run = [&](auto kernel) {
    in_launches(plan, [&](int64_t blocks) { launch(kernel, blocks, plan.threads, plan.bytes, stream, plan, grad, x, weights, partial); });
  };
  const bool words = words_of_channels(shape, grad, sizeof(T), 16) && words_of_channels(shape, x, sizeof(T), 16);
  spread_copies<T>(plan, words);
  if (words) run(axial_conv_gradients_kernel<T, true>);
  else run(axial_conv_gradients_kernel<T, false>);
}

}  // namespace spanet
