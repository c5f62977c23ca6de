// Discs of radius 1 and 2 over planes of up to a few vectors: all between the rows that are read and those that are written stays in
// registers. Included once by a file that is compiled per instruction set.
#pragma once

#include "cpu/tiles.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

// The modes of a disc on axes that have all of its functions, in the order of Modes: products of a row function a and a column
// function b, each 1, cos 1, ..., sin 1, ....
template <int R2> struct Disc {
  static constexpr int top = R2 == 4 ? 2 : 1, nc = top + 1, ns = top, functions = nc + ns, modes = R2 == 4 ? 13 : 5;
  static constexpr int squared(int a) { return a < nc ? a * a : (a - ns) * (a - ns); }
  static constexpr bool inside(int a, int b) { return squared(a) + squared(b) <= R2; }
};

// f(k, a, b) for every mode.
template <int R2, class F> SIMD_INLINE void for_modes(F f) {
  int k = 0;
  UNROLL
  for (int a = 0; a < Disc<R2>::functions; ++a)
    UNROLL
    for (int b = 0; b < Disc<R2>::functions; ++b)
      if (Disc<R2>::inside(a, b)) f(k++, a, b);
}

// Planes in a step.
template <int NV> constexpr int parts_of = NV == -1 ? 2 : 1;

// A number for every mode of each plane of a step.
template <int R2, int NV, class T> struct Coefficients {
  static constexpr int parts = parts_of<NV>, per_vector = lanes_of<T> / parts, vectors = (Disc<R2>::modes + per_vector - 1) / per_vector;
  static_assert(Disc<R2>::modes < vectors * per_vector);  // there is room behind them
  Vec<T> values[vectors];
  SIMD_MEMBER T& number(int64_t i) { return reinterpret_cast<T*>(values)[i]; }
  SIMD_MEMBER T& of(int64_t mode, int64_t part) { return number(mode * parts + part); }
  // that of each lane's plane
  SIMD_MEMBER Vec<T> spread(int64_t mode) const {
    LaneIndex<T> lane;
    for (int64_t l = 0; l < lanes_of<T>; ++l) lane[l] = mode % per_vector * parts + l / (lanes_of<T> / parts);
    return __builtin_shuffle(values[mode / per_vector], lane);
  }
  SIMD_MEMBER void operator*=(const Coefficients& other) {
    UNROLL
    for (int i = 0; i < vectors; ++i) values[i] *= other.values[i];
  }
};

// z of the planes of a step, not normalised, and behind them the sum of the lanes of `last`.
template <int R2, int NV_, class T, class IO>
SIMD_INLINE void disc_coefficients(const Modes<T>& m, const IO* x, int64_t stride, Step<NV_, T> step, Vec<T> last,
                                   Coefficients<R2, NV_, T>& z) {
  constexpr int NV = Step<NV_, T>::vectors;
  using D = Disc<R2>;
  using Z = Coefficients<R2, NV_, T>;
  Vec<T> even[D::nc][NV], odd[D::ns][NV], parts[Z::vectors * Z::per_vector];
  reduce_rows<D::nc, D::ns, true>(m.rows, m.rows.table, D::nc, x, stride, step, even, odd);
  for_modes<R2>([&](int k, int a, int b) {
    const T* function = m.columns.once + b * m.columns.width;
    Vec<T>(&row)[NV] = a < D::nc ? even[a] : odd[a - D::nc];
    if (NV_ <= 0 && b == 0) {  // lanes without an element are zeros
      parts[k] = row[0];
      return;
    }
    parts[k] = row[0] * load_raw<Vec<T>>(function);
    UNROLL
    for (int v = 1; v < NV; ++v) parts[k] += row[v] * load_raw<Vec<T>>(function + v * lanes_of<T>);
  });
  _Pragma("GCC unroll 16")
  for (int k = D::modes; k < Z::vectors * Z::per_vector; ++k) parts[k] = k == D::modes ? last : Vec<T>{};
  UNROLL
  for (int i = 0; i < Z::vectors; ++i) z.values[i] = sum_lanes<T, Z::parts>(parts + i * Z::per_vector);
}

