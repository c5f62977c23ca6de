// Sums of outer products, the gradient of a 1x1 convolution to its weight, for the instruction set this file is compiled for (simd.h).
//
//   out[d, c] = sum_n left[n, d] right[n, c]     sums[d] = sum_n left[n, d]
//
// Work: 2 N D C FLOP. Memory: left and right once, out once for every `depth` units. What a side is besides what stands in memory, a
// product, a GELU or a scaling, is computed where it is copied.
//
// A unit is a row, or two in bf16, of which one instruction multiplies and adds both. Units are taken `depth` at a time. Of them a few
// blocks of left columns and one strip of right ones, NV vectors wide, are copied to memory where they are read one after the other: from
// the first-level cache the strip, from the second the blocks. A tile of out, a block by a strip, stays in registers for all these units;
// what they add up to is added to out, so that no sum is longer.
// Every element of out is computed by one thread in a fixed order.

#include "cpu/outer_sum_kernel.h"

#include "cpu/bf16_dot.h"
#include "cpu/gelu.h"
#include "cpu/radial_filter_kernel.h"
#include "cpu/simd.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

using V = Vec<float>;
constexpr int VL = lanes_of<float>;
constexpr int block = SIMD_BYTES == 64 ? 8 : 4, vectors = 3;
constexpr int64_t depth = 256, most_panels = 512 / VL;  // a panel is a vector of left columns
constexpr int64_t ahead = 48;  // rows: a column of lines is no stream that a processor would fetch by itself

// An engine: what a unit is.
struct Numbers {
  using IO = float;
  static constexpr int rows = 1;  // of a unit
  static constexpr const auto& tail = tail_of_numbers;
  static SIMD_MEMBER V multiply_add(V sum, V a, V b) { return sum + a * b; }
  static SIMD_MEMBER V join(V only, V) { return only; }
};

struct Widened : Numbers {
  using IO = Bf16;
  static constexpr const auto& tail = tail_of_pairs;
};

#if SIMD_BYTES == 64
struct PairsByDot : Widened {
  static constexpr int rows = 2;
  static SIMD_MEMBER V multiply_add(V sum, V a, V b) { return dot_pairs(sum, a, b); }
  static SIMD_MEMBER V join(V first, V second) { return join_pairs(first, second); }
};
#endif

// Calls put(unit, columns [first, first + n) of it) for every unit of rows [row, row + rows), n up to a vector; sum is theirs.
template <class E, class Put>
SIMD_INLINE void for_units(const OuterSide<typename E::IO>& side, int64_t row, int64_t rows, int64_t first, V& sum, Put put) {
  const int64_t n = side.columns - first;
  const auto read = [&](const auto* column, int64_t stride, int64_t r) __attribute__((always_inline)) {
    const auto* p = column + r * stride;
    __builtin_prefetch(p + ahead * stride);
    return n >= VL ? load<float>(p) : load_part<float>(p, n);
  };
  const auto units = [&](auto value) __attribute__((always_inline)) {  // value(row)
    constexpr int64_t step = 4;  // rows, with a sum for each
    V sums[step] = {};
    const auto rows_from = [&](int64_t k, int64_t left) __attribute__((always_inline)) {
      UNROLL
      for (int64_t r = 0; r < step; r += E::rows) {
        if (r >= left) break;
        V part[E::rows];
        UNROLL
        for (int i = 0; i < E::rows; ++i) {
          part[i] = r + i < left ? value(row + k + r + i) : V{};
          sums[r + i] += part[i];
        }
        put((k + r) / E::rows, E::join(part[0], part[E::rows - 1]));
      }
    };
    int64_t k = 0;
    for (; k + step <= rows; k += step) rows_from(k, step);
    if (k < rows) rows_from(k, rows - k);
    sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  };
  const auto *data = side.data + first, *factor = side.factor + first;
  const int64_t stride = side.stride, factor_stride = side.factor_stride;
  if (side.factor) units([&](int64_t r) { return read(data, stride, r) * read(factor, factor_stride, r); });
  else if (side.gelu) units([&](int64_t r) { return gelu(read(data, stride, r), E::tail); });
  else if (side.scale) {
    const V scale = n >= VL ? load_raw<V>(side.scale + first) : load_part<float>(side.scale + first, n);
    units([&](int64_t r) { return read(data, stride, r) * scale; });
  }
  else units([&](int64_t r) { return read(data, stride, r); });
}

