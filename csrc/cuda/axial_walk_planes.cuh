// axial_conv with 7 taps of contiguous planes, or planes of any strides: threads walk down the rows (axial_walk.cuh).
//
// A thread owns N adjacent columns of a slice of a plane, N = 4, 2 or 1 as width and addresses allow, and reads its rows from memory, the
// next one while it computes; what its neighbours read too comes from the first-level cache. No shared memory and no barriers but
// those of the sums of the gradients of the weights.
//
// Issue slots per element in bf16, counted in the code for sm_90, N = 4 (2): convolution 23 (34), gradients of the weights 41 (54).
// Predicted for an H200, not measured, 128 x 64 x 56 x 56: 20 us of issue slots and 26 of memory, 32 us expected; gradients of the
// weights 36 us of issue slots, 50 expected.
#pragma once

#include "axial_walk_gradients.cuh"

namespace spanet {

constexpr int kPlaneThreads = 128;
template <int N> constexpr int kPlaneBlocks = N == 4 ? 7 : 8;  // on a multiprocessor: 72 or 64 registers

template <int N>
struct PlaneWalker {  // what a thread owns
  unsigned batch;
  int place, group;                // of its plane in the block, of its columns in the slice
  int slice, channel;
  int row, rows, column;
  bool active;

  __device__ PlaneWalker(const Walk& plan) {
    const unsigned blocks = blockIdx.x / plan.slices();
    slice = static_cast<int>(blockIdx.x - blocks * plan.slices());
    place = threadIdx.x / plan.groups;
    group = threadIdx.x - place * plan.groups;
    const unsigned index = plan.first_unit + blocks * plan.together + place;
    batch = index / plan.channels;
    channel = static_cast<int>(index - batch * plan.channels);
    row = slice / plan.slices_w * plan.rows;
    rows = min(plan.rows, plan.height - row);
    column = slice % plan.slices_w * plan.columns + group * N;
    active = place < plan.together && index < plan.units && column < plan.width;
  }
};

template <int N>
__device__ int64_t offset_in(const PlaneWalker<N>& own, const View& view, int row) {
  return own.batch * view.b + own.channel * view.c + own.column * view.w + row * view.h;
}

template <typename T, int N>
struct PlaneRow {  // a row around the columns of a thread
  static constexpr int kSide = (kWalkHalo + N - 1) / N;  // words on either side
  Columns<T, N> words[2 * kSide + 1];

  // Elements are `step` apart where words have one.
  __device__ void load(const T* from, int column, int width, int64_t step) {
#pragma unroll
    for (int k = 0; k < 2 * kSide + 1; ++k) {
      const int j = column + (k - kSide) * N;
      words[k] = {};
      if (k == kSide || (k < kSide ? j >= 0 : j < width)) words[k].load(from + (k - kSide) * (N == 1 ? step : N));
    }
  }
  __device__ void get(float (&x)[N + kTaps - 1][1]) const {
    float all[2 * kSide + 1][N];
#pragma unroll
    for (int k = 0; k < 2 * kSide + 1; ++k) words[k].get(all[k]);
#pragma unroll
    for (int e = 0; e < N + kTaps - 1; ++e) x[e][0] = all[(e + kSide * N - kWalkHalo) / N][(e + kSide * N - kWalkHalo) % N];
  }
};

template <typename T, int N, bool STRIDED>
__global__ void __launch_bounds__(kPlaneThreads, kPlaneBlocks<N>)
    axial_conv_planes_kernel(const __grid_constant__ Walk plan, View x, View z, AxialWeights<float> weights, bool reversed) {
  const PlaneWalker<N> own(plan);
  if (!own.active) return;
  const int first = max(own.row - kWalkHalo, 0), last = min(own.row + own.rows + kWalkHalo, plan.height);
  const T* from = static_cast<const T*>(x.data) + offset_in(own, x, first);
  T* out = static_cast<T*>(z.data) + offset_in(own, z, own.row);
  PlaneRow<T, N> next;
  next.load(from, own.column, plan.width, STRIDED ? x.w : 1);
  ConvolutionWalk<N, 1> walk(weights, own.channel, plan.channels, reversed);
  const auto store = [&](const float (&values)[N][1]) {
    float flat[N];
#pragma unroll
    for (int v = 0; v < N; ++v) flat[v] = values[v][0];
    Columns<T, N> words;
    words.set(flat);
    words.store(out);
    out += z.h;
  };
#pragma unroll 1
  for (int i = first; i < last; ++i) {
    float window[N + kTaps - 1][1], complete[N][1];
    next.get(window);
    from += x.h;
    if (i + 1 < last) next.load(from, own.column, plan.width, STRIDED ? x.w : 1);
    walk.advance(window, complete);
    if (i - kWalkHalo >= own.row) store(complete);
  }
#pragma unroll 1
  for (int i = last; i < own.row + own.rows + kWalkHalo; ++i, walk.advance())
    if (i - kWalkHalo >= own.row) store(walk.sums[0]);
}

// partial[batch and slice][place_of_gradient].
template <typename T, int N, bool STRIDED>
__global__ void __launch_bounds__(kPlaneThreads, 4)
    axial_conv_plane_gradients_kernel(const __grid_constant__ Walk plan, View grad, View x, AxialWeights<float> weights, float* partial) {
  DYNAMIC_SHARED(memory);
  const PlaneWalker<N> own(plan);
  float* const sums = reinterpret_cast<float*>(memory);  // [value][thread]
  if (own.active) {
    const int begin = own.row - kWalkHalo, end = own.row + own.rows + kWalkHalo;  // rows of g; x follows three rows behind
    const T* grads = static_cast<const T*>(grad.data) + offset_in(own, grad, begin);
    const T* from = static_cast<const T*>(x.data) + offset_in(own, x, own.row);
    PlaneRow<T, N> next;
    next.load(from, own.column, plan.width, STRIDED ? x.w : 1);
    Columns<T, N> next_grad;
    if (begin >= 0) next_grad.load(grads);
    GradientsWalk<N, 1> walk(weights, own.channel, plan.channels);
#pragma unroll 1
    for (int band = begin; band < end; band += kTaps) {
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        const int i = band + k, j = i - kWalkHalo;
        if (i >= end) break;
        float flat[N];
        next_grad.get(flat);
#pragma unroll
        for (int v = 0; v < N; ++v) walk.g[k][v][0] = flat[v];
        grads += grad.h;
        next_grad = {};
        if (i + 1 >= 0 && i + 1 < min(end, plan.height)) next_grad.load(grads);
        if (j < own.row) continue;
        float window[N + kTaps - 1][1];
        next.get(window);
        from += x.h;
        if (j + 1 < own.row + own.rows) next.load(from, own.column, plan.width, STRIDED ? x.w : 1);
        walk.advance(window, k);
      }
    }
#pragma unroll
    for (int k = 0; k < kGradients; ++k) sums[k * kPlaneThreads + threadIdx.x] = walk.sum(k, 0);
  }
  __syncthreads();
  const unsigned first = plan.first_unit + blockIdx.x / plan.slices() * plan.together;
  const int groups = min(plan.groups, (plan.width - own.slice % plan.slices_w * plan.columns + N - 1) / N);
#pragma unroll 1
  for (int at = threadIdx.x; at < kGradients * plan.together; at += blockDim.x) {
    const int k = at / plan.together, place = at - k * plan.together;
    if (first + place >= plan.units) continue;
    const float* of_plane = sums + k * kPlaneThreads + place * plan.groups;
    double sum = 0;  // few numbers, and no rounding is added
    for (int group = 0; group < groups; ++group) sum += of_plane[group];
    const unsigned batch = (first + place) / plan.channels;
    const int channel = static_cast<int>(first + place - batch * plan.channels);
    float* const out = partial + (static_cast<int64_t>(batch) * plan.slices() + own.slice) * kGradients * plan.channels;
    out[place_of_gradient(k, channel, plan.channels)] = static_cast<float>(sum);
  }
}

