// radial_filter of contiguous planes up to 56 rows in registers, r^2 <= 4: one read, one write, no tile in shared memory. 8, 16 or 32
// lanes of a warp own a plane, VEC columns each; no barrier between warps.
//
// Issue slots counted in the code for sm_90, of 924 G warp instructions per second on an H200; 16 bits (fp32): 56 x 56 1590 (1340) per
// plane, 28 x 28 890 (770) per two, 14 x 14 570 (515) per four, 7 x 7 330 (315) per four: 14 us for (128, 64, 56, 56), 8 for
// (128, 128, 28, 28), 6 for (128, 320, 14, 14) and (128, 512, 7, 7). Measured on an H200, us, of bf16 (fp32), and of a copy: 32 (53), 26 (49);
// 19 (28), 14.5 (26); 16 (23), 10.6 (17); 11 (11), 6.8 (9.5).
#pragma once

#include "radial_filter_gains.cuh"
#include "resident.cuh"

namespace spanet {

// Blocks on a multiprocessor, at least: what the words of a thread leave room for.
template <typename T, int VEC, int SIZE, int KNOWN>
constexpr int kResidentBlocks = SIZE <= 14 ? 6 : SIZE <= 28 ? 5 : KNOWN == kNothing ? 2 : sizeof(T) == 2 ? 4 : 3;

template <typename T, int VEC, int SIZE, int KNOWN>
__global__ void __launch_bounds__(kResidentWarps * 32, kResidentBlocks<T, VEC, SIZE, KNOWN>)
    resident_kernel(const __grid_constant__ Resident plan, View x, View y, Profile<float> profile) {
  DYNAMIC_SHARED(memory);
  auto* columns = reinterpret_cast<Wave4*>(memory);
  auto* modes = reinterpret_cast<Pack<float, kSlots>*>(columns + plan.width);  // of each 8 lanes of the block
  const int lane = threadIdx.x & ((1 << plan.shift) - 1), planes = 32 * kResidentWarps >> plan.shift, p = threadIdx.x >> plan.shift;
  const unsigned own = blockIdx.x * static_cast<unsigned>(planes) + p, plane = min(own, plan.planes - 1);
  const bool active = own < plan.planes && lane < plan.words;
  const unsigned batch = plane / plan.channels, channel = plane - batch * plan.channels;
  const int column = min(lane, plan.words - 1) * VEC;  // lanes to spare read what another one owns
  Rows<T, VEC, SIZE, KNOWN> rows;
  rows.load(plan, {plan, true, x, batch * x.b + channel * x.c + column, plan.pitch_x});
  const int share = lane & 7;  // of the modes: slots 2 share and 2 share + 1, both of shell share / 2
  const float gain = share / 2 < plan.shells ? profile.gain[share / 2 * profile.gain_s + channel * profile.gain_c] : 0;
  float base[VEC];
  base[0] = profile.base[channel * profile.base_c];
  if constexpr (VEC == 2) base[1] = base[0];
  load_waves(plan, columns);

  float v[5][VEC], z[kSlots] = {};
  rows.sum(plan, v);
  rows.keep_words();  // not unpacked ones, nor addresses
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    float of_column[5];
#pragma unroll
    for (int a = 0; a < 5; ++a) of_column[a] = lane < plan.words ? v[a][k] : 0;
    add_modes(of_column, columns[column + k], z);
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
    waves_of_column(z, columns[column + k], of_column);
#pragma unroll
    for (int a = 0; a < 5; ++a) u[a][k] = of_column[a];
  }
  rows.apply(plan, {plan, active, y, batch * y.b + channel * y.c + column, plan.pitch_y}, base, u);
}

}  // namespace spanet
