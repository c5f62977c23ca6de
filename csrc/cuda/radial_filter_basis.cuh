// The Fourier basis and the gains of radial_filter in shared memory, computed by the block that uses them: no table is
// copied to the device, so that a call can be captured in a graph. Functions come in blocks of FB frequencies:
// slot 0 is the constant (in block 0 only), slots 2 f + 1 and 2 f + 2 are cosine and sine of frequency block FB + f + 1.
#pragma once

#include "radial_filter_tile.cuh"

namespace spanet {

// table[i] = cos, sin of frequencies block FB + 1 .. block FB + FB at position first + i of an axis of length n.
template <int FB, typename W>
__device__ void fill_table(Pack<W, 2 * FB>* table, int first, int count, int n, int block) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    // frequency x position modulo n in integers: the angle is exact for any length
    unsigned turn = block == 0 ? 0 : static_cast<unsigned>(static_cast<int64_t>(block * FB) * (first + i) % n);
#pragma unroll
    for (int f = 0; f < FB; ++f) {
      turn += first + i;
      if (turn >= static_cast<unsigned>(n)) turn -= n;
      const int nearest = 2 * turn > static_cast<unsigned>(n) ? static_cast<int>(turn) - n : static_cast<int>(turn);  // |angle| <= pi rounds best
      cos_sin_pi(static_cast<W>(2 * nearest) / static_cast<W>(n), &table[i].v[2 * f], &table[i].v[2 * f + 1]);
    }
  }
}

__device__ inline int slot_frequency(int block, int frequencies, int slot) { return slot == 0 ? 0 : block * frequencies + (slot + 1) / 2; }

// Index of the shell d2, -1 if d2 is not a sum of two squares.
__device__ inline int shell_index(const Plan& plan, int64_t squared) {
  return plan.shell_of ? plan.shell_of[squared] : plan.small_shells[squared];
}

// Index of the shell of functions a and b, -1 where the pair is no mode of the disc; the DC slots count in block 0 only.
template <int FB>
__device__ int shell_of(const Plan& plan, int block_h, int a, int block_w, int b) {
  const int64_t u = slot_frequency(block_h, FB, a), v = slot_frequency(block_w, FB, b), squared = u * u + v * v;
  if ((a == 0 && block_h > 0) || (b == 0 && block_w > 0)) return -1;
  if (2 * u > plan.height || 2 * v > plan.width || squared > plan.radius_squared) return -1;
  return shell_index(plan, squared);
}

// (2 or 1) (2 or 1) / (H W): squared amplitude of mode (u, v), for cosines and sines stored without it.
template <typename W>
__device__ W mode_weight(const Plan& plan, int u, int v) {
  const int twice = (u == 0 || 2 * u == plan.height ? 1 : 2) * (v == 0 || 2 * v == plan.width ? 1 : 2);
  return static_cast<W>(twice) * static_cast<W>(plan.inverse_area);
}

// Partial coefficients of a plane and slice in the workspace: [plane][slice][block_h][block_w][a][b].
template <int FB>
__device__ int64_t partial_index(const Plan& plan, int64_t plane, int slice, int block_h, int block_w) {
  return (((plane * plan.slices() + slice) * plan.blocks_h + block_h) * plan.blocks_w + block_w) * kFunctions<FB> * kFunctions<FB>;
}

template <typename W>
struct Profile {  // base (C,) and gain (S, C)
  const W* base;
  const W* gain;
  int64_t base_c, gain_s, gain_c;
};

// z[p][a][b] = weight x gain, times the coefficient summed over slices if there is a workspace of partial ones.
// The last number of row a = 0 is free: it holds base, or 1 where a further block adds to the tile.
template <int FB, typename W>
__device__ void load_gains(const Plan& plan, const Slice& s, const Profile<W>& profile, const W* partial, int block_h, int block_w, W* z) {
  constexpr int F = kFunctions<FB>, kModes = F * F;
  const int thread = threadIdx.x, step = blockDim.x / kModes;
  if (thread >= step * kModes) return;
  const int a = thread % kModes / F, b = thread % F;
  const int shell = shell_of<FB>(plan, block_h, a, block_w, b);
  const W weight = mode_weight<W>(plan, slot_frequency(block_h, FB, a), slot_frequency(block_w, FB, b));
#pragma unroll 1
  for (int p = thread / kModes; p < s.planes; p += step) {
    const Plane plane = plane_of(plan, s, p);
    if (a + b == 0) z[p * F * kRow<FB> + kRow<FB> - 1] = block_h > 0 ? W(1) : profile.base[plane.channel * profile.base_c];
    W value = 0;
    if (shell >= 0) value = weight * profile.gain[shell * profile.gain_s + plane.channel * profile.gain_c];
    if (shell >= 0 && partial) {
      const int64_t index = plane.batch * plan.channels + plane.channel - plan.first_plane;
      W sum = 0;
      for (int slice = 0; slice < plan.slices(); ++slice) sum += partial[partial_index<FB>(plan, index, slice, block_h, block_w) + a * F + b];
      value *= sum;
    }
    z[(p * F + a) * kRow<FB> + b] = value;
  }
}

}  // namespace spanet
