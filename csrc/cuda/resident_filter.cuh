// radial_filter of small planes in registers, r^2 <= 4: one read, one write, no tile in shared memory.
//
//   resident_filter_kernel   contiguous: 8, 16 or 32 lanes of a warp own a plane, VEC columns each; no barrier between warps
//
// Predicted for an H200, not measured, issue slots per element of 56 x 56 in 16 bits (28 of 32 lanes busy): loads and stores 1 with
// their addresses 2, unpacking 2, sums 3.5, application 4.5, packing 0.5, modes 2: together 14, 12 us of issue for 26 million elements
// that a copy moves in 26 us.
#pragma once

#include "radial_filter_gains.cuh"
#include "resident.cuh"

namespace spanet {

template <typename T, int VEC, int PAIRS>
constexpr int kResidentBlocks = sizeof(T) * VEC * PAIRS > 200 ? 3 : sizeof(T) * VEC * PAIRS > 100 ? 4 : 6;  // on a multiprocessor, at least

template <typename T, int VEC, int PAIRS>
__global__ void __launch_bounds__(kResidentWarps * 32, kResidentBlocks<T, VEC, PAIRS>)
    resident_filter_kernel(const __grid_constant__ Resident plan, View x, View y, Profile<float> profile) {
  DYNAMIC_SHARED(memory);
  auto* columns = reinterpret_cast<Wave4*>(memory);
  auto* modes = reinterpret_cast<Pack<float, kSlots>*>(columns + plan.width);  // of each 8 lanes of the block
  const int lane = threadIdx.x & ((1 << plan.shift) - 1), planes = 32 * kResidentWarps >> plan.shift, p = threadIdx.x >> plan.shift;
  const unsigned plane = blockIdx.x * static_cast<unsigned>(planes) + p;
  const bool exists = plane < plan.planes, active = exists && lane < plan.words;
  const unsigned batch = exists ? plane / plan.channels : 0, channel = exists ? plane - batch * plan.channels : 0;
  Rows<T, VEC, PAIRS> rows;
  rows.load(plan, active, static_cast<const T*>(x.data) + batch * x.b + channel * x.c + lane * VEC);
  const int share = lane & 7;  // of the modes: slots 2 share and 2 share + 1, both of shell share / 2
  const float gain = share / 2 < plan.shells ? profile.gain[share / 2 * profile.gain_s + channel * profile.gain_c] : 0;
  float base[VEC];
  base[0] = profile.base[channel * profile.base_c];
  if constexpr (VEC == 2) base[1] = base[0];
  load_waves(plan, columns);

  float v[5][VEC], z[kSlots] = {};
  rows.sum(plan, v);
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    const float of_column[5] = {v[0][k], v[1][k], v[2][k], v[3][k], v[4][k]};
    add_modes(of_column, columns[active ? lane * VEC + k : 0], z);
  }
  share_sums<kSlots>(plan.shift, z);
  if (lane < 8) {
    modes[p].v[2 * share] = z[0] * (gain * plan.weight[2 * share]);
    modes[p].v[2 * share + 1] = z[1] * (gain * plan.weight[2 * share + 1]);
  }
  sync_warp();

  float u[5][VEC];
#pragma unroll
  for (int k = 0; k < kSlots; ++k) z[k] = modes[p].v[k];
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    float of_column[5];
    waves_of_column(z, columns[active ? lane * VEC + k : 0], of_column);
#pragma unroll
    for (int a = 0; a < 5; ++a) u[a][k] = of_column[a];
  }
  rows.apply(plan, active, static_cast<T*>(y.data) + batch * y.b + channel * y.c + lane * VEC, base, u);
}

}  // namespace spanet