template <int N>
Walk plane_walk(const Shape& shape) {
  Walk plan = make_walk(shape, 1, N, kPlaneThreads);
  plan.together = kPlaneThreads / plan.groups;
  plan.threads = kPlaneThreads;
  return plan;
}

// Whether rows are whole words of n elements.
template <typename T>
bool words_of_rows(const Shape& shape, const View& view, int n) {
  const auto whole = [&](int64_t extent, int64_t stride) { return extent == 1 || stride % n == 0; };
  return shape.width % n == 0 && (shape.width == 1 || view.w == 1) && whole(shape.height, view.h) && whole(shape.channels, view.c) &&
         whole(shape.batch, view.b) && reinterpret_cast<uintptr_t>(view.data) % (n * sizeof(T)) == 0;
}

// run(columns of a thread, whether adjacent ones are apart in memory)
template <typename T, typename Run>
auto with_columns(const Shape& shape, std::initializer_list<View> views, Run run) {
  const auto all = [&](int n) {
    return std::all_of(views.begin(), views.end(), [&](const View& view) { return words_of_rows<T>(shape, view, n); });
  };
  if (all(4)) return run(std::integral_constant<int, 4>{}, std::false_type{});
  if (all(2)) return run(std::integral_constant<int, 2>{}, std::false_type{});
  if (all(1)) return run(std::integral_constant<int, 1>{}, std::false_type{});
  return run(std::integral_constant<int, 1>{}, std::true_type{});
}

template <typename T>
void launch_planes(const Shape& shape, const View& x, const View& z, const AxialWeights<float>& weights, bool reversed, void* stream) {
  with_columns<T>(shape, {x, z}, [&](auto columns, auto strided) {
    constexpr int N = decltype(columns)::value;
    constexpr bool kStrided = decltype(strided)::value;
    Walk plan = plane_walk<N>(shape);
    in_launches(plan, [&](int64_t blocks) {
      launch(axial_conv_planes_kernel<T, N, kStrided>, blocks, plan.threads, 0, stream, plan, x, z, weights, reversed);
    });
  });
}

// Sums of images and slices into what allocate(rows) returns, 16 C numbers for each of the rows.
template <typename T, typename Allocate>
void launch_plane_gradients(const Shape& shape, const View& grad, const View& x, const AxialWeights<float>& weights, Allocate allocate, void* stream) {
  with_columns<T>(shape, {grad, x}, [&](auto columns, auto strided) {
    constexpr int N = decltype(columns)::value;
    constexpr bool kStrided = decltype(strided)::value;
    Walk plan = plane_walk<N>(shape);
    float* partial = allocate(shape.batch * plan.slices());
    in_launches(plan, [&](int64_t blocks) {
      launch(axial_conv_plane_gradients_kernel<T, N, kStrided>, blocks, plan.threads, kGradients * kPlaneThreads * sizeof(float), stream, plan,
             grad, x, weights, partial);
    });
  });
}

}  // namespace spanet
