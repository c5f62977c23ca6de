// A tile: the planes, or the slice of a plane, that a block keeps in shared memory.
//
// Contiguous tensors: [plane p][row i][column j]; channels_last: [row i][column j][channel p]. Either way the rows are
// `row_pitch` elements apart and the tile is traversed in memory order. It moves in one of three ways: as one run of
// 16-byte words whatever the alignment (the tile is displaced like the tensor), as aligned words, or by elements.
#pragma once

#include <type_traits>

#include "operators.h"

#if defined(__CUDACC__)
#include "primitives.cuh"
#else
#include "shim.h"
#endif

namespace spanet {

template <typename T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack { T v[N]; };

template <typename T, int VEC>
struct Columns {  // VEC adjacent elements of a row; 16-bit ones in pairs, which saves instructions
  static constexpr bool kPairs = sizeof(T) == 2 && VEC % 2 == 0;
  using Word = std::conditional_t<kPairs, uint32_t, T>;
  using Words = Pack<Word, kPairs ? VEC / 2 : VEC>;
  Words words{};

  __device__ void load(const T* from) { words = *reinterpret_cast<const Words*>(from); }
  __device__ void store(T* to) const { *reinterpret_cast<Words*>(to) = words; }
  __device__ void get(Wide<T> (&out)[VEC]) const {
#pragma unroll
    for (int k = 0; k < VEC; k += 1 + kPairs)
      if constexpr (kPairs) widen_pair(words.v[k / 2], static_cast<const T*>(nullptr), out + k);
      else out[k] = widen(words.v[k]);
  }
  __device__ void set(const Wide<T> (&in)[VEC]) {
#pragma unroll
    for (int k = 0; k < VEC; k += 1 + kPairs)
      if constexpr (kPairs) words.v[k / 2] = narrow_pair(in + k, static_cast<const T*>(nullptr));
      else narrow(in[k], words.v[k]);
  }
};

struct Tiling {  // how the planes of a tensor fall into tiles
  int64_t batch, tiles, first_tile;
  int channels, chunks, height, width;      // chunks: tiles side by side in the channels of an image (channels_last)
  bool channels_last;
  bool mirrored;                            // a tile has rows m and H - m, not one band of rows
  int planes, pairs, columns, rows;         // extent of a tile; rows = 2 pairs if mirrored
  int row_pitch, plane_pitch, column_pitch; // in elements of the tile
};

struct Slice {  // the share of one block
  unsigned batch;                     // of its first plane
  int channel, planes;                // of its first plane; how many exist
  int row, rows, column, columns;     // first row and column of the slice, their counts
  int pair, pairs;                    // the same of its row pairs, if it is mirrored
  int index;                          // its place in the plane
};

// The planes of a tile.
__device__ inline Slice planes_of(const Tiling& plan, int64_t tile) {
  Slice s{};
  if (plan.channels_last) {
    const int chunks = plan.chunks;
    s.batch = static_cast<unsigned>(tile / chunks);
    s.channel = static_cast<int>(tile - static_cast<int64_t>(s.batch) * chunks) * plan.planes;
    s.planes = min(plan.planes, plan.channels - s.channel);
  } else {
    const int64_t plane = tile * plan.planes;
    s.batch = static_cast<unsigned>(plane / plan.channels);
    s.channel = static_cast<int>(plane - static_cast<int64_t>(s.batch) * plan.channels);
    const int64_t left = plan.batch * plan.channels - plane;
    s.planes = left < plan.planes ? static_cast<int>(left) : plan.planes;
  }
  return s;
}

// Row pair m is (m, H - m); m = 0 and m = H / 2 have no partner.
__device__ inline bool has_partner(int m, int height) { return static_cast<unsigned>(m - 1) < static_cast<unsigned>((height - 1) / 2); }

struct Plane { int64_t batch; int channel; };

__device__ inline Plane plane_of(const Tiling& plan, const Slice& s, int p) {
  const unsigned flat = static_cast<unsigned>(s.channel) + static_cast<unsigned>(p);
  if (plan.channels_last) return {s.batch, static_cast<int>(flat)};
  const unsigned images = flat / plan.channels;
  return {int64_t{s.batch} + images, static_cast<int>(flat - images * plan.channels)};
}

// Calls visit(tile index, global offset) for every STEP-th element of the tile that exists, in memory order.
template <int STEP, typename Visit>
__device__ void traverse(const Tiling& plan, const Slice& s, const View& view, Visit visit) {
  const int inner = plan.channels_last ? plan.planes : plan.columns;
  const int middle = plan.channels_last ? plan.columns : plan.rows;
  const int count = plan.planes * plan.rows * plan.columns, stride = static_cast<int>(blockDim.x) * STEP;
  const int start = static_cast<int>(threadIdx.x) * STEP;
  int x = start % inner, y = start / inner % middle, z = start / inner / middle;
  const int dx = stride % inner, dy = stride / inner % middle, dz = stride / inner / middle;
  for (int e = start; e < count; e += stride) {
    const int p = plan.channels_last ? x : z, r = plan.channels_last ? z : y, j = plan.channels_last ? y : x;
    const bool low = plan.mirrored && r >= plan.pairs;
    const int m = plan.mirrored ? s.pair + r - (low ? plan.pairs : 0) : s.row + r;
    const bool row_exists = plan.mirrored ? m < s.pair + s.pairs && (!low || has_partner(m, plan.height)) : r < s.rows;
    if (row_exists && p < s.planes && j < s.columns) {
      const Plane plane = plane_of(plan, s, p);
      const int64_t i = low ? plan.height - m : m;
      visit(e, plane.batch * view.b + plane.channel * view.c + i * view.h + (s.column + j) * view.w);
    }
    // mixed-radix addition: no division per element
    x += dx;
    if (x >= inner) x -= inner, ++y;
    y += dy;
    if (y >= middle) y -= middle, ++z;
    z += dz;
  }
}

// First element of the slice, which is one run.
template <typename T>
__device__ T* run_of(const Slice& s, const View& view) {
  return static_cast<T*>(view.data) + s.batch * view.b + s.channel * view.c + s.row * view.h;
}

// Elements by which the tile is displaced so that its 16-byte words are those of the tensor.
template <typename T>
__device__ int displacement(const Slice& s, const View& view) {
  if (view.move != Move::kRun) return 0;
  return static_cast<int>((reinterpret_cast<uintptr_t>(run_of<T>(s, view)) & 15) / sizeof(T));
}

// Calls word(tile index, offset in the run) for the whole 16-byte words of a run of n elements displaced by shift, element(...) for its ends.
template <typename T, typename WordVisit, typename Visit>
__device__ void traverse_run(int n, int shift, WordVisit word, Visit element) {
  constexpr int kWord = 16 / sizeof(T);
  const int first = (shift + kWord - 1) / kWord, last = max(first, (shift + n) / kWord), thread = threadIdx.x;
  for (int k = first + thread; k < last; k += blockDim.x) word(k * kWord, k * kWord - shift);
  const int head = min(n, first * kWord - shift), tail = max(head, last * kWord - shift);
  if (thread < head) element(shift + thread, thread);
  if (tail + thread < n) element(shift + tail + thread, tail + thread);
}

// Starts the copy of the slice into shared memory; copies_wait and a barrier end it.
template <typename T>
__device__ void load_tile(const Tiling& plan, const Slice& s, const View& view, T* tile, int shift) {
  const T* data = static_cast<const T*>(view.data);
  if (view.move == Move::kRun) {
    const T* run = run_of<T>(s, view);
    traverse_run<T>(
        s.planes * s.rows * plan.width, shift, [&](int e, int from) { copy_word_async(tile + e, run + from); },
        [&](int e, int from) { tile[e] = run[from]; });
  } else if (view.move == Move::kWords) {
    traverse<16 / sizeof(T)>(plan, s, view, [&](int e, int64_t from) { copy_word_async(tile + e, data + from); });
  } else {
    traverse<1>(plan, s, view, [&](int e, int64_t from) { tile[e] = data[from]; });
  }
}

template <typename T>
__device__ void store_tile(const Tiling& plan, const Slice& s, const View& view, const T* tile, int shift) {
  T* data = static_cast<T*>(view.data);
  if (view.move == Move::kRun && displacement<T>(s, view) == shift) {
    T* run = run_of<T>(s, view);
    traverse_run<T>(
        s.planes * s.rows * plan.width, shift, [&](int e, int to) { copy_word(run + to, tile + e); },
        [&](int e, int to) { run[to] = tile[e]; });
  } else if (view.move == Move::kWords && shift == 0) {
    traverse<16 / sizeof(T)>(plan, s, view, [&](int e, int64_t to) { copy_word(data + to, tile + e); });
  } else {
    traverse<1>(plan, s, view, [&](int e, int64_t to) { data[to] = tile[shift + e]; });
  }
}

}  // namespace spanet
