// Small contiguous planes as rows of pixels: no axis is short, and all modes of a plane are one row of the product of planes
// and functions, (planes, pixels) x (pixels, modes), and back. Included once by a file that is compiled per instruction set.
//
//   reduce    z[k] = sum_p f[k,p] X[p]             expand    Y[p] = base X[p] + sum_k z[k] f[k,p]
#pragma once

#include "cpu/tiles.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

// Sums of x with MT functions, lane by lane.
template <int MT, class T, class IO>
SIMD_INLINE void flat_reduce_tile(const T* functions, int64_t width, int64_t pixels, const IO* x, Vec<T>* sums) {
  Vec<T> sum[MT];
  UNROLL
  for (int k = 0; k < MT; ++k) sum[k] = Vec<T>{};
  for_lanes<T, 4>(pixels, [&](auto nv, int64_t p, int64_t last) {
    const Step<nv(), T> step{last, true};
    UNROLL
    for (int v = 0; v < step.vectors; ++v) {
      const Vec<T> pixel = load<T>(x + p + step.at(v));
      UNROLL
      for (int k = 0; k < MT; ++k) sum[k] += pixel * load_raw<Vec<T>>(functions + k * width + p + step.slot(v));
    }
  });
  UNROLL
  for (int k = 0; k < MT; ++k) sums[k] = sum[k];
}

// Those with all functions, flat_rows(inside) vectors.
template <class T, class IO> void flat_reduce(const Modes<T>& m, const IO* x, Vec<T>* sums) {
  const int64_t pixels = m.rows.n * m.columns.n;
  flat_reduce_tile<5>(m.flat_once, m.flat_width, pixels, x, sums);
  for (int64_t k = 5; k < m.inside; k += 4) flat_reduce_tile<4>(m.flat_once + k * m.flat_width, m.flat_width, pixels, x, sums + k);
}

// <grad, x>, lane by lane; the constant tells pixels from their second copies.
template <class T, class IO> Vec<T> flat_dot(const Modes<T>& m, const IO* grad, const IO* x) {
  Vec<T> sum{};
  for_lanes<T, 4>(m.rows.n * m.columns.n, [&](auto nv, int64_t p, int64_t last) {
    const Step<nv(), T> step{last, true};
    UNROLL
    for (int v = 0; v < step.vectors; ++v)
      sum += load<T>(grad + p + step.at(v)) * load<T>(x + p + step.at(v)) * load_raw<Vec<T>>(m.flat_once + p + step.slot(v));
  });
  return sum;
}

template <class T, class IO> void flat_expand(const Modes<T>& m, const T* z, T base, const IO* x, IO* y) {
  for_lanes<T, 4>(m.rows.n * m.columns.n, [&](auto nv, int64_t p, int64_t last) {
    const Step<nv(), T> step{last, true};
    constexpr int NV = Step<nv(), T>::vectors;
    Vec<T> sum[NV];
    UNROLL
    for (int v = 0; v < NV; ++v) sum[v] = base * load<T>(x + p + step.at(v));
    const T* function = m.flat + p;
    for (int64_t k = 0; k < m.inside; ++k, function += m.flat_width)
      UNROLL
      for (int v = 0; v < NV; ++v) sum[v] += z[k] * load_raw<Vec<T>>(function + step.slot(v));
    UNROLL
    for (int v = 0; v < NV; ++v) store<T>(y + p + step.at(v), sum[v]);
  });
}

}  // namespace
}  // namespace SIMD_NAME
}  // namespace spanet
