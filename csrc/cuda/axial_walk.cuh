// axial_conv with 7 taps in channels_last: threads walk down the rows.
//
// A unit is 32 channels of an image. A thread owns two adjacent channels, one word of memory, and N adjacent columns of a slice of the
// plane; 16 threads side by side share a column. Rows arrive in shared memory by 16-byte asynchronous copies, a few at a
// time, while those before them are computed; columns outside the plane are zeros there, so that no element is tested.
//
// A row of t is computed once. Six rows of z wait for further rows of t in registers: each row takes part in seven sums, of which one
// is complete and leaves by words. Multiply-adds per element: 14, as many as there are taps.
//
// Issue slots per element of whole planes of 56 columns in bf16 (fp32), counted in the code for sm_90: 14 multiply-adds, 1.3 loads
// from shared memory, 2.5 (0) conversions, 1 (0.5) to store, 3 for asynchronous copies, 5 for addresses and loops: 27 (26). Two
// blocks of 7 warps on a multiprocessor. Predicted for an H200, 128 x 64 x 56 x 56: 24 us of issue slots and 26 (50) of memory, 35 (55)
// us expected. Measured: 42 (59); 25 (30), 23 (24) at 28 and 14.
#pragma once

#include "axial_weights.cuh"
#include "moves.cuh"

namespace spanet {

constexpr int kWalkPairs = 16;                    // pairs of channels of a unit
constexpr int kUnitChannels = 2 * kWalkPairs;
constexpr int kWalkThreads = 256;
constexpr int kWalkHalo = kTaps / 2;

struct Spread { int columns, rows; };              // of the copies of a unit's threads, each of which makes one

struct Walk {
  unsigned units, first_unit;                     // units of the tensor, first one of this launch
  int channels, chunks, height, width;            // chunks: units of an image
  int together;                                   // units of a block
  int groups;                                     // threads side by side in a row of a slice
  int slices_h, slices_w, rows, columns;          // slices of a plane and their extent
  int pitch, pitch_without_halo;                  // of rows in shared memory, in elements
  Spread spread, spread_without_halo;
  int stage_rows;                                 // of all stages
  int threads, unit_bytes, bytes;

  MODES_FN int slices() const { return slices_h * slices_w; }
};

// Place of column e of a row in shared memory: COLUMNS of 64 bytes are kept off the banks of the next COLUMNS.
template <typename T, int COLUMNS>
MODES_FN constexpr int walk_slot(int e) { return (sizeof(T) == 2 ? e + e / COLUMNS : e) * kUnitChannels; }

template <int COLUMNS>
struct Walker {  // what a thread owns
  int thread, pair, group;             // in its unit
  unsigned batch;
  int slice, channel;                  // first channel of the unit
  int row, rows, column, columns;      // of the slice
  bool unit, active;                   // whether they exist: the unit; channels and columns of the thread

  __device__ Walker(const Walk& plan) {
    const int per_unit = plan.groups * kWalkPairs, place = threadIdx.x / per_unit;
    const unsigned blocks = blockIdx.x / plan.slices(), index = plan.first_unit + blocks * plan.together + place;
    slice = static_cast<int>(blockIdx.x - blocks * plan.slices());
    thread = threadIdx.x - place * per_unit;
    pair = thread % kWalkPairs;
    group = thread / kWalkPairs;
    batch = index / plan.chunks;
    channel = static_cast<int>(index - batch * plan.chunks) * kUnitChannels;
    row = slice / plan.slices_w * plan.rows;
    rows = min(plan.rows, plan.height - row);
    column = slice % plan.slices_w * plan.columns;
    columns = min(plan.columns, plan.width - column);
    unit = index < plan.units;
    active = unit && channel + 2 * pair < plan.channels && group * COLUMNS < columns;
  }
  __device__ char* memory(const Walk& plan, char* shared) const { return shared + threadIdx.x / (plan.groups * kWalkPairs) * plan.unit_bytes; }
};

// Rows of a slice in shared memory with HALO columns on either side, for the threads of a unit. WORDS: 16 bytes at a time, offsets
// in a plane below 2^31.
template <typename T, int COLUMNS, int HALO, bool WORDS>
struct SliceRows {
  using Offset = std::conditional_t<WORDS, int, int64_t>;
  static constexpr int kWord = WORDS ? 16 / sizeof(T) : 2, kWords = kUnitChannels / kWord;  // elements of a word, words of a column
  const T* from;        // the thread's word of slot 0 in row 0
  T* tile;
  unsigned copies;      // a byte each: first slot that the thread copies, end of the slots inside the plane, first row

