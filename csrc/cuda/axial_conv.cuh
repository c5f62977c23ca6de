// axial_conv on the GPU: two depthwise convolutions, 1 x k and k x 1, and their gradients, each in one pass over memory.
//
//   t[i][j] = row_bias + sum_d row[d] x[i][j + d - p]       p = k / 2, zeros outside the planes of x and of t
//   z[i][j] = column_bias + sum_d column[d] t[i + d - p][j]
//
//   u[i][j] = sum_d column[d] g[i - d + p][j]               the gradient of t; of x: the same two convolutions of g, weights reversed
//   d row[d] = sum_ij u[i][j] x[i][j + d - p]     d row_bias = sum_ij u     d column[d] = sum_ij t[i][j] g[i - d + p][j]     d column_bias = sum_ij g
//
// Seven taps in up to 32 bits: threads walk down the rows, each computing a row of t once (axial_walk.cuh: channels_last,
// axial_walk_planes.cuh: everything else). Backward is two such launches: the gradients of the weights, which read g and x, and the
// gradient of x, the convolution of g with weights reversed.
//
// Other k, and fp64: a thread computes a strip of z, 7 rows x 4 columns, from the tile of its block (strips.cuh): the 7 + 2 p rows of t
// pass through registers, 7 x 4 accumulators take what each contributes, weights come from the caches by sevens. When all
// threads have read, z takes the place of x in the tile and leaves it by 16-byte stores. Backward reads g and x once.
//
// t is never stored nor rounded. Weight gradients are summed over a plane in one order; partial sums of images and blocks, 8 k + 8 bytes
// a channel in fp32, are added by a last launch. No atomics. The coefficients are those of mode_coefficients, which reads z again.
//
// Bytes per element at k = 7: forward 1 read, 1 write; backward 3 reads, 1 write; halos of planes with several blocks come from L2.
// Issue slots per element and predictions: axial_walk.cuh and its companions.
#pragma once

#include "axial_walk_planes.cuh"
#include "strips_plan.cuh"

namespace spanet {

template <typename T>
struct Operand {  // the plane of a task in the tile
  const T* column;  // (0, column of the task)
  int row_pitch, column_pitch, size, height;
  int left, right;  // columns of the plane on either side of it, its own among the right ones

