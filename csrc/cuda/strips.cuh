// Strips: how the operators that keep no plane between two launches share out a tensor (axial_conv, mode_coefficients).
//
// A block owns P planes of up to `strips` x 7 rows and `groups` x 4 columns and holds them, with `halo` neighbours on every side, in
// one tile of shared memory. A thread owns one strip, 7 rows x 4 columns of a plane, in registers: what it computes can be written
// over the tile once all threads have read their neighbourhoods. Contiguous: neighbouring threads own neighbouring columns;
// channels_last: neighbouring channels. VECTOR: contiguous rows of whole, aligned groups, read 4 elements at a time.
#pragma once

#include "basis.cuh"

namespace spanet {

constexpr int kStrip = 7;            // rows: the maps of a 224 x 224 image have 56, 28, 14 and 7
constexpr int kGroup = 4;            // columns
constexpr int kStripThreads = 256;
template <typename T> constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;  // of so many threads on a multiprocessor, at least
constexpr int kFrequencies = 2;      // frequencies of an axis at a time
constexpr int kWaves = kFunctions<kFrequencies>;

struct Strips : Tiling {
  int halo, strips, groups;
  int slices_h, slices_w;                           // blocks to a plane
  int functions_h, functions_w;                     // A_H, A_W: Fourier functions of the axes
  int blocks_h, blocks_w;                           // blocks of frequencies
  int threads, lanes;                               // lanes: threads to a sum over the strips of a plane
  int tile_bytes, sums, table_h, table_w, bytes;    // offsets in shared memory
  double amplitude;                                 // 1 / sqrt(H W)
  int64_t first_plane, range_planes;                // of this launch

  MODES_FN int slices() const { return slices_h * slices_w; }
  MODES_FN int tasks() const { return strips * groups; }  // of a plane
};

// What a block writes.
__device__ inline Slice own_slice(const Strips& plan) {
  Slice s = planes_of(plan, plan.first_tile + blockIdx.x / plan.slices());
  s.index = static_cast<int>(blockIdx.x % plan.slices());
  s.row = s.index / plan.slices_w * plan.strips * kStrip;
  s.rows = min(plan.strips * kStrip, plan.height - s.row);
  s.column = s.index % plan.slices_w * plan.groups * kGroup;
  s.columns = min(plan.groups * kGroup, plan.width - s.column);
  return s;
}

// What it reads.
__device__ inline Slice with_halo(const Strips& plan, Slice s) {
  s.rows = min(s.row + s.rows + plan.halo, plan.height);
  s.row = max(s.row - plan.halo, 0);
  s.rows -= s.row;
  s.columns = min(s.column + s.columns + plan.halo, plan.width);
  s.column = max(s.column - plan.halo, 0);
  s.columns -= s.column;
  return s;
}

__device__ inline int64_t plane_index(const Strips& plan, const Slice& s, int p) {
  const Plane plane = plane_of(plan, s, p);
  return plane.batch * plan.channels + plane.channel;
}

struct Task {  // the strip of a thread
  int p, row, column, rows, columns;  // its plane, its first row and column, how many exist
  bool active;

