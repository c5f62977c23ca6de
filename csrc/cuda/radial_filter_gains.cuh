// The plan of radial_filter, the share of a block, and the gains of its modes.
#pragma once

#include "basis.cuh"

namespace spanet {

constexpr int kMaxThreads = 384;   // twice on a multiprocessor with 80 registers a thread, or once with 168
constexpr int kSlicedBlock = 4;    // frequencies FB at a time where a plane does not fit or has more of them
constexpr int kChunk = 3;          // functions of the H axis that are projected at a time
constexpr int kSmallShells = 32;   // shells of a squared radius below this travel with the launch
constexpr int64_t kWorkspaceBytes = 256 << 20;  // partial sums of a plane for one sequence of launches

struct Plan : Tiling {  // mirrored: slices of planes, else whole ones
  int64_t first_plane;
  int64_t radius_squared;
  double inverse_area;                           // 1 / (H W)
  int low, low_pitch;                            // row H - m of pair m is at low + (m - first pair) low_pitch
  int slices_h, slices_w;                        // slices of a plane along its row pairs and its columns
  int blocks_h, blocks_w;                        // blocks of FB frequencies per axis
  int threads, teams, lanes;                     // Q teams in the reduction over rows, L lanes in the one over columns
  int tile_bytes, sums, coefficients, table_h, table_w, bytes;  // offsets in shared memory
  const int32_t* shell_of;                       // index of shell d2, or null: it is in small_shells
  int8_t small_shells[kSmallShells];

  MODES_FN int slices() const { return slices_h * slices_w; }
  MODES_FN int group_columns() const { return planes * columns; }
};

template <bool SLICED>
__device__ Slice slice_of(const Plan& plan, int64_t unit) {
  Slice s = planes_of(plan, plan.first_tile + (SLICED ? unit / plan.slices() : unit));
  s.rows = plan.height;
  s.index = SLICED ? static_cast<int>(unit % plan.slices()) : 0;
  s.pair = SLICED ? s.index / plan.slices_w * plan.pairs : 0;
  s.pairs = SLICED ? min(plan.pairs, plan.height / 2 + 1 - s.pair) : plan.pairs;
  s.column = SLICED ? s.index % plan.slices_w * plan.columns : 0;
  s.columns = SLICED ? min(plan.columns, plan.width - s.column) : plan.columns;
  return s;
}

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
