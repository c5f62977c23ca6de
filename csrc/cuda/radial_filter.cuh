// radial_filter on the GPU: y = base x + sum_ab phi_a(i) phi_b(j) g_ab <x, phi_a phi_b>, one block per tile.
//
//   V[a][j] = sum_i cos|sin(2 pi f_a i / H) x[i][j]
//   Z[a][b] = g_ab sum_j V[a][j] cos|sin(2 pi f_b j / W)
//   U[a][j] = sum_b Z[a][b] cos|sin(2 pi f_b j / W)
//   y[i][j] = base x[i][j] + sum_a cos|sin(2 pi f_a i / H) U[a][j]
//
// With r^2 <= 4, small planes (resident_filter.cuh, pixels_filter.cuh, channels_filter.cuh) and others whose rows or pixels are adjacent
// (large_filter.cuh) have kernels of their own.
//
// Rows m and H - m share their cosines and, up to sign, their sines: the sums over rows run over such pairs.
// Tile (shared memory, dtype of x): contiguous [plane p][row i][column j], channels_last [row i][column j][channel p].
// Either way it is rows of columns `pitch` elements apart, so that one code serves both layouts. A thread owns VEC
// adjacent columns of every Q-th row pair: it keeps V (2 FB + 1 functions x VEC) in registers for the reduction and U for
// the application. The Q teams of threads add their V to shared memory in turn, three functions at a time; L lanes
// project each onto the W axis. No atomics, every sum in a fixed order that depends on H, W, C and the dtype alone.
//
// Whole planes on chip: 1 read + 1 write per element. Planes beyond shared memory and frequencies beyond 4 take two
// launches over slices of a plane (reduce_kernel, then filter_kernel from the partial Z): 2 reads (the second from L2
// as far as it reaches) + 1 write. Bytes in flight: the whole tile by 16-byte cp.async, 2 to 6 blocks per multiprocessor.
// Instructions per element, FB = 2, VEC = 4, 56 x 56 on sm_90, 16 bits (fp32): in the loops, counted, sum_rows 6.1 (5.3),
// apply_rows 7.3 (5.9), copies 3 (6); once per thread or block, estimated, 8 (14). Together 24 (31) of the 27 (55) issue
// slots that an H200 has per element at full copy speed (132 x 128 lanes x 1.75 GHz over 1075 and 540 G elements/s).
#pragma once

#include "radial_filter_gains.cuh"

namespace spanet {

// acc[a][v] = sum over this team's row pairs of function a times column v of the thread's group.
template <typename T, int VEC, int FB, typename W = Wide<T>>
__device__ void sum_rows(const Plan& plan, const Slice& s, const T* group, int team, const Pack<W, 2 * FB>* table_h, W (&acc)[kFunctions<FB>][VEC]) {
  const T* up = group + team * plan.row_pitch;
  const T* low = group + plan.low + team * plan.low_pitch;
  for (int m = team; m < s.pairs; m += plan.teams, up += plan.teams * plan.row_pitch, low += plan.teams * plan.low_pitch) {
    Columns<T, VEC> above, below;
    above.load(up);
    if (has_partner(s.pair + m, plan.height)) below.load(low);
    const Pack<W, 2 * FB> wave = table_h[m];
    W x[VEC], mirrored[VEC];
    above.get(x);
    below.get(mirrored);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const W even = x[v] + mirrored[v], odd = x[v] - mirrored[v];
      acc[0][v] += even;
#pragma unroll
      for (int f = 0; f < FB; ++f) {
        acc[2 * f + 1][v] += wave.v[2 * f] * even;
        acc[2 * f + 2][v] += wave.v[2 * f + 1] * odd;
      }
    }
  }
}

// Adds acc of all teams into sums[function][column]; ends with a barrier.
template <int COUNT, int VEC, typename W>
__device__ void add_teams(const Plan& plan, bool active, int team, int column, const W (*acc)[VEC], W* sums) {
#pragma unroll 1
  for (int turn = 0; turn < plan.teams; ++turn) {
    if (active && team == turn)
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
        Pack<W, VEC>& sum = *reinterpret_cast<Pack<W, VEC>*>(sums + k * plan.group_columns() + column);
        Pack<W, VEC> value{};
        if (turn > 0) value = sum;
#pragma unroll
        for (int v = 0; v < VEC; ++v) value.v[v] += acc[k][v];
        sum = value;
      }
    __syncthreads();
  }
}