  __device__ Task(const Strips& plan, const Slice& own) {
    const int thread = threadIdx.x, outer = plan.channels_last ? plan.planes : plan.tasks(), high = thread / outer, low = thread - high * outer;
    p = plan.channels_last ? low : high;
    const int place = plan.channels_last ? high : low, strip = place / plan.groups;
    row = own.row + strip * kStrip;
    column = own.column + (place - strip * plan.groups) * kGroup;
    rows = min(kStrip, own.row + own.rows - row);
    columns = min(kGroup, own.column + own.columns - column);
    active = p < own.planes && rows > 0 && columns > 0;
  }
};

// The thread that owns strip `place` of plane p.
__device__ inline int thread_of(const Strips& plan, int p, int place) {
  return plan.channels_last ? place * plan.planes + p : p * plan.tasks() + place;
}

// Element (0, column of the task) of the task's plane, were row 0 in the tile.
template <typename T>
__device__ T* column_of(const Strips& plan, const Slice& loaded, const Task& task, T* tile) {
  return tile + task.p * plan.plane_pitch - loaded.row * plan.row_pitch + (task.column - loaded.column) * plan.column_pitch;
}

// The first `columns` elements of a group, 0 beyond.
template <typename T, bool VECTOR, typename W = Wide<T>>
__device__ void load_group(const T* from, int pitch, int columns, W (&x)[kGroup]) {
  if constexpr (VECTOR) {
    Columns<T, kGroup> words;
    words.load(from);
    words.get(x);
  } else {
#pragma unroll
    for (int v = 0; v < kGroup; ++v) x[v] = v < columns ? widen(from[v * pitch]) : W(0);
  }
}

// x of the strip, 0 beyond the plane.
template <typename T, bool VECTOR, typename W = Wide<T>>
__device__ void load_strip(const Strips& plan, const Task& task, const T* column, W (&x)[kStrip][kGroup]) {
#pragma unroll
  for (int r = 0; r < kStrip; ++r)
    if (task.active && r < task.rows) load_group<T, VECTOR>(column + (task.row + r) * plan.row_pitch, plan.column_pitch, task.columns, x[r]);
    else
#pragma unroll
      for (int v = 0; v < kGroup; ++v) x[r][v] = 0;
}

// Writes the strip, as far as the plane has it.
template <typename T, typename W = Wide<T>>
__device__ void store_strip(const Strips& plan, const Task& task, T* column, const W (&x)[kStrip][kGroup]) {
#pragma unroll
  for (int r = 0; r < kStrip; ++r) {
    T* to = column + (task.row + r) * plan.row_pitch;
#pragma unroll
    for (int v = 0; v < kGroup; ++v)
      if (task.active && r < task.rows && v < task.columns) narrow(x[r][v], to[v * plan.column_pitch]);
  }
}

// The block's own part of its tile, displaced by shift, to memory.
template <typename T>
__device__ void store_own(const Strips& plan, const Slice& own, const Slice& loaded, const View& view, const T* tile, int shift) {
  constexpr int kWord = 16 / sizeof(T);
  const int first = shift + (own.row - loaded.row) * plan.row_pitch + (own.column - loaded.column) * plan.column_pitch, rest = first % kWord;
  store_tile(plan, own, view, tile + first - rest, rest);
}

// emit(task, sum) for task < tasks, where share(task, lane, sum) adds what one of the lanes contributes. For all threads of the block.
template <typename W, int COUNT, typename Share, typename Emit>
__device__ void sum_by_lanes(const Strips& plan, int tasks, Share share, Emit emit) {
  const int thread = threadIdx.x, lane = thread & (plan.lanes - 1), step = plan.threads / plan.lanes;
#pragma unroll 1
  for (int first = 0; first < tasks; first += step) {
    const int task = first + thread / plan.lanes;
    W sum[COUNT] = {};
    if (task < tasks) share(task, lane, sum);
    for (int mask = plan.lanes / 2; mask > 0; mask /= 2)
#pragma unroll
      for (int k = 0; k < COUNT; ++k) sum[k] += exchange(sum[k], mask);
    if (task < tasks && lane == 0) emit(task, sum);
  }
}

template <typename W>
struct Parts {  // tensors that lie behind one another in the rows of a matrix of partial sums
  W* data[4];
  int64_t sizes[4];
};

constexpr int kSumColumns = 32;

// parts = sum over the rows of partial[rows][columns], in a fixed order and in fp64: few numbers, and no rounding is added.
template <typename W, int TEAMS>
__global__ void __launch_bounds__(kSumColumns* TEAMS) sum_kernel(const W* partial, int64_t rows, int64_t columns, Parts<W> parts) {
  __shared__ double sums[TEAMS][kSumColumns];
  const int lane = threadIdx.x % kSumColumns, team = threadIdx.x / kSumColumns;
  int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + lane;
  double sum = 0;
  if (column < columns)
#pragma unroll 4
    for (int64_t row = team; row < rows; row += TEAMS) sum += partial[row * columns + column];
  sums[team][lane] = sum;
  __syncthreads();
  if (team > 0 || column >= columns) return;
  for (int k = 1; k < TEAMS; ++k) sum += sums[k][lane];
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    if (column >= 0 && column < parts.sizes[part]) parts.data[part][column] = static_cast<W>(sum);
    column -= parts.sizes[part];
  }
}

}  // namespace spanet
