// Sums of outer products, the gradient of a 1x1 convolution to its weight, for the instruction set this file is compiled for (simd.h).
//
//   out[d, c] = sum_n left[n, d] right[n, c]
//
// Work: 2 N D C FLOP. Memory: left and right once, out once for every `depth` rows.
//
// Rows are taken `depth` at a time. Of them a few blocks of left columns and one strip of right ones, NV vectors wide, are copied to
// memory where they are read one after the other: from the first-level cache the strip, from the second the blocks. A tile of out, a
// block by a strip, stays in registers for all these rows; what they add up to is added to out, so that no sum is longer.
// Every element of out is computed by one thread in a fixed order.

#include "cpu/outer_sum_kernel.h"

#include "cpu/radial_filter_kernel.h"
#include "cpu/simd.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

using V = Vec<float>;
constexpr int VL = lanes_of<float>;
constexpr int block = SIMD_BYTES == 64 ? 8 : 4, vectors = 3;
constexpr int64_t depth = 256, most_blocks = 64;

// Columns [first, first + n) of so many rows, as (rows, width) with zeros beyond n.
template <int width> void pack(const float* from, int64_t stride, int64_t rows, int64_t first, int64_t n, float* to) {
  from += first;
  for (int64_t k = 0; k < rows; ++k, from += stride, to += width) {
    if (n >= width) std::memcpy(to, from, width * sizeof *to);
    else
      for (int64_t i = 0; i < width; ++i) to[i] = i < n ? from[i] : 0.0f;
  }
}

// to (block, NV VL), of which m rows and n columns are there, = or += left^T right over so many rows.
template <int NV>
void tile(const float* left, const float* right, int64_t rows, float* to, int64_t stride, int64_t m, int64_t n, bool first) {
  V sum[block][NV];
  UNROLL
  for (int i = 0; i < block; ++i)
    UNROLL
    for (int v = 0; v < NV; ++v) sum[i][v] = V{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < rows; ++k, left += block, right += NV * VL) {
    V column[NV];
    UNROLL
    for (int v = 0; v < NV; ++v) column[v] = load_raw<V>(right + v * VL);
    UNROLL
    for (int i = 0; i < block; ++i)
      UNROLL
      for (int v = 0; v < NV; ++v) sum[i][v] += column[v] * left[i];
  }
  UNROLL
  for (int i = 0; i < block; ++i) {
    if (i >= m) break;
    UNROLL
    for (int v = 0; v < NV; ++v) {
      float* at = to + i * stride + v * VL;
      const int64_t here = n - v * VL;
      if (here >= VL) store<float>(at, first ? sum[i][v] : sum[i][v] + load_raw<V>(at));
      else if (here > 0) store_part<float>(at, first ? sum[i][v] : sum[i][v] + load_part<float>(at, here), here);
    }
  }
}

// Calls f(integral constant, first vector) for the strips of vectors [begin, end), as few as can be and as even.
template <class F> void for_strips(int64_t begin, int64_t end, F f) {
  for (int64_t at = begin; at < end;) {
    const int64_t left = end - at, strips = (left + vectors - 1) / vectors, take = (left + strips - 1) / strips;
    if (take == 3) f(std::integral_constant<int, 3>(), at);
    else if (take == 2) f(std::integral_constant<int, 2>(), at);
    else f(std::integral_constant<int, 1>(), at);
    at += take;
  }
}

void run(const OuterSum& op, int64_t left_begin, int64_t left_end, int64_t right_begin, int64_t right_end) {
  float* const blocks = static_cast<float*>(thread_scratch((most_blocks * block + vectors * VL) * depth * sizeof(float)));
  float* const strip = blocks + most_blocks * block * depth;
  for (int64_t group = left_begin; group < left_end; group += most_blocks) {
    const int64_t group_end = group + most_blocks < left_end ? group + most_blocks : left_end;
    for (int64_t row = 0; row < op.rows; row += depth) {
      const int64_t rows = op.rows - row < depth ? op.rows - row : depth;
      for (int64_t b = group; b < group_end; ++b)
        pack<block>(op.left + row * op.left_stride, op.left_stride, rows, b * block, op.left_columns - b * block,
                    blocks + (b - group) * block * depth);
      for_strips(right_begin, right_end, [&](auto nv, int64_t vector) {
        const int64_t first = vector * VL, n = op.right_columns - first;
        pack<nv() * VL>(op.right + row * op.right_stride, op.right_stride, rows, first, n, strip);
        for (int64_t b = group; b < group_end; ++b)
          tile<nv()>(blocks + (b - group) * block * depth, strip, rows, op.out + b * block * op.right_columns + first, op.right_columns,
                     op.left_columns - b * block, n, row == 0);
      });
    }
  }
}

}  // namespace

extern const OuterSumKernels outer_sum_kernels{run, block, VL};

}  // namespace SIMD_NAME
}  // namespace spanet