// emit(k, p, sum[b]) for k < COUNT: sums[k] of plane p projected onto the functions b of the W axis, L lanes to a projection.
template <int COUNT, int FB, typename W, typename Emit>
__device__ void project(const Plan& plan, const Slice& s, const W* sums, const Pack<W, 2 * FB>* table_w, Emit emit) {
  constexpr int F = kFunctions<FB>;
  const int plane_pitch = plan.channels_last ? 1 : plan.columns;
  const int lane = threadIdx.x & (plan.lanes - 1), step = blockDim.x / plan.lanes;
#pragma unroll 1
  for (int first = 0; first < plan.planes * COUNT; first += step) {
    const int task = first + threadIdx.x / plan.lanes, p = task % plan.planes, k = task / plan.planes;
    const bool exists = k < COUNT && p < s.planes;
    W sum[F] = {};
    if (exists) {
      const W* from = sums + k * plan.group_columns() + p * plane_pitch;
      for (int j = lane; j < s.columns; j += plan.lanes) {
        const W value = from[j * plan.column_pitch];
        const Pack<W, 2 * FB> wave = table_w[j];
        sum[0] += value;
#pragma unroll
        for (int f = 0; f < 2 * FB; ++f) sum[f + 1] += wave.v[f] * value;
      }
    }
    for (int mask = plan.lanes / 2; mask > 0; mask /= 2)
#pragma unroll
      for (int b = 0; b < F; ++b) sum[b] += exchange(sum[b], mask);
    if (exists && lane == 0) emit(k, p, sum);
  }
}

// emit(a, p, block_w, sum[b]) for every function a of block_h: the raw coefficients of the slice.
template <int VEC, int FB, typename W, typename Emit>
__device__ void coefficients(const Plan& plan, const Slice& s, bool active, int team, int column, const W (&acc)[kFunctions<FB>][VEC], W* sums,
                             Pack<W, 2 * FB>* table_w, Emit emit) {
  constexpr int F = kFunctions<FB>;
#pragma unroll
  for (int first = 0; first < F; first += kChunk) {
    constexpr int kRest = F % kChunk == 0 ? kChunk : F % kChunk;
    const bool last = first + kChunk >= F;
    if (last) add_teams<kRest, VEC>(plan, active, team, column, acc + first, sums);
    else add_teams<kChunk, VEC>(plan, active, team, column, acc + first, sums);
    for (int block = 0; block < (FB < kSlicedBlock ? 1 : plan.blocks_w); ++block) {
      if (FB == kSlicedBlock && plan.blocks_w > 1) {
        fill_table<FB>(table_w, s.column, s.columns, plan.width, block);
        __syncthreads();
      }
      const auto with_block = [&](int k, int p, const W (&sum)[F]) { emit(first + k, p, block, sum); };
      if (last) project<kRest, FB>(plan, s, sums, table_w, with_block);
      else project<kChunk, FB>(plan, s, sums, table_w, with_block);
      __syncthreads();
    }
  }
}

// U[a][v] += sum_b z[a][b] x function b of the W axis at column v of the group.
template <int VEC, int FB, typename W>
__device__ void add_waves(int p, int j, bool along_planes, const W* z, const Pack<W, 2 * FB>* table_w, W (&u)[kFunctions<FB>][VEC]) {
  constexpr int F = kFunctions<FB>;
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    const Pack<W, 2 * FB> wave = table_w[along_planes ? j : j + v];
    const W* plane = z + (along_planes ? p + v : p) * F * kRow<FB>;
#pragma unroll
    for (int a = 0; a < F; ++a) {
      Pack<W, 4> row[kRow<FB> / 4];
#pragma unroll
      for (int k = 0; k < kRow<FB> / 4; ++k) row[k] = *reinterpret_cast<const Pack<W, 4>*>(plane + a * kRow<FB> + 4 * k);
      u[a][v] += row[0].v[0];
#pragma unroll
      for (int f = 0; f < 2 * FB; ++f) u[a][v] += row[(f + 1) / 4].v[(f + 1) % 4] * wave.v[f];
    }
  }
}

// tile = base tile + U^T applied along the rows, in place.
template <typename T, int VEC, int FB, typename W = Wide<T>>
__device__ void apply_rows(const Plan& plan, const Slice& s, T* group, int team, const Pack<W, 2 * FB>* table_h, const W (&u)[kFunctions<FB>][VEC],
                           const W* z) {
  W base[VEC];
#pragma unroll
  for (int v = 0; v < VEC; ++v) base[v] = z[(plan.channels_last ? v : 0) * kFunctions<FB> * kRow<FB> + kRow<FB> - 1];
  T* up = group + team * plan.row_pitch;
  T* low = group + plan.low + team * plan.low_pitch;
  for (int m = team; m < s.pairs; m += plan.teams, up += plan.teams * plan.row_pitch, low += plan.teams * plan.low_pitch) {
    const bool partner = has_partner(s.pair + m, plan.height);
    Columns<T, VEC> above, below;
    above.load(up);
    if (partner) below.load(low);
    const Pack<W, 2 * FB> wave = table_h[m];
    W x[VEC], mirrored[VEC];
    above.get(x);
    below.get(mirrored);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      W even = u[0][v], odd = 0;
#pragma unroll
      for (int f = 0; f < FB; ++f) {
        even += wave.v[2 * f] * u[2 * f + 1][v];
        odd += wave.v[2 * f + 1] * u[2 * f + 2][v];
      }
      x[v] = base[v] * x[v] + (even + odd);
      mirrored[v] = base[v] * mirrored[v] + (even - odd);
    }
    above.set(x);
    below.set(mirrored);
    above.store(up);
    if (partner) below.store(low);
  }
}

