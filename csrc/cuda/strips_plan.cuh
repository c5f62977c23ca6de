// From shapes and strides to strips. Runs on the host.
//
// The plan depends on H, W, C, the dtype, the layout and the device, never on the batch: a plane gets the same bits
// whatever comes with it.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "moves.cuh"
#include "strips.cuh"

namespace spanet {

constexpr int kSmallBlock = 128;                    // threads up to which small planes are gathered
constexpr int64_t kPartialBytes = 256 << 20;        // partial sums of one launch

// tiles: operands that share a block's memory; values: numbers per thread that are summed over the block.
template <typename T>
Strips make_strips(const char* op, const Shape& shape, int64_t halo, int64_t radius_squared, int tiles, int64_t values, int64_t shared_limit) {
  using W = Wide<T>;
  const int64_t size = sizeof(T), all_strips = ceil_div(shape.height, kStrip), all_groups = ceil_div(shape.width, kGroup);
  int64_t planes = 1, groups = 1, strips = 1;
  Strips plan{};
  for (int64_t threads = kStripThreads;; threads /= 2) {
    if (threads == 0) throw std::runtime_error(std::string(op) + ": too little shared memory for a neighbourhood of " + std::to_string(halo));
    planes = shape.channels_last ? std::min({shape.channels, 32 / size, threads}) : 1;  // a sector of memory
    plan.slices_w = static_cast<int>(ceil_div(all_groups, threads / planes));
    groups = ceil_div(all_groups, plan.slices_w);  // slices of equal size
    plan.slices_h = static_cast<int>(ceil_div(all_strips, threads / (planes * groups)));
    strips = ceil_div(all_strips, plan.slices_h);
    if (plan.slices() == 1 && !shape.channels_last) planes = std::max<int64_t>(std::min<int64_t>(threads, kSmallBlock) / (strips * groups), 1);
    if (plan.slices() == 1 && shape.channels_last)
      while (2 * planes * strips * groups <= threads && 2 * planes <= shape.channels) planes *= 2;
    plan.rows = static_cast<int>(plan.slices_h == 1 ? shape.height : std::min(shape.height, strips * kStrip + 2 * halo));
    plan.columns = static_cast<int>(plan.slices_w == 1 ? shape.width : std::min(shape.width, groups * kGroup + 2 * halo));
    plan.threads = static_cast<int>(ceil_div(planes * strips * groups, 32) * 32);
    const int64_t tile_bytes = ceil_div((planes * plan.rows * plan.columns + 16 / size) * size, 16) * 16;
    int64_t bytes = tiles * tile_bytes;
    const auto reserve = [&](int64_t count) {
      const int64_t offset = bytes;
      bytes += ceil_div(count * sizeof(W), 16) * 16;
      return static_cast<int>(std::min(offset, shared_limit));
    };
    plan.sums = reserve(values * plan.threads);
    plan.table_h = reserve(strips * kStrip * 2 * kFrequencies);
    plan.table_w = reserve(groups * kGroup * 2 * kFrequencies);
    plan.tile_bytes = static_cast<int>(std::min(tile_bytes, shared_limit));
    plan.bytes = static_cast<int>(std::min(bytes, shared_limit + 1));
    if (bytes <= shared_limit) break;
  }
  plan.batch = shape.batch;
  plan.channels = static_cast<int>(shape.channels);
  plan.chunks = static_cast<int>(ceil_div(shape.channels, planes));
  plan.height = static_cast<int>(shape.height);
  plan.width = static_cast<int>(shape.width);
  plan.channels_last = shape.channels_last;
  plan.planes = static_cast<int>(planes);
  plan.row_pitch = static_cast<int>(shape.channels_last ? planes * plan.columns : plan.columns);
  plan.plane_pitch = shape.channels_last ? 1 : plan.rows * plan.columns;
  plan.column_pitch = shape.channels_last ? plan.planes : 1;
  plan.tiles = shape.channels_last ? shape.batch * plan.chunks : ceil_div(shape.batch * shape.channels, planes);
  plan.halo = static_cast<int>(halo);
  plan.strips = static_cast<int>(strips);
  plan.groups = static_cast<int>(groups);
  plan.functions_h = static_cast<int>(functions(shape.height, radius_squared));
  plan.functions_w = static_cast<int>(functions(shape.width, radius_squared));
  plan.blocks_h = plan.functions_h < 2 ? plan.functions_h : (plan.functions_h + 2) / 4;  // the constant and 4 functions, then 4 more each
  plan.blocks_w = plan.functions_w < 2 ? plan.functions_w : (plan.functions_w + 2) / 4;
  plan.amplitude = 1 / std::sqrt(static_cast<double>(shape.height) * static_cast<double>(shape.width));
  plan.lanes = 32;
  while (plan.lanes > 1 && plan.planes * kWaves * plan.lanes > plan.threads) plan.lanes /= 2;
  return plan;
}

// The way of a tensor to and from the tiles: columns are cut where no word begins.
inline View with_move(const Shape& shape, const Strips& plan, View view, int64_t size) {
  view.move = plan.slices_w > 1 && !shape.channels_last ? Move::kElements : movement(shape, plan, view, size);
  return view;
}

// Whether threads can read 4 adjacent elements at a time.
template <typename T>
bool vectors(const Shape& shape, const Strips& plan, std::initializer_list<const void*> addresses) {
  return sizeof(T) < 8 && !shape.channels_last && plan.slices_w == 1 && vector_columns(shape, sizeof(T), addresses) == kGroup;
}

// Calls run(blocks) for ranges of tiles that need up to kPartialBytes, a range being whole images or contiguous planes.
template <typename Run>
void in_ranges(Strips& plan, int64_t bytes_per_plane, Run run) {
  const int64_t unit = plan.channels_last ? plan.chunks : 1, planes = plan.channels_last ? plan.channels : plan.planes;
  const int64_t most = std::min(kPartialBytes / std::max<int64_t>(1, bytes_per_plane * planes), kMaxBlocks / (unit * plan.slices()));
  const int64_t units = std::clamp<int64_t>(most, 1, ceil_div(plan.tiles, unit)), all = plan.batch * plan.channels;
  for (int64_t first = 0; first * unit < plan.tiles; first += units) {
    plan.first_tile = first * unit;
    plan.first_plane = first * planes;
    plan.range_planes = std::min(units * planes, all - plan.first_plane);
    run(std::min(units * unit, plan.tiles - plan.first_tile) * plan.slices());
  }
}

template <typename W>
void sum_partial(const W* partial, int64_t rows, int64_t columns, const Parts<W>& parts, void* stream) {
  const auto run = [&](auto teams) {
    launch(sum_kernel<W, decltype(teams)::value>, ceil_div(columns, kSumColumns), kSumColumns * teams, 0, stream, partial, rows, columns, parts);
  };
  if (rows < 64) run(std::integral_constant<int, 8>{});
  else run(std::integral_constant<int, 32>{});
}

// Launches with coefficients (B, C, A_H, A_W) as a result: where a plane has several blocks, their partial ones are summed afterwards.
template <typename W, typename Launch>
void with_coefficients(Strips& plan, W* coefficients, Device& device, Launch run) {
  const int64_t modes = int64_t{plan.functions_h} * plan.functions_w, bytes = modes * plan.slices() * sizeof(W);
  W* partial = nullptr;
  in_ranges(plan, plan.slices() > 1 ? bytes : 0, [&](int64_t blocks) {
    W* out = coefficients + plan.first_plane * modes;
    if (plan.slices() > 1 && modes > 0 && !partial) partial = static_cast<W*>(device.allocate(bytes * plan.range_planes));
    run(blocks, plan.slices() > 1 ? partial : out);
    if (partial) sum_partial(partial, plan.slices(), plan.range_planes * modes, Parts<W>{{out}, {plan.range_planes * modes}}, device.stream);
  });
}

}  // namespace spanet
