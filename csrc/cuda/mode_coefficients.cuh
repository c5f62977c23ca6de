// mode_coefficients on the GPU,
//
//   Z[a][b] = sum_ij phi_a(i) phi_b(j) x[i][j]
//
// in one pass: planes up to 64 x 64 with r^2 <= 8 as in resident_modes.cuh; others over strips (strips.cuh), for any radius, where the
// strip stays in registers while the frequencies pass by, two of each axis at a time. Sums over a plane have one order; a plane that
// needs several blocks gets partial coefficients from each and a launch that adds them. No atomics.
//
// Bytes: 1 read per element and 4 A_H A_W per plane.
// Strips, measured on an H200, radius 2, 56 x 56, 16 bits: 3 us per million elements (channels_last 4.6), predicted 0.47: blocks load,
// sum and project by turns. Now they serve what resident_modes.cuh does not.
#pragma once

#include "resident_modes_plan.cuh"
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

template <typename T>
void ModeCoefficients<T>::forward(const Shape& shape, const View& x, Wide<T>* coefficients, int64_t radius_squared, Device& device) {
  if constexpr (sizeof(T) < 8)
    if (run_resident_coefficients<T>(shape, x, coefficients, radius_squared, device.stream)) return;
  Strips plan = make_strips<T>("mode_coefficients", shape, 0, radius_squared, 1, kWaves * kGroup, device.shared_limit);
  const View from = with_move(shape, plan, x, sizeof(T));
  const auto run = [&](auto kernel) {
    with_coefficients(plan, coefficients, device,
                      [&](int64_t blocks, Wide<T>* out) { launch(kernel, blocks, plan.threads, plan.bytes, device.stream, plan, from, out); });
  };
  if constexpr (sizeof(T) < 8)
    if (vectors<T>(shape, plan, {x.data})) return run(mode_coefficients_kernel<T, true>);
  run(mode_coefficients_kernel<T, false>);
}

}  // namespace spanet