  __device__ SliceRows(const Walk& plan, const Walker<COLUMNS>& own, const View& view, T* to) : tile(to) {
    const int word = own.thread % kWords * kWord, place = own.thread / kWords, begin = max(HALO - own.column, 0);
    const Spread spread = HALO ? plan.spread : plan.spread_without_halo;
    const int end = min(slots(plan), plan.width - own.column + HALO);
    from = static_cast<const T*>(view.data) + own.batch * view.b + (own.channel + word) * view.c + (own.column - HALO) * view.w;
    // zeros outside the plane
#pragma unroll 1
    for (int e = own.group; e < slots(plan); e += plan.groups) {
      if (e >= begin && e < end) continue;
#pragma unroll 1
      for (int r = 0; r < plan.stage_rows; ++r)
        *reinterpret_cast<typename Columns<T, 2>::Words*>(tile + r * pitch(plan) + walk_slot<T, COLUMNS>(e) + 2 * own.pair) = {};
    }
    const int row = place / spread.columns;
    const bool some = own.unit && own.channel + word < plan.channels && row < spread.rows;
    copies = static_cast<unsigned>((begin + place - row * spread.columns) | (some ? end : 0) << 8 | row << 16);
  }

  __device__ static int pitch(const Walk& plan) { return HALO ? plan.pitch : plan.pitch_without_halo; }
  __device__ static int slots(const Walk& plan) { return plan.columns + 2 * HALO; }

  // Starts the copy of rows first .. first + rows - 1, those of them in low .. high - 1, to the tile from row `at` on.
  __device__ void load(const Walk& plan, const Walker<COLUMNS>& own, const View& view, int first, int rows, int low, int high, int at) const {
    const Spread spread = HALO ? plan.spread : plan.spread_without_halo;
    const Offset along = static_cast<Offset>(view.w), down = static_cast<Offset>(view.h), step = spread.rows * down;
#pragma unroll 1
    for (int e = copies & 255, end = copies >> 8 & 255, row = copies >> 16; e < end; e += plan.groups * kWalkPairs / kWords) {
      int i = first + row;
      const T* source = from + (i * down + e * along);
      T* to = tile + (at + row) * pitch(plan) + walk_slot<T, COLUMNS>(e);
#pragma unroll 1
      for (; i < first + rows; i += spread.rows, source += step, to += spread.rows * pitch(plan)) {
        if (i < low || i >= high) continue;
        if constexpr (WORDS) copy_word_async(to + own.thread % kWords * kWord, source);
        else
          for (int c = 0; c < min(plan.channels - own.channel - 2 * own.pair, 2); ++c) to[2 * own.pair + c] = source[c * view.c];
      }
    }
  }

  // The channels of the thread in its columns, from slot 0 on.
  __device__ const T* of(const Walk& plan, const Walker<COLUMNS>& own, int r) const {
    return tile + r * pitch(plan) + walk_slot<T, COLUMNS>(own.group * COLUMNS) + 2 * own.pair;
  }
};

template <typename T>
__device__ void load_pair(const T* from, float (&x)[2]) {
  Columns<T, 2> word;
  word.load(from);
  word.get(x);
}

template <int C>
struct WalkTaps {  // weights of C channels
  float value[kTaps][C];

  // Zeros where there is no second channel.
  __device__ WalkTaps(const Kernel<float>& kernel, int channel, int channels, bool reversed) {
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int d = 0; d < kTaps; ++d)
        value[d][c] = channel + c < channels ? kernel.data[(channel + c) * kernel.c + (reversed ? kTaps - 1 - d : d) * kernel.k] : 0.f;
  }
};

template <int C>
__device__ void load_bias(const float* bias, int64_t step, int channel, int channels, float (&out)[C]) {
#pragma unroll
  for (int c = 0; c < C; ++c) out[c] = bias && channel + c < channels ? bias[(channel + c) * step] : 0.f;
}

template <int N, int C>
struct ConvolutionWalk {  // N columns of C channels on the way down
  WalkTaps<C> row, column;
  float row_bias[C], column_bias[C];
  float sums[kTaps - 1][N][C];  // rows i - 3 .. i + 2 of z before row i of t

  __device__ ConvolutionWalk(const AxialWeights<float>& weights, int channel, int channels, bool reversed)
      : row(weights.row, channel, channels, reversed), column(weights.column, channel, channels, reversed) {
    load_bias(weights.row_bias, weights.row_bias_c, channel, channels, row_bias);
    load_bias(weights.column_bias, weights.column_bias_c, channel, channels, column_bias);
#pragma unroll
    for (int o = 0; o < kTaps - 1; ++o)
#pragma unroll
      for (int v = 0; v < N; ++v)
#pragma unroll
        for (int c = 0; c < C; ++c) sums[o][v][c] = column_bias[c];
  }

