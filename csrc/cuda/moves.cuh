// How a tensor's layout and alignment decide its way to and from the tiles. Runs on the host.
#pragma once

#include <initializer_list>

#include "tile.cuh"

namespace spanet {

constexpr int64_t kMaxBlocks = 0x7fffffff;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Adjacent columns per thread: 4, or what the width and the addresses allow.
inline int vector_columns(const Shape& shape, int64_t size, std::initializer_list<const void*> addresses) {
  if (size == 8) return 1;
  if (shape.channels_last) return 4;
  for (int vec : {4, 2}) {
    bool aligned = shape.width % vec == 0;
    for (const void* address : addresses) aligned = aligned && reinterpret_cast<uintptr_t>(address) % (vec * size) == 0;
    if (aligned) return vec;
  }
  return 1;
}

// Whether the planes of a contiguous tensor lie behind one another.
inline bool is_run(const Shape& shape, const View& view) {
  const auto [batch, channels, height, width, last] = shape;
  const int64_t plane = height * width;
  return !last && (width == 1 || view.w == 1) && (height == 1 || view.h == width) && (channels == 1 || view.c == plane) &&
         (batch == 1 || view.b == channels * plane);
}

// How a tensor moves to and from the tiles of a plan.
inline Move movement(const Shape& shape, const Tiling& plan, const View& view, int64_t size) {
  const auto [batch, channels, height, width, last] = shape;
  const int64_t word = 16 / size, plane = height * width;
  const bool rows = width == 1 || view.w == 1, planes = rows && (height == 1 || view.h == width);
  const bool bands = !plan.mirrored && plan.columns == width;  // of whole rows
  if (bands && is_run(shape, view)) return Move::kRun;
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && (batch == 1 || view.b % word == 0);
  if (last) {
    aligned = aligned && (channels == 1 || view.c == 1) && (height == 1 || view.h % word == 0) && (width == 1 || view.w % word == 0);
    return aligned && channels % word == 0 && plan.planes % word == 0 ? Move::kWords : Move::kElements;
  }
  aligned = aligned && (channels == 1 || view.c % word == 0);
  const bool words_in_rows = rows && (height == 1 || view.h % word == 0) && width % word == 0 && plan.columns % word == 0;
  const bool words_in_planes = bands && plan.rows == height && planes && plane % word == 0;
  return aligned && (words_in_rows || words_in_planes) ? Move::kWords : Move::kElements;
}

}  // namespace spanet