  __device__ Operand(const Strips& plan, const Slice& loaded, const Task& task, T* tile, int k)
      : column(column_of(plan, loaded, task, tile)), row_pitch(plan.row_pitch), column_pitch(plan.column_pitch), size(k), height(plan.height),
        left(task.column), right(plan.width - task.column) {}
};

// x[e] = element (i, column + offset + e), 0 outside the plane.
template <typename T, typename W = Wide<T>>
__device__ void load_window(const Operand<T>& in, int i, int offset, W (&x)[kTaps + kGroup - 1]) {
  const T* from = in.column + i * in.row_pitch;
#pragma unroll
  for (int e = 0; e < kTaps + kGroup - 1; ++e) {
    const int j = offset + e;
    x[e] = j >= -in.left && j < in.right ? widen(from[j * in.column_pitch]) : W(0);
  }
}

// t = bias + the 1 x k convolution of row i.
template <typename T, typename W = Wide<T>>
__device__ void convolve_row(const Operand<T>& in, int i, const Taps<W>& row, W bias, W (&t)[kGroup]) {
  const int k = in.size;
#pragma unroll
  for (int v = 0; v < kGroup; ++v) t[v] = bias;
#pragma unroll 1
  for (int first = 0; first < k; first += kTaps) {
    W x[kTaps + kGroup - 1];
    load_window(in, i, first - k / 2, x);
#pragma unroll
    for (int d = 0; d < kTaps; ++d) {
      if (first + d >= k) continue;
      const W weight = row[first + d];
#pragma unroll
      for (int v = 0; v < kGroup; ++v) t[v] += weight * x[v + d];
    }
  }
}

// z += the k x 1 convolution of t, over the strip that begins in row `first`.
template <typename T, typename W = Wide<T>>
__device__ void convolve(const Operand<T>& in, int first, const Taps<W>& row, W row_bias, const Taps<W>& column, W (&z)[kStrip][kGroup]) {
  const int k = in.size, p = k / 2;
#pragma unroll 1
  for (int r = -p; r < kStrip + p; ++r) {
    if (first + r < 0 || first + r >= in.height) continue;
    W t[kGroup];
    convolve_row(in, first + r, row, row_bias, t);
#pragma unroll
    for (int o = 0; o < kStrip; ++o) {
      const int d = r - o + p;
      if (d < 0 || d >= k) continue;
      const W weight = column[d];
#pragma unroll
      for (int v = 0; v < kGroup; ++v) z[o][v] += weight * t[v];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kStripThreads, kBlocks<T>)
    axial_conv_kernel(const __grid_constant__ Strips plan, View x, View z, AxialWeights<Wide<T>> weights) {
  using W = Wide<T>;
  DYNAMIC_SHARED(memory);
  T* tile = reinterpret_cast<T*>(memory);
  const Slice own = own_slice(plan), loaded = with_halo(plan, own);
  const int shift = displacement<T>(loaded, x);
  load_tile(plan, loaded, x, tile, shift);
  const Task task(plan, own);
  const int channel = plane_of(plan, own, task.active ? task.p : 0).channel;
  const Taps<W> row(weights.row, channel, weights.size, false), column(weights.column, channel, weights.size, false);
  const W row_bias = weights.row_bias[channel * weights.row_bias_c], column_bias = weights.column_bias[channel * weights.column_bias_c];
  W strip[kStrip][kGroup];
#pragma unroll
  for (int r = 0; r < kStrip; ++r)
#pragma unroll
    for (int v = 0; v < kGroup; ++v) strip[r][v] = column_bias;
  copies_wait();
  __syncthreads();
  if (task.active) convolve(Operand<T>(plan, loaded, task, tile + shift, weights.size), task.row, row, row_bias, column, strip);
  __syncthreads();
  store_strip<T>(plan, task, column_of(plan, loaded, task, tile + shift), strip);
  __syncthreads();
  store_own(plan, own, loaded, z, tile, shift);
}

constexpr int kSums = kTaps + 1;  // of a chunk of taps and a bias

// partial[k][first + d] and, in the first chunk, the bias: sums over the strips of each plane. For all threads of the block.
template <typename W>
__device__ void sum_gradients(const Strips& plan, const Slice& own, const W (&values)[kSums], int first, int size, char* memory, W* partial) {
  W* sums = reinterpret_cast<W*>(memory + plan.sums);  // [value][thread]
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSums; ++k) sums[k * plan.threads + threadIdx.x] = values[k];
  __syncthreads();
  const auto share = [&](int at, int lane, W (&sum)[1]) {
    const int k = at / plan.planes, p = at - k * plan.planes;
    for (int place = lane; place < plan.tasks(); place += plan.lanes) sum[0] += sums[k * plan.threads + thread_of(plan, p, place)];
  };
  sum_by_lanes<W, 1>(plan, kSums * plan.planes, share, [&](int at, const W (&sum)[1]) {
    const int k = at / plan.planes, p = at - k * plan.planes, d = first + k;
    if (p >= own.planes) return;
    const Plane plane = plane_of(plan, own, p);
    W* out = partial + (plane.batch * plan.slices() + own.index) * 2 * (size + 1) * plan.channels;
    if (k < kTaps && d < size) out[static_cast<int64_t>(plane.channel) * size + d] = sum[0];
    if (k == kTaps && first == 0) out[static_cast<int64_t>(plan.channels) * size + plane.channel] = sum[0];
  });
}

// partial[batch and slice]: d row (C, k), d row_bias (C), d column (C, k), d column_bias (C).
template <typename T>
__global__ void __launch_bounds__(kStripThreads, kBlocks<T>) axial_conv_backward_kernel(const __grid_constant__ Strips plan, View grad, View x, View x_grad,
                                                                               AxialWeights<Wide<T>> weights, Wide<T>* partial) {
  using W = Wide<T>;
  DYNAMIC_SHARED(memory);
  T* tile = reinterpret_cast<T*>(memory);
  T* tile_x = reinterpret_cast<T*>(memory + plan.tile_bytes);
  const Slice own = own_slice(plan), loaded = with_halo(plan, own);
  const int shift = displacement<T>(loaded, grad), k = weights.size, p = k / 2;
  load_tile(plan, loaded, grad, tile, shift);
  load_tile(plan, loaded, x, tile_x, displacement<T>(loaded, x));
  copies_wait();
  __syncthreads();
  const Task task(plan, own);
  const int channel = plane_of(plan, own, task.active ? task.p : 0).channel, rows = task.active ? task.rows : 0;
  const Operand<T> in(plan, loaded, task, tile_x + displacement<T>(loaded, x), k), out(plan, loaded, task, tile + shift, k);
  {
    W t[kStrip][kGroup] = {};
    const Taps<W> row(weights.row, channel, k, false);
    const W row_bias = weights.row_bias[channel * weights.row_bias_c];
#pragma unroll
    for (int o = 0; o < kStrip; ++o)
      if (o < rows) convolve_row(in, task.row + o, row, row_bias, t[o]);
#pragma unroll 1
    for (int first = 0; first < k; first += kTaps) {
      W sums[kSums] = {};
#pragma unroll
      for (int e = 0; e < kStrip + kTaps - 1; ++e) {  // rows of grad that meet this chunk of taps
        const int i = task.row + e - (kTaps - 1) + p - first;
        const bool meets = first + max(kTaps - 1 - e, 0) < k;  // a tap that exists; the tile ends where they do
        if (rows == 0 || !meets || i < 0 || i >= plan.height) continue;
        W g[kGroup];
        load_group<T, false>(out.column + i * plan.row_pitch, plan.column_pitch, task.columns, g);
#pragma unroll
        for (int o = 0; o < kStrip; ++o) {
          const int d = o - e + kTaps - 1;
          if (d < 0 || d >= kTaps) continue;
#pragma unroll
          for (int v = 0; v < kGroup; ++v) sums[d] += t[o][v] * g[v];
        }
      }
#pragma unroll
      for (int o = 0; o < kStrip; ++o) {
        if (first > 0 || o >= rows) continue;
        W g[kGroup];
        load_group<T, false>(out.column + (task.row + o) * plan.row_pitch, plan.column_pitch, task.columns, g);
        sums[kTaps] += (g[0] + g[1]) + (g[2] + g[3]);
      }
      sum_gradients(plan, own, sums, first, k, memory, partial + static_cast<int64_t>(plan.channels) * (k + 1));
    }
  }
  {
    W u[kStrip][kGroup] = {};
    const Taps<W> column(weights.column, channel, k, false);
#pragma unroll 1
    for (int r = -p; r < kStrip + p; ++r) {
      const int i = task.row + r;
      if (rows == 0 || i < 0 || i >= plan.height) continue;
      W g[kGroup];
      load_group<T, false>(out.column + i * plan.row_pitch, plan.column_pitch, task.columns, g);
#pragma unroll
      for (int o = 0; o < kStrip; ++o) {
        const int d = o - r + p;
        if (d < 0 || d >= k) continue;
        const W weight = column[d];
#pragma unroll
        for (int v = 0; v < kGroup; ++v) u[o][v] += weight * g[v];
      }
    }
#pragma unroll 1
    for (int first = 0; first < k; first += kTaps) {
      W sums[kSums] = {};
#pragma unroll
      for (int o = 0; o < kStrip; ++o) {
        if (o >= rows) continue;
        W window[kTaps + kGroup - 1];
        load_window(in, task.row + o, first - p, window);
#pragma unroll
        for (int v = 0; v < kGroup; ++v) {
          sums[kTaps] += u[o][v];
#pragma unroll
          for (int d = 0; d < kTaps; ++d) sums[d] += u[o][v] * window[v + d];
        }
      }
      sum_gradients(plan, own, sums, first, k, memory, partial);
    }
  }
  const Taps<W> row_reversed(weights.row, channel, k, true), column_reversed(weights.column, channel, k, true);
  W strip[kStrip][kGroup] = {};
  if (task.active) convolve(out, task.row, row_reversed, W(0), column_reversed, strip);
  __syncthreads();
  store_strip<T>(plan, task, column_of(plan, loaded, task, tile + shift), strip);
  __syncthreads();
  store_own(plan, own, loaded, x_grad, tile, shift);
}

// Whether threads walk down the rows.
template <typename T>
bool walks(const Shape& shape, int size, int64_t shared_limit) {
  if (sizeof(T) == 8 || size != kTaps || shape.batch * shape.channels > UINT32_MAX - kWalkThreads) return false;
  return !shape.channels_last || shared_limit >= std::max(convolution_walk<T>(shape).bytes, gradients_walk<T>(shape).bytes);
}

// z of x, or with reversed weights the gradient of x of that of z.
template <typename T>
void launch_walks(const Shape& shape, const View& x, const View& z, const AxialWeights<float>& weights, bool reversed, void* stream) {
  if (shape.channels_last) launch_walk<T>(shape, x, z, weights, reversed, stream);
  else launch_planes<T>(shape, x, z, weights, reversed, stream);
}

template <typename T>
void AxialConv<T>::forward(const Shape& shape, const View& x, const View& z, const AxialWeights<Wide<T>>& weights, Wide<T>* coefficients,
                           int64_t radius_squared, Device& device) {
  if (walks<T>(shape, weights.size, device.shared_limit)) {
    if constexpr (sizeof(T) < 8) launch_walks<T>(shape, x, z, weights, false, device.stream);
  } else {
    Strips plan = make_strips<T>("axial_conv", shape, weights.size / 2, -1, 1, 0, device.shared_limit);
    const View from = with_move(shape, plan, x, sizeof(T)), to = with_move(shape, plan, z, sizeof(T));
    in_ranges(plan, 0, [&](int64_t blocks) {
      launch(axial_conv_kernel<T>, blocks, plan.threads, plan.bytes, device.stream, plan, from, to, weights);
    });
  }
  if (radius_squared >= 0) ModeCoefficients<T>::forward(shape, z, coefficients, radius_squared, device);
}

template <typename T>
void AxialConv<T>::backward(const Shape& shape, const View& grad, const View& x, const View& x_grad, const AxialWeights<Wide<T>>& weights,
                            const std::array<Wide<T>*, 4>& gradients, Device& device) {
  using W = Wide<T>;
  const int64_t size = weights.size, channels = shape.channels, columns = 2 * (size + 1) * channels;
  int64_t rows = 0;
  W* partial = nullptr;
  const auto allocate_rows = [&](int64_t count) {
    rows = count;
    return partial = static_cast<W*>(device.allocate(rows * columns * sizeof(W)));
  };
  if (walks<T>(shape, weights.size, device.shared_limit)) {
    if constexpr (sizeof(T) < 8) {
      if (shape.channels_last) launch_gradients<T>(shape, grad, x, weights, allocate_rows, device.stream);
      else launch_plane_gradients<T>(shape, grad, x, weights, allocate_rows, device.stream);
      launch_walks<T>(shape, grad, x_grad, {weights.row, weights.column, nullptr, nullptr, 0, 0, weights.size}, true, device.stream);
    }
  } else {
    Strips plan = make_strips<T>("axial_conv_backward", shape, size / 2, -1, 2, kSums, device.shared_limit);
    allocate_rows(shape.batch * plan.slices());
    const View from = with_move(shape, plan, grad, sizeof(T)), saved = with_move(shape, plan, x, sizeof(T));
    const View to = with_move(shape, plan, x_grad, sizeof(T));
    in_ranges(plan, 0, [&](int64_t blocks) {
      launch(axial_conv_backward_kernel<T>, blocks, plan.threads, plan.bytes, device.stream, plan, from, saved, to, weights, partial);
    });
  }
  const Parts<W> parts{{gradients[0], gradients[1], gradients[2], gradients[3]}, {channels * size, channels, channels * size, channels}};
  sum_partial(static_cast<const W*>(partial), rows, columns, parts, device.stream);
}

}  // namespace spanet
