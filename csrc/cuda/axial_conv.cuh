// axial_conv on the GPU: two depthwise convolutions, 1 x k and k x 1, and their gradients, each in one pass over memory.
//
//   t[i][j] = row_bias + sum_d row[d] x[i][j + d - p]       p = k / 2, zeros outside the planes of x and of t
//   z[i][j] = column_bias + sum_d column[d] t[i + d - p][j]
//
//   u[i][j] = sum_d column[d] g[i - d + p][j]               the gradient of t; of x: the same two convolutions of g, weights reversed
//   d row[d] = sum_ij u[i][j] x[i][j + d - p]     d row_bias = sum_ij u     d column[d] = sum_ij t[i][j] g[i - d + p][j]     d column_bias = sum_ij g
//
// A thread computes a strip of z, 7 rows x 4 columns, from the tile of its block (strips.cuh): the 7 + 2 p rows of t pass through
// registers, 7 x 4 fp32 accumulators take what each contributes; t is never stored nor rounded. When all threads have read, z takes
// the place of x in the tile and leaves it by 16-byte stores. Its coefficients, of z as stored, come from the same registers.
// Weight gradients are summed over the strips of a plane in one order; partial sums of planes and blocks, 8 k + 8 bytes each in fp32,
// are added by a second launch. No atomics. K = 7 is compiled for its taps, 0 takes any odd k by sevens, weights from the caches.
//
// Bytes per element: forward 1 read, 1 write; backward 2 reads, 1 write; halos of planes with several blocks come from L2.
// Predicted for an H200, not measured: floors at 4.3 TB/s 0.93 (1.86) us per million elements in 16 bits (fp32) and 1.40 (2.79)
// backward. Multiply-adds per element at k = 7: (13 / 7 + 1) 7 = 20, with radius 2 five more; backward 48. With loads, copies and
// conversions about 35 of the 27 (55) issue slots an element has at copy speed, backward 70 of 40 (80): 0.75 (0.9) and 0.55 (0.9)
// of the copy's bandwidth.
#pragma once

#include "axial_walk_planes.cuh"
#include "mode_coefficients.cuh"
#include "strips_plan.cuh"