template <typename T, int FB>
struct Shared {  // the parts of a block's shared memory
  using W = Wide<T>;
  T* tile;
  W* sums;
  W* z;
  Pack<W, 2 * FB>* table_h;
  Pack<W, 2 * FB>* table_w;

  __device__ Shared(const Plan& plan, char* memory)
      : tile(reinterpret_cast<T*>(memory)), sums(reinterpret_cast<W*>(memory + plan.sums)), z(reinterpret_cast<W*>(memory + plan.coefficients)),
        table_h(reinterpret_cast<Pack<W, 2 * FB>*>(memory + plan.table_h)), table_w(reinterpret_cast<Pack<W, 2 * FB>*>(memory + plan.table_w)) {}
};

template <int VEC>
struct Group {  // VEC adjacent columns of the tile, and the team that sums every Q-th row pair of them
  int team, column, p, j, start;
  bool active;

  __device__ explicit Group(const Plan& plan) {
    const int groups = plan.group_columns() / VEC;
    team = threadIdx.x / groups;
    column = (threadIdx.x - team * groups) * VEC;
    active = team < plan.teams;
    const int inner = plan.channels_last ? plan.planes : plan.columns, outer = column / inner, rest = column - outer * inner;
    p = plan.channels_last ? rest : outer;
    j = plan.channels_last ? outer : rest;
    start = p * plan.plane_pitch + j * plan.column_pitch;
  }
};

// y from x. Whole planes: coefficients are computed here; slices: they are summed from the workspace that reduce_kernel filled.
template <typename T, int VEC, int FB>
__global__ void __launch_bounds__(kMaxThreads, FB <= 2 ? 2 : 1)
    filter_kernel(const __grid_constant__ Plan plan, View x, View y, Profile<Wide<T>> profile, const Wide<T>* partial) {
  using W = Wide<T>;
  DYNAMIC_SHARED(memory);
  const Shared<T, FB> shared(plan, memory);
  const bool whole = FB < kSlicedBlock || !plan.mirrored;
  // slices in reverse: reduce_kernel read the last ones last, L2 still has them
  const Slice s = slice_of<FB == kSlicedBlock>(plan, whole ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  load_tile(plan, s, x, shared.tile, displacement<T>(s, x));
  fill_table<FB>(shared.table_h, s.pair, s.pairs, plan.height, 0);
  fill_table<FB>(shared.table_w, s.column, s.columns, plan.width, 0);
  if (whole) load_gains<FB, W>(plan, s, profile, nullptr, 0, 0, shared.z);
  copies_wait();
  __syncthreads();
  const Group<VEC> group(plan);
  T* columns = shared.tile + displacement<T>(s, x) + group.start;
  if (whole) {
    W acc[kFunctions<FB>][VEC] = {};
    if (group.active) sum_rows<T, VEC, FB>(plan, s, columns, group.team, shared.table_h, acc);
    coefficients<VEC, FB>(plan, s, group.active, group.team, group.column, acc, shared.sums, shared.table_w,
                          [&](int a, int p, int, const W (&sum)[kFunctions<FB>]) {
                            W* z = shared.z + (p * kFunctions<FB> + a) * kRow<FB>;
#pragma unroll
                            for (int b = 0; b < kFunctions<FB>; ++b) z[b] *= sum[b];
                          });
  }
  for (int block_h = 0; block_h < (whole ? 1 : plan.blocks_h); ++block_h) {
    W u[kFunctions<FB>][VEC] = {};
    for (int block_w = 0; block_w < (whole ? 1 : plan.blocks_w); ++block_w) {
      if (!whole) {
        __syncthreads();
        if (plan.blocks_h > 1) fill_table<FB>(shared.table_h, s.pair, s.pairs, plan.height, block_h);
        if (plan.blocks_w > 1) fill_table<FB>(shared.table_w, s.column, s.columns, plan.width, block_w);
        load_gains<FB>(plan, s, profile, partial, block_h, block_w, shared.z);
        __syncthreads();
      }
      if (group.active) add_waves<VEC, FB>(group.p, group.j, plan.channels_last, shared.z, shared.table_w, u);
    }
    if (group.active) apply_rows<T, VEC, FB>(plan, s, columns, group.team, shared.table_h, u, shared.z + group.p * kFunctions<FB> * kRow<FB>);
  }
  __syncthreads();
  store_tile(plan, s, y, shared.tile, displacement<T>(s, x));
}

}  // namespace spanet
