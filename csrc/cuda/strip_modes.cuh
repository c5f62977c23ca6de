// Fourier coefficients of strips, the frequencies in blocks of two.
//
//   V[a][j] = sum_i phi_a(i) x[i][j]      per strip, in registers, then side by side in shared memory
//   Z[a][b] = sum_j phi_b(j) V[a][j]      lanes along a row of V, strips added in order
//
// phi is 1, cos 1, sin 1, cos 2, ... as in spanet_kernels/modes.py; the tables hold bare cosines and sines, amplitudes come last.
#pragma once

#include "strips.cuh"

namespace spanet {

template <typename W> using Wave = Pack<W, 2 * kFrequencies>;

// Index of slot a of a block of frequencies among the functions of an axis, -1 if it is none of them.
__device__ inline int function_of(int block, int slot, int functions) {
  const int index = slot + 2 * kFrequencies * block;
  return (slot == 0 && block > 0) || index >= functions ? -1 : index;
}

// sqrt((1 or 2) (1 or 2) / (H W)): the amplitude of functions a and b.
template <typename W>
__device__ W amplitude(const Strips& plan, int a, int b) {
  const bool twice_h = a > 0 && (a + 1) / 2 * 2 != plan.height, twice_w = b > 0 && (b + 1) / 2 * 2 != plan.width;
  const double factor = twice_h && twice_w ? 2 : twice_h || twice_w ? 1.4142135623730951 : 1;
  return static_cast<W>(factor * plan.amplitude);
}

// Coefficients of the strips x of a block into out[slice][plane][A_H][A_W]. For all threads of the block; x is 0 beyond the plane.
template <typename W>
__device__ void strip_coefficients(const Strips& plan, const Slice& own, const Task& task, const W (&x)[kStrip][kGroup], char* memory, W* out) {
  auto* sums = reinterpret_cast<Pack<W, kGroup>*>(memory + plan.sums);  // [a][thread]
  auto* table_h = reinterpret_cast<Wave<W>*>(memory + plan.table_h);
  auto* table_w = reinterpret_cast<Wave<W>*>(memory + plan.table_w);
#pragma unroll 1
  for (int block_h = 0; block_h < plan.blocks_h; ++block_h) {
    fill_table<kFrequencies>(table_h, own.row, own.rows, plan.height, block_h);
    __syncthreads();
    Pack<W, kGroup> v[kWaves] = {};
#pragma unroll
    for (int r = 0; r < kStrip; ++r) {
      if (!task.active || r >= task.rows) continue;
      const Wave<W> wave = table_h[task.row - own.row + r];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        v[0].v[j] += x[r][j];
#pragma unroll
        for (int a = 1; a < kWaves; ++a) v[a].v[j] += wave.v[a - 1] * x[r][j];
      }
    }
#pragma unroll
    for (int a = 0; a < kWaves; ++a) sums[a * plan.threads + threadIdx.x] = v[a];
#pragma unroll 1
    for (int block_w = 0; block_w < plan.blocks_w; ++block_w) {
      fill_table<kFrequencies>(table_w, own.column, own.columns, plan.width, block_w);
      __syncthreads();
      const auto project = [&](int at, int lane, W (&sum)[kWaves]) {
        const int a = at / plan.planes, p = at - a * plan.planes;
        if (p >= own.planes || function_of(block_h, a, plan.functions_h) < 0) return;
        for (int j = lane; j < own.columns; j += plan.lanes) {
          W value = 0;
          for (int strip = 0; strip < plan.strips; ++strip)
            value += sums[a * plan.threads + thread_of(plan, p, strip * plan.groups + j / kGroup)].v[j % kGroup];
          const Wave<W> wave = table_w[j];
          sum[0] += value;
#pragma unroll
          for (int b = 1; b < kWaves; ++b) sum[b] += wave.v[b - 1] * value;
        }
      };
      sum_by_lanes<W, kWaves>(plan, kWaves * plan.planes, project, [&](int at, const W (&sum)[kWaves]) {
        const int slot = at / plan.planes, p = at - slot * plan.planes, a = function_of(block_h, slot, plan.functions_h);
        if (p >= own.planes || a < 0) return;
        const int64_t plane = own.index * plan.range_planes + plane_index(plan, own, p) - plan.first_plane;
        W* row = out + (plane * plan.functions_h + a) * plan.functions_w;
#pragma unroll
        for (int k = 0; k < kWaves; ++k) {
          const int b = function_of(block_w, k, plan.functions_w);
          if (b >= 0) row[b] = sum[k] * amplitude<W>(plan, a, b);
        }
      });
      __syncthreads();
    }
  }
}

}  // namespace spanet