namespace spanet {

template <int K> constexpr int kUnroll = K ? kStrip + K : 1;

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
template <typename T, bool VECTOR, typename W = Wide<T>>
__device__ void load_window(const Operand<T>& in, int i, int offset, W (&x)[kTaps + kGroup - 1]) {
  const T* from = in.column + i * in.row_pitch;
  if constexpr (VECTOR) {  // offset = -3
    Columns<T, kGroup> words[3];
    if (in.left > 0) words[0].load(from - kGroup);
    words[1].load(from);
    if (in.right > kGroup) words[2].load(from + kGroup);
    W all[3][kGroup];
#pragma unroll
    for (int k = 0; k < 3; ++k) words[k].get(all[k]);
#pragma unroll
    for (int e = 0; e < kTaps + kGroup - 1; ++e) x[e] = all[(e + 1) / kGroup][(e + 1) % kGroup];
  } else {
#pragma unroll
    for (int e = 0; e < kTaps + kGroup - 1; ++e) {
      const int j = offset + e;
      x[e] = j >= -in.left && j < in.right ? widen(from[j * in.column_pitch]) : W(0);
    }
  }
}

// t = bias + the 1 x k convolution of row i.
template <int K, bool VECTOR, typename T, typename W = Wide<T>>
__device__ void convolve_row(const Operand<T>& in, int i, const Taps<W, K>& row, W bias, W (&t)[kGroup]) {
  const int k = K ? K : in.size;
#pragma unroll
  for (int v = 0; v < kGroup; ++v) t[v] = bias;
#pragma unroll kUnroll<K>
  for (int first = 0; first < k; first += kTaps) {
    W x[kTaps + kGroup - 1];
    load_window<T, VECTOR>(in, i, first - k / 2, x);
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
template <int K, bool VECTOR, typename T, typename W = Wide<T>>
__device__ void convolve(const Operand<T>& in, int first, const Taps<W, K>& row, W row_bias, const Taps<W, K>& column, W (&z)[kStrip][kGroup]) {
  const int k = K ? K : in.size, p = k / 2;
#pragma unroll kUnroll<K>
  for (int r = -p; r < kStrip + p; ++r) {
    if (first + r < 0 || first + r >= in.height) continue;
    W t[kGroup];
    convolve_row<K, VECTOR>(in, first + r, row, row_bias, t);
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

template <typename T, int K, bool VECTOR>
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
  const Taps<W, K> row(weights.row, channel, weights.size, false), column(weights.column, channel, weights.size, false);
  const W row_bias = weights.row_bias[channel * weights.row_bias_c], column_bias = weights.column_bias[channel * weights.column_bias_c];
  W strip[kStrip][kGroup];
#pragma unroll
  for (int r = 0; r < kStrip; ++r)
#pragma unroll
    for (int v = 0; v < kGroup; ++v) strip[r][v] = column_bias;
  copies_wait();
  __syncthreads();
  if (task.active) convolve<K, VECTOR>(Operand<T>(plan, loaded, task, tile + shift, weights.size), task.row, row, row_bias, column, strip);
  __syncthreads();
  store_strip<T, VECTOR>(plan, task, column_of(plan, loaded, task, tile + shift), strip);
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
template <typename T, int K, bool VECTOR>
__global__ void __launch_bounds__(kStripThreads, kBlocks<T>) axial_conv_backward_kernel(const __grid_constant__ Strips plan, View grad, View x, View x_grad,
                                                                               AxialWeights<Wide<T>> weights, Wide<T>* partial) {
  using W = Wide<T>;
  DYNAMIC_SHARED(memory);
  T* tile = reinterpret_cast<T*>(memory);
  T* tile_x = reinterpret_cast<T*>(memory + plan.tile_bytes);
  const Slice own = own_slice(plan), loaded = with_halo(plan, own);
  const int shift = displacement<T>(loaded, grad), k = K ? K : weights.size, p = k / 2;
  load_tile(plan, loaded, grad, tile, shift);
  load_tile(plan, loaded, x, tile_x, displacement<T>(loaded, x));
  copies_wait();
  __syncthreads();
  const Task task(plan, own);
  const int channel = plane_of(plan, own, task.active ? task.p : 0).channel, rows = task.active ? task.rows : 0;
  const Operand<T> in(plan, loaded, task, tile_x + displacement<T>(loaded, x), k), out(plan, loaded, task, tile + shift, k);
  {
    W t[kStrip][kGroup] = {};
    const Taps<W, K> row(weights.row, channel, k, false);
    const W row_bias = weights.row_bias[channel * weights.row_bias_c];
#pragma unroll
    for (int o = 0; o < kStrip; ++o)
      if (o < rows) convolve_row<K, VECTOR>(in, task.row + o, row, row_bias, t[o]);
#pragma unroll kUnroll<K>
    for (int first = 0; first < k; first += kTaps) {
      W sums[kSums] = {};
#pragma unroll
      for (int e = 0; e < kStrip + kTaps - 1; ++e) {  // rows of grad that meet this chunk of taps
        const int i = task.row + e - (kTaps - 1) + p - first;
        const bool meets = first + max(kTaps - 1 - e, 0) < k;  // a tap that exists; the tile ends where they do
        if (rows == 0 || !meets || i < 0 || i >= plan.height) continue;
        W g[kGroup];
        load_group<T, VECTOR>(out.column + i * plan.row_pitch, plan.column_pitch, task.columns, g);
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
        load_group<T, VECTOR>(out.column + (task.row + o) * plan.row_pitch, plan.column_pitch, task.columns, g);
        sums[kTaps] += (g[0] + g[1]) + (g[2] + g[3]);
      }
      sum_gradients(plan, own, sums, first, k, memory, partial + static_cast<int64_t>(plan.channels) * (k + 1));
    }
  }
  {
    W u[kStrip][kGroup] = {};
    const Taps<W, K> column(weights.column, channel, k, false);
#pragma unroll kUnroll<K>
    for (int r = -p; r < kStrip + p; ++r) {
      const int i = task.row + r;
      if (rows == 0 || i < 0 || i >= plan.height) continue;
      W g[kGroup];
      load_group<T, VECTOR>(out.column + i * plan.row_pitch, plan.column_pitch, task.columns, g);
#pragma unroll
      for (int o = 0; o < kStrip; ++o) {
        const int d = o - r + p;
        if (d < 0 || d >= k) continue;
        const W weight = column[d];
#pragma unroll
        for (int v = 0; v < kGroup; ++v) u[o][v] += weight * g[v];
      }
    }
#pragma unroll kUnroll<K>
    for (int first = 0; first < k; first += kTaps) {
      W sums[kSums] = {};
#pragma unroll
      for (int o = 0; o < kStrip; ++o) {
        if (o >= rows) continue;
        W window[kTaps + kGroup - 1];
        load_window<T, VECTOR>(in, task.row + o, first - p, window);
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
  const Taps<W, K> row_reversed(weights.row, channel, k, true), column_reversed(weights.column, channel, k, true);
  W strip[kStrip][kGroup] = {};
  if (task.active) convolve<K, VECTOR>(out, task.row, row_reversed, W(0), column_reversed, strip);
  __syncthreads();
  store_strip<T, VECTOR>(plan, task, column_of(plan, loaded, task, tile + shift), strip);
  __syncthreads();
  store_own(plan, own, loaded, x_grad, tile, shift);
}

// The kernel for k: run(K, VECTOR).
template <typename T, typename Run>
void with_kernel(const Shape& shape, const Strips& plan, int size, std::initializer_list<const void*> addresses, Run run) {
  using Seven = std::integral_constant<int, kTaps>;
  if constexpr (sizeof(T) < 8) {
    if (size == kTaps && vectors<T>(shape, plan, addresses)) return run(Seven{}, std::true_type{});
    if (size == kTaps) return run(Seven{}, std::false_type{});
  }
  run(std::integral_constant<int, 0>{}, std::false_type{});
}

// Whether threads walk down the rows.
template <typename T>
bool walks(const Shape& shape, int size, int64_t shared_limit) {
  if (sizeof(T) == 8 || size != kTaps) return false;
  return !shape.channels_last || shared_limit >= std::max(convolution_walk<T>(shape).bytes, gradients_walk<T>(shape).bytes);
}

// z of x, or with reversed weights the gradient of x of that of z.
template <typename T>
void launch_walks(const Shape& shape, const View& x, const View& z, const AxialWeights<float>& weights, bool reversed, void* stream) {
  if (shape.channels_last) launch_walk<T>(shape, x, z, weights, reversed, stream);
  else launch_planes<T>(shape, x, z, weights, reversed, stream);
}

// allocate(bytes): device memory that lives until the launches are done. A negative radius_squared asks for no coefficients.
template <typename T, typename Allocate>
void run_axial_conv(const Shape& shape, const View& x, const View& z, const AxialWeights<Wide<T>>& weights, Wide<T>* coefficients,
                    int64_t radius_squared, int64_t shared_limit, Allocate allocate, void* stream) {
  if (walks<T>(shape, weights.size, shared_limit)) {
    if constexpr (sizeof(T) < 8) launch_walks<T>(shape, x, z, weights, false, stream);
  } else {
    Strips plan = make_strips<T>("axial_conv", shape, weights.size / 2, -1, 1, 0, shared_limit);
    const View from = with_move(shape, plan, x, sizeof(T)), to = with_move(shape, plan, z, sizeof(T));
    with_kernel<T>(shape, plan, weights.size, {x.data}, [&](auto taps, auto vector) {
      in_ranges(plan, 0, [&](int64_t blocks) {
        launch(axial_conv_kernel<T, decltype(taps)::value, decltype(vector)::value>, blocks, plan.threads, plan.bytes, stream, plan, from, to, weights);
      });
    });
  }
  if (radius_squared >= 0) run_mode_coefficients<T>(shape, z, coefficients, radius_squared, shared_limit, allocate, stream);
}

// gradients: of row_weight, row_bias, column_weight, column_bias.
template <typename T, typename Allocate>
void run_axial_conv_backward(const Shape& shape, const View& grad, const View& x, const View& x_grad, const AxialWeights<Wide<T>>& weights,
                             const std::array<Wide<T>*, 4>& gradients, int64_t shared_limit, Allocate allocate, void* stream) {
  using W = Wide<T>;
  const int64_t size = weights.size, channels = shape.channels, columns = 2 * (size + 1) * channels;
  int64_t rows = 0;
  W* partial = nullptr;
  const auto allocate_rows = [&](int64_t count) {
    rows = count;
    return partial = static_cast<W*>(allocate(rows * columns * sizeof(W)));
  };
  if (walks<T>(shape, weights.size, shared_limit)) {
    if constexpr (sizeof(T) < 8) {
      if (shape.channels_last) launch_gradients<T>(shape, grad, x, weights, allocate_rows, stream);
      else launch_plane_gradients<T>(shape, grad, x, weights, allocate_rows, stream);
      launch_walks<T>(shape, grad, x_grad, {weights.row, weights.column, nullptr, nullptr, 0, 0, weights.size}, true, stream);
    }
  } else {
    Strips plan = make_strips<T>("axial_conv_backward", shape, size / 2, -1, 2, kSums, shared_limit);
    allocate_rows(shape.batch * plan.slices());
    const View from = with_move(shape, plan, grad, sizeof(T)), saved = with_move(shape, plan, x, sizeof(T)), to = with_move(shape, plan, x_grad, sizeof(T));
    with_kernel<T>(shape, plan, weights.size, {grad.data, x.data}, [&](auto taps, auto vector) {
      in_ranges(plan, 0, [&](int64_t blocks) {
        launch(axial_conv_backward_kernel<T, decltype(taps)::value, decltype(vector)::value>, blocks, plan.threads, plan.bytes, stream, plan, from,
               saved, to, weights, partial);
      });
    });
  }
  const Parts<W> parts{{gradients[0], gradients[1], gradients[2], gradients[3]}, {channels * size, channels, channels * size, channels}};
  sum_partial(static_cast<const W*>(partial), rows, columns, parts, stream);
}

}  // namespace spanet
