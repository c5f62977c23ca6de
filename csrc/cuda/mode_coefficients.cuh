// mode_coefficients on the GPU, Z[a][b] = sum_ij phi_a(i) phi_b(j) x[i][j], and its transpose add_modes,
//
//   y[i][j] = factor[i][j] (x[i][j] + sum_ab Z[a][b] phi_a(i) phi_b(j))
//
// each in one pass over strips (strips.cuh), for any radius: the strip stays in registers while the frequencies pass by, two of each
// axis at a time, so that 16-bit results are rounded once. Sums over a plane have one order; a plane that needs several blocks gets
// partial coefficients from each and a launch that adds them. No atomics.
//
// Bytes: mode_coefficients 1 read per element and 4 A_H A_W per plane; add_modes 1 read of x, 1 of factor, 1 write.
// Predicted for an H200 (copy 4.3 TB/s), not measured: radius 2, 56 x 56, 16 bits: 0.47 and 1.40 us per million elements; a strip
// takes about 9 issue slots per element in mode_coefficients (13 are there while 2 bytes arrive) and 17 of 40 in add_modes.
#pragma once

#include "strip_modes.cuh"
#include "strips_plan.cuh"

namespace spanet {

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(kStripThreads, kBlocks<T>) mode_coefficients_kernel(const __grid_constant__ Strips plan, View x, Wide<T>* out) {
  DYNAMIC_SHARED(memory);
  T* tile = reinterpret_cast<T*>(memory);
  const Slice own = own_slice(plan);
  const int shift = displacement<T>(own, x);
  load_tile(plan, own, x, tile, shift);
  copies_wait();
  __syncthreads();
  const Task task(plan, own);
  Wide<T> strip[kStrip][kGroup];
  load_strip<T, VECTOR>(plan, task, column_of(plan, own, task, tile + shift), strip);
  strip_coefficients(plan, own, task, strip, memory, out);
}

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(kStripThreads, kBlocks<T>)
    add_modes_kernel(const __grid_constant__ Strips plan, View x, View coefficients, View factor, View y) {
  using W = Wide<T>;
  DYNAMIC_SHARED(memory);
  T* tile = reinterpret_cast<T*>(memory);
  T* factors = reinterpret_cast<T*>(memory + plan.tile_bytes);
  const Slice own = own_slice(plan);
  const int shift = displacement<T>(own, x);
  load_tile(plan, own, x, tile, shift);
  if (factor.data) load_tile(plan, own, factor, factors, displacement<T>(own, factor));
  copies_wait();
  __syncthreads();
  const Task task(plan, own);
  T* column = column_of(plan, own, task, tile + shift);
  W strip[kStrip][kGroup];
  load_strip<T, VECTOR>(plan, task, column, strip);
  add_strip_modes(plan, own, task, coefficients, memory, strip);
  if (factor.data) {
    const T* from = column_of(plan, own, task, factors + displacement<T>(own, factor));
#pragma unroll
    for (int r = 0; r < kStrip; ++r) {
      if (!task.active || r >= task.rows) continue;
      W value[kGroup];
      load_group<T, VECTOR>(from + (task.row + r) * plan.row_pitch, plan.column_pitch, task.columns, value);
#pragma unroll
      for (int v = 0; v < kGroup; ++v) strip[r][v] *= value[v];
    }
  }
  store_strip<T, VECTOR>(plan, task, column, strip);
  __syncthreads();
  store_own(plan, own, own, y, tile, shift);
}

// allocate(bytes): device memory that lives until the launches are done.
template <typename T, typename Allocate>
void run_mode_coefficients(const Shape& shape, const View& x, Wide<T>* coefficients, int64_t radius_squared, int64_t shared_limit, Allocate allocate,
                           void* stream) {
  Strips plan = make_strips<T>("mode_coefficients", shape, 0, radius_squared, 1, kWaves * kGroup, shared_limit);
  const View from = with_move(shape, plan, x, sizeof(T));
  const auto run = [&](auto kernel) {
    with_coefficients(plan, coefficients, allocate, stream,
                      [&](int64_t blocks, Wide<T>* out) { launch(kernel, blocks, plan.threads, plan.bytes, stream, plan, from, out); });
  };
  if constexpr (sizeof(T) < 8)
    if (vectors<T>(shape, plan, {x.data})) return run(mode_coefficients_kernel<T, true>);
  run(mode_coefficients_kernel<T, false>);
}

// factor.data is null where there is none.
template <typename T>
void run_add_modes(const Shape& shape, const View& x, const View& coefficients, const View& factor, const View& y, int64_t radius_squared,
                   int64_t shared_limit, void* stream) {
  Strips plan = make_strips<T>("add_modes", shape, 0, radius_squared, factor.data ? 2 : 1, 0, shared_limit);
  const View from = with_move(shape, plan, x, sizeof(T)), to = with_move(shape, plan, y, sizeof(T));
  const View by = factor.data ? with_move(shape, plan, factor, sizeof(T)) : factor;
  const auto run = [&](auto kernel) {
    in_ranges(plan, 0, [&](int64_t blocks) { launch(kernel, blocks, plan.threads, plan.bytes, stream, plan, from, coefficients, by, to); });
  };
  if constexpr (sizeof(T) < 8)
    if (vectors<T>(shape, plan, {x.data, factor.data})) return run(add_modes_kernel<T, true>);
  run(add_modes_kernel<T, false>);
}

}  // namespace spanet