  // Row i of x, three columns more on either side, completes row i - 3 of z.
  __device__ void advance(const float (&x)[N + kTaps - 1][C], float (&z)[N][C]) {
#pragma unroll
    for (int v = 0; v < N; ++v)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float t = row_bias[c];
#pragma unroll
        for (int d = 0; d < kTaps; ++d) t += row.value[d][c] * x[v + d][c];
        z[v][c] = sums[0][v][c] + column.value[kTaps - 1][c] * t;
#pragma unroll
        for (int o = 1; o < kTaps - 1; ++o) sums[o - 1][v][c] = sums[o][v][c] + column.value[kTaps - 1 - o][c] * t;
        sums[kTaps - 2][v][c] = column_bias[c] + column.value[0][c] * t;
      }
  }

  // The same below the plane, where t is no more; z is sums[0] before.
  __device__ void advance() {
#pragma unroll
    for (int o = 1; o < kTaps - 1; ++o)
#pragma unroll
      for (int v = 0; v < N; ++v)
#pragma unroll
        for (int c = 0; c < C; ++c) sums[o - 1][v][c] = sums[o][v][c];
  }
};

constexpr int kWalkColumns = 4, kWalkStages = 3;
template <typename T> constexpr int kWalkBand = 8 / sizeof(T);  // rows that arrive together

// z of x, or with reversed weights the gradient of x of that of z.
template <typename T, bool WORDS>
__global__ void __launch_bounds__(kWalkThreads, 2)
    axial_conv_walk_kernel(const __grid_constant__ Walk plan, View x, View z, AxialWeights<float> weights, bool reversed) {
  constexpr int N = kWalkColumns, kBand = kWalkBand<T>;
  using Offset = std::conditional_t<WORDS, int, int64_t>;
  DYNAMIC_SHARED(memory);
  const Walker<N> own(plan);
  const int first = max(own.row - kWalkHalo, 0), last = min(own.row + own.rows + kWalkHalo, plan.height);
  const SliceRows<T, N, kWalkHalo, WORDS> in(plan, own, x, reinterpret_cast<T*>(own.memory(plan, memory)));
  const auto load = [&](int band) {
    in.load(plan, own, x, first + band * kBand, kBand, first, last, band % kWalkStages * kBand);
    copies_commit();
  };
#pragma unroll 1
  for (int band = 0; band < kWalkStages - 1; ++band) load(band);
  const int channel = own.channel + 2 * own.pair;
  ConvolutionWalk<N, 2> walk(weights, own.active ? channel : 0, plan.channels, reversed);
  T* out = static_cast<T*>(z.data) + own.batch * z.b + channel * z.c + (own.column + own.group * N) * z.w + own.row * z.h;
  const int columns = own.columns - own.group * N;
  const auto store = [&](const float (&values)[N][2]) {
    const Offset along = static_cast<Offset>(z.w);
    T* to = out;
    out += static_cast<Offset>(z.h);
#pragma unroll
    for (int v = 0; v < N; ++v, to += along) {
      if (v >= columns) break;
      if constexpr (WORDS) {
        Columns<T, 2> word;
        word.set(values[v]);
        word.store(to);
      } else {
        narrow(values[v][0], to[0]);
        if (channel + 1 < plan.channels) narrow(values[v][1], to[z.c]);
      }
    }
  };
#pragma unroll 1
  for (int band = 0; first + band * kBand < last; ++band) {
    copies_wait_but<kWalkStages - 2>();
    __syncthreads();
    load(band + kWalkStages - 1);
    if (!own.active) continue;
    const T* from = in.of(plan, own, band % kWalkStages * kBand);
#pragma unroll 1
    for (int i = first + band * kBand; i < min(first + (band + 1) * kBand, last); ++i, from += plan.pitch) {
      float window[N + kTaps - 1][2], complete[N][2];
#pragma unroll
      for (int e = 0; e < N + kTaps - 1; ++e) load_pair(from + walk_slot<T, N>(e), window[e]);
      walk.advance(window, complete);
      if (i - kWalkHalo >= own.row) store(complete);
    }
  }
  if (!own.active) return;
#pragma unroll 1
  for (int i = last; i < own.row + own.rows + kWalkHalo; ++i, walk.advance())
    if (i - kWalkHalo >= own.row) store(walk.sums[0]);
}