// <grad, x> of the planes of a step, lane by lane.
template <int NV_, class T, class IO>
SIMD_INLINE Vec<T> disc_dot(const Modes<T>& m, const IO* grad, int64_t grad_stride, Step<NV_, T> grad_step, const IO* x, int64_t x_stride,
                            Step<NV_, T> x_step) {
  constexpr int NV = Step<NV_, T>::vectors;
  Vec<T> total[NV] = {}, all{};
  for (int64_t block = 0; block < m.rows.n; block += 8) {
    Vec<T> sum[NV] = {};
    for (int64_t i = block; i < m.rows.n && i < block + 8; ++i, grad += grad_stride, x += x_stride)
      UNROLL
      for (int v = 0; v < NV; ++v) sum[v] += grad_step.read(grad + grad_step.at(v)) * x_step.read(x + x_step.at(v));
    UNROLL
    for (int v = 0; v < NV; ++v) total[v] += sum[v];
  }
  UNROLL
  for (int v = 0; v < NV; ++v) all += total[v] * load_raw<Vec<T>>(m.columns.once + v * lanes_of<T>);
  return all;
}

// The rows of base x + the functions with the coefficients z.
template <int R2, int NV_, class T, class IO, class Y>
SIMD_INLINE void disc_expand(const Modes<T>& m, const Coefficients<R2, NV_, T>& z, Vec<T> base, Step<NV_, T> step,
                             const Rows<T, IO, Y>& rows) {
  constexpr int NV = Step<NV_, T>::vectors;
  using D = Disc<R2>;
  Vec<T> even[D::nc][NV], odd[D::ns][NV], scale[NV];
  for_modes<R2>([&](int k, int a, int b) {
    const T* function = m.columns.functions + b * m.columns.width;
    const Vec<T> coefficient = z.spread(k);
    UNROLL
    for (int v = 0; v < NV; ++v) {
      Vec<T>& sum = a < D::nc ? even[a][v] : odd[a - D::nc][v];
      if (b == 0) sum = coefficient;
      else sum += coefficient * load_raw<Vec<T>>(function + v * lanes_of<T>);
    }
  });
  UNROLL
  for (int v = 0; v < NV; ++v) scale[v] = base;
  expand_rows<D::nc, D::ns, Out::scaled>(m.rows, even, odd, scale, step, rows);
}

// Calls f(integral constants R2, NV) for planes with the modes of a disc and rows of that step, if there are such.
template <class T, class F> bool for_disc(const Modes<T>& m, F f) {
  constexpr int64_t vl = lanes_of<T>;
  const int64_t w = m.columns.n, vectors = m.columns.width / vl;
  const auto is = [&](auto disc) {
    constexpr int functions = decltype(disc)::functions;
    return m.rows.count() == functions && m.columns.count() == functions && m.inside == decltype(disc)::modes;
  };
  const auto with = [&](auto nv) {
    if (is(Disc<1>())) f(std::integral_constant<int, 1>(), nv);
    else if (is(Disc<4>())) f(std::integral_constant<int, 4>(), nv);
    else return false;
    return true;
  };
  if constexpr (pairs_planes)
    if (2 * w <= vl) return with(std::integral_constant<int, -1>());
  if (w < vl) return with(std::integral_constant<int, 0>());
  if (vectors == 1) return with(std::integral_constant<int, 1>());
  if (vectors == 2) return with(std::integral_constant<int, 2>());
  if constexpr (max_vectors<T> >= 4) {
    if (vectors == 3) return with(std::integral_constant<int, 3>());
    if (vectors == 4) return with(std::integral_constant<int, 4>());
  }
  return false;
}

}  // namespace
}  // namespace SIMD_NAME
}  // namespace spanet
