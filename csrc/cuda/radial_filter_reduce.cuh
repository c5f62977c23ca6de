// Reductions of radial_filter_backward, and the first launch of a radial_filter whose planes do not fit in a tile.
//
//   reduce_kernel    per plane and slice: Z_x[a][b], Z_grad[a][b] and <grad, x> into a workspace; x and grad are read once
//   gradient_kernel  d gain[s][c] = sum over b and the modes k of shell s of w_k Z_x Z_grad, d base[c] = sum_b <grad, x>
//
// A block of reduce_kernel owns the same tile as in filter_kernel, a warp of gradient_kernel one shell and channel with its
// lanes along the batch. No atomics: every sum has one order.
#pragma once

#include "radial_filter.cuh"

namespace spanet {

template <typename W>
struct Workspace {
  W* x;     // partial coefficients, see partial_index
  W* grad;
  W* dot;   // [plane][slice]
};

// grad.data is null where only the coefficients of x are wanted.
template <typename T, int VEC, int FB>
__global__ void __launch_bounds__(kMaxThreads, FB <= 2 ? 2 : 1)
    reduce_kernel(const __grid_constant__ Plan plan, View x, View grad, Workspace<Wide<T>> workspace) {
  using W = Wide<T>;
  constexpr int F = kFunctions<FB>;
  DYNAMIC_SHARED(memory);
  const Shared<T, FB> shared(plan, memory);
  const Slice s = slice_of<FB == kSlicedBlock>(plan, blockIdx.x);
  const bool both = grad.data != nullptr;
  const int shift_x = displacement<T>(s, x), shift_grad = displacement<T>(s, grad);
  T* tile_grad = reinterpret_cast<T*>(memory + plan.tile_bytes);
  load_tile(plan, s, x, shared.tile, shift_x);
  if (both) load_tile(plan, s, grad, tile_grad, shift_grad);
  fill_table<FB>(shared.table_h, s.pair, s.pairs, plan.height, 0);
  fill_table<FB>(shared.table_w, s.column, s.columns, plan.width, 0);
  copies_wait();
  __syncthreads();
  const Group<VEC> group(plan);
  const T* columns_x = shared.tile + shift_x + group.start;
  const T* columns_grad = tile_grad + shift_grad + group.start;
  const auto workspace_plane = [&](int p) {
    const Plane plane = plane_of(plan, s, p);
    return plane.batch * plan.channels + plane.channel - plan.first_plane;
  };
  for (int operand = 0; operand < 1 + both; ++operand) {
    const T* columns = operand == 0 ? columns_x : columns_grad;
    W* out = operand == 0 ? workspace.x : workspace.grad;
    for (int block_h = 0; block_h < plan.blocks_h; ++block_h) {
      if (plan.blocks_h > 1) {
        fill_table<FB>(shared.table_h, s.pair, s.pairs, plan.height, block_h);
        __syncthreads();
      }
      W acc[F][VEC] = {};
      if (group.active) sum_rows<T, VEC, FB>(plan, s, columns, group.team, shared.table_h, acc);
      coefficients<VEC, FB>(plan, s, group.active, group.team, group.column, acc, shared.sums, shared.table_w,
                            [&](int a, int p, int block_w, const W (&sum)[F]) {
                              W* z = out + partial_index<FB>(plan, workspace_plane(p), s.index, block_h, block_w) + a * F;
#pragma unroll
                              for (int b = 0; b < F; ++b) z[b] = sum[b];
                            });
    }
  }
  if (!both) return;
  W dot[1][VEC] = {};
  for (int m = group.team; group.active && m < s.pairs; m += plan.teams) {
    const auto add = [&](int offset) {
      Columns<T, VEC> words;
      W u[VEC], v[VEC];
      words.load(columns_x + offset);
      words.get(u);
      words.load(columns_grad + offset);
      words.get(v);
#pragma unroll
      for (int k = 0; k < VEC; ++k) dot[0][k] += u[k] * v[k];
    };
    add(m * plan.row_pitch);
    if (has_partner(s.pair + m, plan.height)) add(plan.low + m * plan.low_pitch);
  }
  add_teams<1, VEC>(plan, group.active, group.team, group.column, dot, shared.sums);
  project<1, FB>(plan, s, shared.sums, shared.table_w,
                 [&](int, int p, const W (&sum)[F]) { workspace.dot[workspace_plane(p) * plan.slices() + s.index] = sum[0]; });
}

// Task 0 of a channel is its base, task d2 + 1 the shell of that squared distance, if there is one.
template <int FB, typename W>
__global__ void __launch_bounds__(128)
    gradient_kernel(const __grid_constant__ Plan plan, Workspace<W> workspace, unsigned tasks, W* base_grad, W* gain_grad) {
  constexpr int F = kFunctions<FB>;
  const unsigned warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, task = warp / plan.channels;
  const int lane = threadIdx.x % 32, channel = static_cast<int>(warp - task * plan.channels);
  const int64_t squared = static_cast<int64_t>(task) - 1;
  if (task >= tasks) return;
  double total = 0;  // few numbers: fp64 costs nothing here and adds no rounding to the coefficients
  if (task == 0) {
    for (int64_t b = lane; b < plan.batch; b += 32)
      for (int slice = 0; slice < plan.slices(); ++slice) total += workspace.dot[(b * plan.channels + channel) * plan.slices() + slice];
  } else {
    if (shell_index(plan, squared) < 0) return;
    int64_t v = plan.width / 2;
    for (int64_t u = 0; u * u <= squared && 2 * u <= plan.height; ++u) {
      while (v > 0 && u * u + v * v > squared) --v;
      if (u * u + v * v != squared) continue;
      const int block_h = u == 0 ? 0 : static_cast<int>(u - 1) / FB, block_w = v == 0 ? 0 : static_cast<int>(v - 1) / FB;
      const int a = u == 0 ? 0 : 2 * (static_cast<int>(u - 1) % FB) + 1, b = v == 0 ? 0 : 2 * (static_cast<int>(v - 1) % FB) + 1;
      double modes = 0;
      for (int64_t image = lane; image < plan.batch; image += 32)
        for (int mode = 0; mode < (u == 0 ? 1 : 2) * (v == 0 ? 1 : 2); ++mode) {
          const int at = (a + (v == 0 ? mode : mode / 2)) * F + b + (v == 0 ? 0 : mode % 2);
          double x = 0, grad = 0;
#pragma unroll 1
          for (int slice = 0; slice < plan.slices(); ++slice) {
            const int64_t index = partial_index<FB>(plan, image * plan.channels + channel, slice, block_h, block_w) + at;
            x += workspace.x[index];
            grad += workspace.grad[index];
          }
          modes += x * grad;
        }
      total += mode_weight<double>(plan, static_cast<int>(u), static_cast<int>(v)) * modes;
    }
  }
  for (int mask = 16; mask > 0; mask /= 2) total += exchange(total, mask);
  if (lane != 0) return;
  if (task == 0) base_grad[channel] = static_cast<W>(total);
  else gain_grad[static_cast<int64_t>(shell_index(plan, squared)) * plan.channels + channel] = static_cast<W>(total);
}

constexpr int kShellThreads = 512;

// shell_of[d2] for d2 < count: the index of d2 among the sums of two squares, -1 if it is none. One block.
__global__ void __launch_bounds__(kShellThreads) shell_kernel(int32_t* shell_of, int64_t count) {
  __shared__ int32_t found[kShellThreads];
  const int thread = threadIdx.x, threads = blockDim.x;
  for (int64_t d = thread; d < count; d += threads) shell_of[d] = 0;
  __syncthreads();
  for (int64_t u = thread; u * u < count; u += threads)
    for (int64_t v = u; u * u + v * v < count; ++v) shell_of[u * u + v * v] = 1;
  __syncthreads();
  const int64_t share = (count + threads - 1) / threads, begin = thread * share, end = begin + share < count ? begin + share : count;
  found[thread] = 0;
  for (int64_t d = begin; d < end; ++d) found[thread] += shell_of[d];
  __syncthreads();
  int32_t index = 0;
  for (int t = 0; t < thread; ++t) index += found[t];
  for (int64_t d = begin; d < end; ++d) shell_of[d] = shell_of[d] ? index++ : -1;
}

}  // namespace spanet