// Whether words of so many bytes in the channels of a tensor are whole and aligned, and offsets in a plane below 2^31.
inline bool words_of_channels(const Shape& shape, const View& view, int64_t size, int64_t bytes) {
  const int64_t word = bytes / size;
  const auto whole = [&](int64_t extent, int64_t stride) { return extent == 1 || stride % word == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % bytes == 0 && shape.channels % word == 0 && (shape.channels == 1 || view.c == 1) &&
         whole(shape.batch, view.b) && whole(shape.height, view.h) && whole(shape.width, view.w) &&
         (shape.height + kWalkHalo) * view.h + (shape.width + kUnitChannels) * view.w < INT32_MAX;
}

// Threads of a unit copy as many whole rows at a time as they can, each thread a word or a pair of a column.
template <typename T>
void spread_copies(Walk& plan, bool words) {
  const int threads = plan.groups * kWalkPairs * (words ? 16 / static_cast<int>(sizeof(T)) : 2) / kUnitChannels;
  const auto spread = [&](int slots) {
    const int columns = std::min({slots, plan.width, threads});
    return Spread{columns, std::max(threads / columns, 1)};
  };
  plan.spread = spread(plan.columns + 2 * kWalkHalo);
  plan.spread_without_halo = spread(plan.columns);
}

// Slices of about equal extent, of at most 64 rows and so many groups of columns.
inline Walk make_walk(const Shape& shape, int64_t channels, int64_t columns, int64_t most_groups) {
  constexpr int64_t kRows = 64;
  Walk plan{};
  plan.channels = static_cast<int>(shape.channels);
  plan.chunks = static_cast<int>(ceil_div(shape.channels, channels));
  plan.units = static_cast<unsigned>(shape.batch * plan.chunks);
  plan.height = static_cast<int>(shape.height);
  plan.width = static_cast<int>(shape.width);
  plan.rows = static_cast<int>(ceil_div(shape.height, ceil_div(shape.height, kRows)));
  plan.slices_h = static_cast<int>(ceil_div(shape.height, plan.rows));
  const int64_t groups = ceil_div(shape.width, columns);
  plan.groups = static_cast<int>(ceil_div(groups, ceil_div(groups, most_groups)));
  plan.columns = plan.groups * static_cast<int>(columns);
  plan.slices_w = static_cast<int>(ceil_div(shape.width, plan.columns));
  plan.together = 1;
  return plan;
}

// channels_last.
template <typename T, int COLUMNS>
Walk make_walk(const Shape& shape) {
  constexpr int kGroups = kWalkThreads / kWalkPairs;
  Walk plan = make_walk(shape, kUnitChannels, COLUMNS, kGroups);
  const auto groups = [&] { return plan.together * plan.groups; };
  while (2 * groups() <= kGroups && (groups() % 2 == 1 || groups() < kGroups / 2)) plan.together *= 2;  // whole warps, 128 threads if possible
  plan.threads = plan.together * plan.groups * kWalkPairs;
  plan.pitch = walk_slot<T, COLUMNS>(plan.columns + 2 * kWalkHalo - 1) + kUnitChannels;
  plan.pitch_without_halo = walk_slot<T, COLUMNS>(plan.columns - 1) + kUnitChannels;
  return plan;
}

// Calls run(blocks) for ranges of blocks that a launch can have.
template <typename Run>
void in_launches(Walk& plan, Run run) {
  const int64_t most = kMaxBlocks / plan.slices() * plan.together;
  for (int64_t first = 0; first < plan.units; first += most) {
    plan.first_unit = static_cast<unsigned>(first);
    run(ceil_div(std::min(plan.units - first, most), plan.together) * plan.slices());
  }
}

template <typename T>
Walk convolution_walk(const Shape& shape) {
  Walk plan = make_walk<T, kWalkColumns>(shape);
  plan.stage_rows = kWalkStages * kWalkBand<T>;
  plan.unit_bytes = plan.stage_rows * plan.pitch * static_cast<int>(sizeof(T));
  plan.bytes = plan.together * plan.unit_bytes;
  return plan;
}

template <typename T>
void launch_walk(const Shape& shape, const View& x, const View& z, const AxialWeights<float>& weights, bool reversed, void* stream) {
  Walk plan = convolution_walk<T>(shape);
  const auto run = [&](auto kernel) {
    in_launches(plan, [&](int64_t blocks) { launch(kernel, blocks, plan.threads, plan.bytes, stream, plan, x, z, weights, reversed); });
  };
  const bool words = words_of_channels(shape, x, sizeof(T), 16) && words_of_channels(shape, z, sizeof(T), 2 * sizeof(T));
  spread_copies<T>(plan, words);
  if (words) run(axial_conv_walk_kernel<T, true>);
  else run(axial_conv_walk_kernel<T, false>);
}

}  // namespace spanet
