// From shapes and strides to launches: which tile, how many threads, one launch or two. Runs on the host.
//
// The plan depends on H, W, C, the dtype, the layout and the device, never on the batch: a plane gets the same bits
// whatever comes with it.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "moves.cuh"
#include "radial_filter_reduce.cuh"
#include "large_filter.cuh"
#include "resident_modes_plan.cuh"

namespace spanet {

constexpr int64_t kTileBytes = 24 << 10;        // small planes are gathered up to this: several blocks per multiprocessor
constexpr int64_t kSliceBytes = 48 << 10;       // slices of large planes

// tiles: operands that share a block's memory. Returns a plan with threads = 0 if whole planes do not fit.
template <typename T, int FB>
Plan make_plan(const Shape& shape, int64_t radius_squared, int vec, int tiles, bool whole, int64_t shared_limit) {
  using W = Wide<T>;
  const int64_t size = sizeof(T), height = shape.height, width = shape.width, all_pairs = height / 2 + 1;
  const int64_t most_columns = int64_t{kMaxThreads} * vec, channels = ceil_div(shape.channels, 4) * 4;
  const int64_t frequency = integer_root(spectrum_limit(shape, radius_squared));
  int64_t planes = shape.channels_last ? std::min(channels, std::max<int64_t>(4, 32 / size)) : 1, columns = width, pairs = all_pairs;
  if (!whole) {
    const int64_t most = 2048 / sizeof(W);  // keeps the tables of cosines small
    columns = std::min({width, most, most_columns / planes / 4 * 4});
    const int64_t fit = std::min(kSliceBytes, shared_limit / 4) / (2 * columns * planes * size * tiles);
    pairs = ceil_div(all_pairs, ceil_div(all_pairs, std::clamp<int64_t>(fit, 1, most)));
  }
  Plan plan{};
  const int64_t rows = whole ? height : 2 * pairs, slices_h = ceil_div(all_pairs, pairs), slices_w = ceil_div(width, columns);
  if (columns * planes > most_columns || columns * planes * rows * size > shared_limit) return plan;
  if (slices_h * slices_w == 1) {
    const int64_t coefficients = kFunctions<FB> * kRow<FB> * sizeof(W);
    const int64_t fit = std::min({kTileBytes / (columns * rows * size * tiles), kTileBytes / coefficients, most_columns / columns});
    if (shape.channels_last) {
      while (2 * planes <= fit && planes < channels) planes *= 2;
      planes = std::min(planes, channels);
    } else {
      planes = std::max<int64_t>(fit, 1);
    }
  }
  const int64_t groups = planes * columns / vec, tile_bytes = ceil_div(planes * rows * columns * size + 16, 16) * 16;
  // 1024 threads to a multiprocessor full of tiles
  const int64_t wanted = (tiles * tile_bytes / 208 + groups / 2) / groups;
  const int64_t teams = std::clamp<int64_t>(wanted, 1, std::min({int64_t{8}, pairs, kMaxThreads / groups}));
  const int64_t threads = std::max<int64_t>(ceil_div(groups * teams, 32) * 32, 96);
  int64_t lanes = 32;
  while (lanes > 1 && (planes * kChunk * lanes > threads || lanes * 12 > columns)) lanes /= 2;  // a dozen columns to a lane

  int64_t bytes = tiles * tile_bytes;
  const auto reserve = [&](int64_t count) {
    const int64_t offset = bytes;
    bytes += ceil_div(count * sizeof(W), 16) * 16;
    return static_cast<int>(std::min<int64_t>(offset, shared_limit));
  };
  plan.sums = reserve(kChunk * planes * columns);
  plan.coefficients = reserve(planes * kFunctions<FB> * kRow<FB>);
  plan.table_h = reserve(pairs * 2 * FB);
  plan.table_w = reserve(columns * 2 * FB);
  if (bytes > shared_limit) return plan;

  plan.batch = shape.batch;
  plan.channels = static_cast<int>(shape.channels);
  plan.chunks = static_cast<int>(ceil_div(shape.channels, planes));
  plan.height = static_cast<int>(height);
  plan.width = static_cast<int>(width);
  plan.radius_squared = radius_squared;
  plan.inverse_area = 1.0 / (static_cast<double>(height) * static_cast<double>(width));
  plan.channels_last = shape.channels_last;
  plan.mirrored = !whole;
  plan.planes = static_cast<int>(planes);
  plan.pairs = static_cast<int>(pairs);
  plan.columns = static_cast<int>(columns);
  plan.rows = static_cast<int>(rows);
  plan.row_pitch = static_cast<int>(shape.channels_last ? planes * columns : columns);
  plan.plane_pitch = static_cast<int>(shape.channels_last ? 1 : rows * columns);
  plan.column_pitch = static_cast<int>(shape.channels_last ? planes : 1);
  plan.low = static_cast<int>(whole ? height : pairs) * plan.row_pitch;
  plan.low_pitch = whole ? -plan.row_pitch : plan.row_pitch;
  plan.slices_h = static_cast<int>(slices_h);
  plan.slices_w = static_cast<int>(slices_w);
  plan.blocks_h = static_cast<int>(std::max<int64_t>(1, ceil_div(std::min(frequency, height / 2), FB)));
  plan.blocks_w = static_cast<int>(std::max<int64_t>(1, ceil_div(std::min(frequency, width / 2), FB)));
  plan.tiles = shape.channels_last ? shape.batch * ceil_div(shape.channels, planes) : ceil_div(shape.batch * shape.channels, planes);
  plan.teams = static_cast<int>(teams);
  plan.lanes = static_cast<int>(lanes);
  plan.tile_bytes = static_cast<int>(tile_bytes);
  plan.bytes = static_cast<int>(bytes);
  plan.threads = static_cast<int>(threads);
  return plan;
}

// Shells of the plan: small tables travel with the launch, larger ones are computed on the device.
inline void attach_shells(Plan& plan, int64_t count, Device& device) {
  if (count <= kSmallShells) {
    const auto table = shell_table(count - 1);
    std::copy(table.begin(), table.end(), plan.small_shells);
    return;
  }
  auto* table = static_cast<int32_t*>(device.allocate(count * sizeof(int32_t)));
  launch(shell_kernel, 1, kShellThreads, 0, device.stream, table, count);
  plan.shell_of = table;
}

// Partial coefficients of one plane.
template <int FB> int64_t partial_size(const Plan& plan) {
  return int64_t{plan.slices()} * plan.blocks_h * plan.blocks_w * kFunctions<FB> * kFunctions<FB>;
}

template <typename T>
void RadialFilter<T>::forward(const Shape& shape, View x, View y, const Profile<Wide<T>>& profile, int64_t radius_squared, Device& device) {
  using W = Wide<T>;
  if constexpr (sizeof(T) < 8)
    if (run_resident_filter<T>(shape, x, y, profile, radius_squared, device)) return;
  const int vec = vector_columns(shape, sizeof(T), {x.data, y.data});
  const int64_t limit = spectrum_limit(shape, radius_squared), frequency = integer_root(limit);
  const auto whole = [&](auto vec_constant, auto fb) {
    constexpr int VEC = decltype(vec_constant)::value, FB = decltype(fb)::value;
    Plan plan = make_plan<T, FB>(shape, radius_squared, VEC, 1, true, device.shared_limit);
    if (plan.threads == 0) return false;
    attach_shells(plan, limit + 1, device);
    x.move = movement(shape, plan, x, sizeof(T));
    y.move = movement(shape, plan, y, sizeof(T));
    for (; plan.first_tile < plan.tiles; plan.first_tile += kMaxBlocks)
      launch(filter_kernel<T, VEC, FB>, std::min(plan.tiles - plan.first_tile, kMaxBlocks), plan.threads, plan.bytes, device.stream, plan, x, y, profile,
             static_cast<const W*>(nullptr));
    return true;
  };
  const auto sliced = [&](auto vec_constant) {
    constexpr int VEC = decltype(vec_constant)::value, FB = kSlicedBlock;
    Plan plan = make_plan<T, FB>(shape, radius_squared, VEC, 1, false, device.shared_limit);
    if (plan.threads == 0) throw std::runtime_error("radial_filter: this device has too little shared memory");
    attach_shells(plan, limit + 1, device);
    x.move = movement(shape, plan, x, sizeof(T));
    y.move = movement(shape, plan, y, sizeof(T));
    // images (channels_last) or tiles at a time, so that the workspace stays small
    const int64_t unit = shape.channels_last ? ceil_div(shape.channels, plan.planes) : 1;
    const int64_t unit_planes = shape.channels_last ? shape.channels : plan.planes, unit_bytes = unit_planes * partial_size<FB>(plan) * sizeof(W);
    const int64_t most = std::min(kWorkspaceBytes / unit_bytes, kMaxBlocks / (unit * plan.slices()));
    const int64_t units = std::clamp<int64_t>(most, 1, ceil_div(plan.tiles, unit));
    auto* partial = static_cast<W*>(device.allocate(units * unit_bytes));
    for (int64_t first = 0; first * unit < plan.tiles; first += units) {
      plan.first_tile = first * unit;
      plan.first_plane = first * unit_planes;
      const int64_t blocks = std::min(units * unit, plan.tiles - plan.first_tile) * plan.slices();
      launch(reduce_kernel<T, VEC, FB>, blocks, plan.threads, plan.bytes, device.stream, plan, x, View{}, Workspace<W>{partial, nullptr, nullptr});
      launch(filter_kernel<T, VEC, FB>, blocks, plan.threads, plan.bytes, device.stream, plan, x, y, profile, static_cast<const W*>(partial));
    }
  };
  constexpr bool kVectors = sizeof(T) < 8;
  if constexpr (kVectors) {
    if (frequency <= 2 && vec == 4 && whole(Constant<4>{}, Constant<2>{})) return;
    if constexpr (sizeof(T) == 2)
      if (frequency <= 2 && vec == 2 && whole(Constant<2>{}, Constant<2>{})) return;
  }
  if (frequency <= 2 && vec != 4 && whole(Constant<1>{}, Constant<2>{})) return;
  if constexpr (kVectors) {
    if (run_large_filter<T>(shape, x, y, profile, radius_squared, device)) return;
    if (frequency <= kSlicedBlock && vec == 4 && whole(Constant<4>{}, Constant<kSlicedBlock>{})) return;
    if (vec == 4) return sliced(Constant<4>{});
  }
  if (frequency <= kSlicedBlock && whole(Constant<1>{}, Constant<kSlicedBlock>{})) return;
  sliced(Constant<1>{});
}

template <typename T>
void RadialFilter<T>::backward(const Shape& shape, View grad, View x, Wide<T>* base_grad, Wide<T>* gain_grad, int64_t radius_squared,
                               Device& device) {
  using W = Wide<T>;
  constexpr int FB = kSlicedBlock;
  if constexpr (sizeof(T) < 8)
    if (run_resident_backward<T>(shape, grad, x, base_grad, gain_grad, radius_squared, device)) return;
  const int64_t limit = spectrum_limit(shape, radius_squared);
  const auto reduce = [&](auto vec_constant) {
    constexpr int VEC = decltype(vec_constant)::value;
    Plan plan = make_plan<T, FB>(shape, radius_squared, VEC, 2, true, device.shared_limit);
    if (plan.threads == 0) plan = make_plan<T, FB>(shape, radius_squared, VEC, 2, false, device.shared_limit);
    if (plan.threads == 0) throw std::runtime_error("radial_filter_backward: this device has too little shared memory");
    attach_shells(plan, limit + 1, device);
    x.move = movement(shape, plan, x, sizeof(T));
    grad.move = movement(shape, plan, grad, sizeof(T));
    const int64_t planes = shape.batch * shape.channels, coefficients = planes * partial_size<FB>(plan);
    auto* memory = static_cast<W*>(device.allocate((2 * coefficients + planes * plan.slices()) * sizeof(W)));
    const Workspace<W> workspace{memory, memory + coefficients, memory + 2 * coefficients};
    for (; plan.first_tile < plan.tiles; plan.first_tile += kMaxBlocks / plan.slices())
      launch(reduce_kernel<T, VEC, FB>, std::min(plan.tiles - plan.first_tile, kMaxBlocks / plan.slices()) * plan.slices(), plan.threads, plan.bytes,
             device.stream, plan, x, grad, workspace);
    constexpr int kThreads = 128, kWarps = kThreads / 32;
    const int64_t tasks = limit + 2, blocks = ceil_div(tasks * shape.channels, kWarps);
    if (blocks > kMaxBlocks / kWarps) throw std::runtime_error("radial_filter_backward: too many channels and shells for one launch");
    launch(gradient_kernel<FB, W>, blocks, kThreads, 0, device.stream, plan, workspace, static_cast<unsigned>(tasks), base_grad, gain_grad);
  };
  if constexpr (sizeof(T) < 8)
    if (vector_columns(shape, sizeof(T), {x.data, grad.data}) == 4) return reduce(Constant<4>{});
  reduce(Constant<1>{});
}

}  // namespace spanet