// to (block, NV VL), of which m rows and n columns are there, = or += left^T right over so many units.
template <class E, int NV>
void tile(const float* left, const float* right, int64_t units, float* to, int64_t stride, int64_t m, int64_t n, bool add) {
  V sum[block][NV];
  UNROLL
  for (int i = 0; i < block; ++i)
    UNROLL
    for (int v = 0; v < NV; ++v) sum[i][v] = V{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < units; ++k, left += block, right += NV * VL) {
    V column[NV];
    UNROLL
    for (int v = 0; v < NV; ++v) column[v] = load_raw<V>(right + v * VL);
    UNROLL
    for (int i = 0; i < block; ++i) {
      uint32_t unit;
      std::memcpy(&unit, left + i, sizeof unit);
      UNROLL
      for (int v = 0; v < NV; ++v) sum[i][v] = E::multiply_add(sum[i][v], (V)(Simd<float>::U{} + unit), column[v]);
    }
  }
  UNROLL
  for (int i = 0; i < block; ++i) {
    if (i >= m) break;
    UNROLL
    for (int v = 0; v < NV; ++v) {
      float* at = to + i * stride + v * VL;
      const int64_t here = n - v * VL;
      if (here >= VL) store<float>(at, add ? sum[i][v] + load_raw<V>(at) : sum[i][v]);
      else if (here > 0) store_part<float>(at, add ? sum[i][v] + load_part<float>(at, here) : sum[i][v], here);
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

template <class E>
void run(const OuterSum<typename E::IO>& op, int64_t left_begin, int64_t left_end, int64_t right_begin, int64_t right_end) {
  constexpr int64_t block_size = block * depth, panel_size = VL * depth;
  float* const panels = static_cast<float*>(thread_scratch((most_panels + vectors) * panel_size * sizeof(float)));
  float* const strip = panels + most_panels * panel_size;
  for (int64_t group = left_begin; group < left_end; group += most_panels) {
    const int64_t group_end = group + most_panels < left_end ? group + most_panels : left_end;
    for (int64_t row = 0; row < op.rows; row += depth * E::rows) {
      const int64_t rows = op.rows - row < depth * E::rows ? op.rows - row : depth * E::rows, units = (rows + E::rows - 1) / E::rows;
      const bool add = op.add || row != 0;
      for (int64_t p = group; p < group_end; ++p) {
        float* const to = panels + (p - group) * panel_size;
        V sum;
        for_units<E>(op.left, row, rows, p * VL, sum, [&](int64_t k, V unit) {
          UNROLL
          for (int b = 0; b < VL / block; ++b)
            std::memcpy(to + b * block_size + k * block, reinterpret_cast<const char*>(&unit) + b * block * 4, block * 4);
        });
        if (!op.sums) continue;
        float* const at = op.sums + p * VL;
        const int64_t n = op.left.columns - p * VL < VL ? op.left.columns - p * VL : VL;
        store_part<float>(at, add ? sum + load_part<float>(at, n) : sum, n);
      }
      for_strips(right_begin, right_end, [&](auto nv, int64_t vector) {
        const int64_t first = vector * VL;
        V ignored;
        for (int v = 0; v < nv(); ++v)
          for_units<E>(op.right, row, rows, first + v * VL, ignored, [&](int64_t k, V unit) { store<float>(strip + (k * nv() + v) * VL, unit); });
        for (int64_t p = group; p < group_end; ++p)
          for (int64_t b = 0; b < VL / block; ++b) {
            const int64_t d = p * VL + b * block;
            if (d >= op.left.columns) break;
            tile<E, nv()>(panels + (p - group) * panel_size + b * block_size, strip, units, op.out + d * op.right.columns + first,
                          op.right.columns, op.left.columns - d, op.right.columns - first, add);
          }
      });
    }
  }
}

}  // namespace

extern const OuterSumKernels outer_sum_kernels{run<Numbers>, run<Widened>,
#if SIMD_BYTES == 64
                                               run<PairsByDot>,
#else
                                               nullptr,
#endif
                                               VL};

}  // namespace SIMD_NAME
}  // namespace spanet
