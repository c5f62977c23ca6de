// The two steps of a separable filter and the small product between them, as register tiles (radial_filter_kernel.cpp has
// the mathematics). Included once by a file that is compiled per instruction set, like simd.h.
//
//   reduce    V[a,l] = sum_i phi[a,i] X[i,l]
//   expand    Y[i,l] = base_l X[i,l] + sum_a phi[a,i] T[a,l]
//   product   C = A B
//
// A tile keeps its accumulators in registers while i runs; lanes l are cut into steps of one, two or four vectors.
#pragma once

#include "cpu/radial_filter_kernel.h"
#include "cpu/simd.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

// The loops over a tile must be gone before the compiler decides what lives in registers.
#define UNROLL _Pragma("GCC unroll 8")

// Longer steps in fp64 would not be worth their compilation.
template <class T> constexpr int max_vectors = SIMD_BYTES == 64 && sizeof(T) == 4 ? 4 : 2;

// A step of NV vectors that starts at some lane. In memory its last vector is moved back to end with the lanes: at(v).
// In scratch laid out in slots every vector has a place of its own, slot(v), so that what is loaded there is what was
// stored; lanes that two vectors share stand there twice.
// NV = 0 is a single vector that is not full, NV = -1 one whose halves are not full, of two planes.
template <int NV, class T> struct Step {
  static constexpr int vectors = NV > 0 ? NV : 1;
  int64_t last;  // the number of lanes if NV <= 0
  bool slots;
  int64_t second = 0;  // NV = -1: from the plane of the lower half to that of the upper one, in what is read
  SIMD_MEMBER int64_t at(int v) const { return NV <= 0 ? 0 : v == NV - 1 ? last : v * lanes_of<T>; }
  SIMD_MEMBER int64_t slot(int v) const { return slots ? v * lanes_of<T> : at(v); }
  template <class IO> SIMD_MEMBER Vec<T> read(const IO* p) const {
    if constexpr (NV == -1) return load_halves<T>(p, p + second, last);
    else if constexpr (NV == 0) return load_part<T>(p, last);
    else return load<T>(p);
  }
  // beside: the same in what is written
  template <class IO> SIMD_MEMBER void write(IO* p, Vec<T> v, int64_t beside) const {
    if constexpr (NV == -1) store_halves<T>(p, p + beside, v, last);
    else if constexpr (NV == 0) store_part<T>(p, v, last);
    else store<T>(p, v);
  }
};

// Lanes [0, lanes) in steps of up to MOST vectors: f(integral constant NV, first lane, Step's `last`).
template <class T, int MOST, class F> SIMD_INLINE void for_lanes(int64_t lanes, F f) {
  constexpr int64_t vl = lanes_of<T>;
  if (lanes < vl) return f(std::integral_constant<int, 0>(), 0, lanes);
  for (int64_t l = 0; l < lanes;) {
    const int64_t left = lanes - l, vectors = (left + vl - 1) / vl;
    const auto step = [&](auto nv) {
      f(nv, l, left < nv() * vl ? left - vl : (nv() - 1) * vl);
      l += nv() * vl;
    };
    if (MOST >= 4 && vectors >= 4) step(std::integral_constant<int, MOST >= 4 ? 4 : 1>());
    else if (MOST >= 2 && vectors >= 2) step(std::integral_constant<int, MOST >= 2 ? 2 : 1>());
    else step(std::integral_constant<int, 1>());
  }
}

// even and odd: the sums of one block of NC cosines and NS sines. CONSTANT: the first cosine is the constant 1, whose sum grows with the mean of x.
// That sum, and all of them where there are many functions, are added up in blocks of eight pairs, so that the rounding
// error stays below that of an FFT.
template <int NC, int NS, bool CONSTANT, int NV_, class T, class IO, int NV = Step<NV_, T>::vectors>
SIMD_INLINE void reduce_rows(const Axis<T>& axis, const T* table, int64_t sine, const IO* x, int64_t stride, Step<NV_, T> step,
                             Vec<T> (&even)[NC][NV], Vec<T> (&odd)[NS ? NS : 1][NV]) {
  const int64_t count = axis.count(), pairs = axis.pairs();
  constexpr int BLOCKED = CONSTANT ? 1 : NC, BLOCKED_ODD = CONSTANT ? 0 : NS;
  UNROLL
  for (int v = 0; v < NV; ++v) {
    even[0][v] = step.read(x + step.at(v));
    UNROLL
    for (int k = 1; k < NC; ++k) even[k][v] = even[0][v];
    UNROLL
    for (int k = 0; k < NS; ++k) odd[k][v] = Vec<T>{};
  }
  const IO* up = x + stride;
  const IO* down = x + (axis.n - 1) * stride;
  for (int64_t block = 0; block < pairs; block += 8) {
    const int64_t end = block + 8 < pairs ? block + 8 : pairs;
    Vec<T> part[BLOCKED][NV] = {}, part_odd[BLOCKED_ODD ? BLOCKED_ODD : 1][NV] = {};
    for (int64_t i = block; i < end; ++i, up += stride, down -= stride) {
      table += count;
      UNROLL
      for (int v = 0; v < NV; ++v) {
        const int64_t at = step.at(v);
        const Vec<T> a = step.read(up + at), b = step.read(down + at);
        const Vec<T> sum = a + b, difference = a - b;
        UNROLL
        for (int k = 0; k < NC; ++k) {
          Vec<T>& to = k < BLOCKED ? part[k][v] : even[k][v];
          if (CONSTANT && k == 0) to += sum;
          else to += sum * table[k];
        }
        UNROLL
        for (int k = 0; k < NS; ++k) (k < BLOCKED_ODD ? part_odd[k][v] : odd[k][v]) += difference * table[sine + k];
      }
    }
    UNROLL
    for (int v = 0; v < NV; ++v) {
      UNROLL
      for (int k = 0; k < BLOCKED; ++k) even[k][v] += part[k][v];
      UNROLL
      for (int k = 0; k < BLOCKED_ODD; ++k) odd[k][v] += part_odd[k][v];
    }
  }
  if (axis.n % 2 == 0) {
    table += count;
    UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<T> row = step.read(up + step.at(v));
      UNROLL
      for (int k = 0; k < NC; ++k) even[k][v] += row * table[k];
    }
  }
}

// The same, stored.
template <int NC, int NS, bool CONSTANT, int NV_, class T, class IO>
SIMD_INLINE void reduce_tile(const Axis<T>& axis, const T* table, int64_t sine, const IO* x, int64_t stride, Step<NV_, T> step, T* v_cos,
                             T* v_sin, int64_t v_stride) {
  constexpr int NV = Step<NV_, T>::vectors;
  Vec<T> even[NC][NV], odd[NS ? NS : 1][NV];
  reduce_rows<NC, NS, CONSTANT>(axis, table, sine, x, stride, step, even, odd);
  UNROLL
  for (int v = 0; v < NV; ++v) {
    UNROLL
    for (int k = 0; k < NC; ++k) store<T>(v_cos + k * v_stride + step.slot(v), even[k][v]);
    UNROLL
    for (int k = 0; k < NS; ++k) store<T>(v_sin + k * v_stride + step.slot(v), odd[k][v]);
  }
}

// V[a,l] for all functions a of the axis: first the constant with up to two more frequencies, then three at a time.
// `slots`: v is scratch laid out in slots.
template <class T, class IO>
void reduce(const Axis<T>& axis, const IO* x, int64_t stride, int64_t lanes, bool slots, T* v, int64_t v_stride) {
  constexpr std::integral_constant<int, 0> zero;
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 3> three;
  int64_t s = axis.ns < 2 ? axis.ns : 2, c = s + 1;
  const auto block = [&](int64_t first, auto constant, auto nc, auto ns) {
    for_lanes<T, constant() ? max_vectors<T> : max_vectors<T> / 2>(lanes, [&](auto nv, int64_t l, int64_t last) {
      const Step<nv(), T> step{last, slots};
      reduce_tile<nc(), ns(), constant()>(axis, axis.table + first, axis.nc + (constant() ? 0 : s) - first, x + l, stride, step,
                                          v + first * v_stride + l, v + (axis.nc + (constant() ? 0 : s)) * v_stride + l, v_stride);
    });
  };
  constexpr std::true_type with_constant;
  constexpr std::false_type without;
  if (s == 0) block(0, with_constant, one, zero);
  else if (s == 1) block(0, with_constant, two, one);
  else block(0, with_constant, three, two);
  for (int64_t more; s < axis.ns; s += more, c += more) {
    more = axis.ns - s < 3 ? axis.ns - s : 3;
    if (more == 1) block(c, without, one, one);
    else if (more == 2) block(c, without, two, two);
    else block(c, without, three, three);
  }
  if (c < axis.nc) block(c, without, one, zero);
}

// What expand writes: the sum of the functions alone, or that and base x, or that and a b too.
enum class Out { sum, scaled, added };

// Where expand reads x, if Out has it, and writes y: rows of lanes, `stride` elements apart; `beside` is Step's. a and b stand like x.
template <class T, class IO, class Y> struct Rows {
  const T* base;
  const IO* x;
  int64_t x_stride;
  Y* y;
  int64_t y_stride, beside = 0;
  const IO *a = nullptr, *b = nullptr;
  Rows operator+(int64_t l) const { return {base + l, x + l, x_stride, y + l, y_stride, beside, a + l, b + l}; }
};

// y[row, at] = base x[row, at] + correction, for one vector.
template <Out OUT, int NV, class T, class IO, class Y>
SIMD_INLINE void write_row(const Rows<T, IO, Y>& rows, Step<NV, T> step, int64_t row, int64_t at, Vec<T> scale, Vec<T> correction) {
  const int64_t place = row * rows.x_stride + at;
  if constexpr (OUT != Out::sum) correction += scale * step.read(rows.x + place);
  if constexpr (OUT == Out::added) correction += step.read(rows.a + place) * step.read(rows.b + place);
  step.write(rows.y + row * rows.y_stride + at, correction, rows.beside);
}

// A constant, NC - 1 more cosines and NS sines: their coefficients, even and odd, stay in registers for all rows.
template <int NC, int NS, Out OUT, int NV_, class T, class IO, class Y, int NV = Step<NV_, T>::vectors>
SIMD_INLINE void expand_rows(const Axis<T>& axis, const Vec<T> (&even)[NC][NV], const Vec<T> (&odd)[NS ? NS : 1][NV],
                             const Vec<T> (&scale)[NV], Step<NV_, T> step, Rows<T, IO, Y> rows) {
  const T* table = axis.table;
  const auto single = [&](int64_t i) {
    UNROLL
    for (int v = 0; v < NV; ++v) {
      Vec<T> sum = even[0][v];
      UNROLL
      for (int k = 1; k < NC; ++k) sum += even[k][v] * table[k];
      write_row<OUT>(rows, step, i, step.at(v), scale[v], sum);
    }
  };
  single(0);
  const int64_t n = axis.n, pairs = axis.pairs();
  for (int64_t i = 1; i <= pairs; ++i) {
    table += NC + NS;
    UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t at = step.at(v);
      Vec<T> sum = even[0][v], difference{};
      UNROLL
      for (int k = 1; k < NC; ++k) sum += even[k][v] * table[k];
      if (NS > 0) difference = odd[0][v] * table[NC];
      UNROLL
      for (int k = 1; k < NS; ++k) difference += odd[k][v] * table[NC + k];
      write_row<OUT>(rows, step, i, at, scale[v], sum + difference);
      write_row<OUT>(rows, step, n - i, at, scale[v], sum - difference);
    }
  }
  if (n % 2 == 0) {
    table += NC + NS;
    single(n / 2);
  }
}

// The same, loaded.
template <int NC, int NS, Out OUT, int NV_, class T, class IO, class Y>
SIMD_INLINE void expand_few(const Axis<T>& axis, const T* t, int64_t t_stride, Step<NV_, T> step, const Rows<T, IO, Y>& rows) {
  constexpr int NV = Step<NV_, T>::vectors;
  Vec<T> even[NC][NV], odd[NS ? NS : 1][NV], scale[NV];
  UNROLL
  for (int v = 0; v < NV; ++v) {
    UNROLL
    for (int k = 0; k < NC; ++k) even[k][v] = load_raw<Vec<T>>(t + k * t_stride + step.slot(v));
    UNROLL
    for (int k = 0; k < NS; ++k) odd[k][v] = load_raw<Vec<T>>(t + (NC + k) * t_stride + step.slot(v));
    scale[v] = OUT != Out::sum ? load_raw<Vec<T>>(rows.base + step.slot(v)) : Vec<T>{};
  }
  expand_rows<NC, NS, OUT>(axis, even, odd, scale, step, rows);
}

// Any number of functions: MR pairs of rows (i, n - i) at a time, or with PAIR = false one row that is its own partner.
// Functions are added up in blocks of eight, for accuracy.
template <int MR, bool PAIR, Out OUT, int NV_, class T, class IO, class Y>
SIMD_INLINE void expand_tile(const Axis<T>& axis, int64_t i, const T* t, int64_t t_stride, Step<NV_, T> step,
                             const Rows<T, IO, Y>& rows) {
  constexpr int NV = Step<NV_, T>::vectors;
  const int64_t count = axis.count();
  const T* table = axis.table + i * count;
  const auto sum = [&](int64_t first, int64_t end, Vec<T>(&total)[MR][NV]) {
    UNROLL
    for (int m = 0; m < MR; ++m)
      UNROLL
      for (int v = 0; v < NV; ++v) total[m][v] = Vec<T>{};
    for (int64_t block = first; block < end; block += 8) {
      Vec<T> part[MR][NV];
      UNROLL
      for (int m = 0; m < MR; ++m)
        UNROLL
        for (int v = 0; v < NV; ++v) part[m][v] = Vec<T>{};
      const int64_t block_end = block + 8 < end ? block + 8 : end;
      for (int64_t k = block; k < block_end; ++k)
        UNROLL
        for (int v = 0; v < NV; ++v) {
          const Vec<T> coefficient = load_raw<Vec<T>>(t + k * t_stride + step.slot(v));
          UNROLL
          for (int m = 0; m < MR; ++m) part[m][v] += coefficient * table[m * count + k];
        }
      UNROLL
      for (int m = 0; m < MR; ++m)
        UNROLL
        for (int v = 0; v < NV; ++v) total[m][v] += part[m][v];
    }
  };
  Vec<T> even[MR][NV], odd[MR][NV];
  sum(0, axis.nc, even);
  sum(axis.nc, PAIR ? count : axis.nc, odd);
  UNROLL
  for (int m = 0; m < MR; ++m)
    UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t at = step.at(v);
      const Vec<T> scale = OUT != Out::sum ? load_raw<Vec<T>>(rows.base + step.slot(v)) : Vec<T>{};
      write_row<OUT>(rows, step, i + m, at, scale, even[m][v] + odd[m][v]);
      if constexpr (PAIR) write_row<OUT>(rows, step, axis.n - i - m, at, scale, even[m][v] - odd[m][v]);
    }
}

// Y[i,l] = base[l] X[i,l] + sum_a phi[a,i] T[a,l] for all i.
// `slots`: t and base are scratch laid out in slots.
template <Out OUT, class T, class IO, class Y>
void expand(const Axis<T>& axis, const T* t, int64_t t_stride, int64_t lanes, bool slots, const Rows<T, IO, Y>& all) {
  const bool few = axis.nc == axis.ns + 1 && axis.ns <= 2;
  if (few) {
    for_lanes<T, max_vectors<T>>(lanes, [&](auto nv, int64_t l, int64_t last) {
      const Step<nv(), T> step{last, slots};
      if (axis.ns == 0) expand_few<1, 0, OUT>(axis, t + l, t_stride, step, all + l);
      else if (axis.ns == 1) expand_few<2, 1, OUT>(axis, t + l, t_stride, step, all + l);
      else expand_few<3, 2, OUT>(axis, t + l, t_stride, step, all + l);
    });
    return;
  }
  for_lanes<T, max_vectors<T> / 2>(lanes, [&](auto nv, int64_t l, int64_t last) {
    constexpr int block = 2;
    const Step<nv(), T> step{last, slots};
    const int64_t n = axis.n, pairs = axis.pairs();
    const Rows<T, IO, Y> rows = all + l;
    expand_tile<1, false, OUT>(axis, 0, t + l, t_stride, step, rows);
    int64_t i = 1;
    for (; i + block - 1 <= pairs; i += block) expand_tile<block, true, OUT>(axis, i, t + l, t_stride, step, rows);
    for (; i <= pairs; ++i) expand_tile<1, true, OUT>(axis, i, t + l, t_stride, step, rows);
    if (n % 2 == 0) expand_tile<1, false, OUT>(axis, n / 2, t + l, t_stride, step, rows);
  });
}

// Products are added up in blocks of eight, for accuracy.
template <int MR, int NV, class T>
SIMD_INLINE void product_tile(int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int64_t vl = lanes_of<T>;
  Vec<T> total[MR][NV];
  UNROLL
  for (int m = 0; m < MR; ++m)
    UNROLL
    for (int v = 0; v < NV; ++v) total[m][v] = Vec<T>{};
  for (int64_t block = 0; block < k; block += 8) {
    Vec<T> part[MR][NV];
    UNROLL
    for (int m = 0; m < MR; ++m)
      UNROLL
      for (int v = 0; v < NV; ++v) part[m][v] = Vec<T>{};
    const int64_t end = block + 8 < k ? block + 8 : k;
    for (int64_t i = block; i < end; ++i)
      UNROLL
      for (int v = 0; v < NV; ++v) {
        const Vec<T> row = load_raw<Vec<T>>(b + i * ldb + v * vl);
        UNROLL
        for (int m = 0; m < MR; ++m) part[m][v] += row * a[m * lda + i];
      }
    UNROLL
    for (int m = 0; m < MR; ++m)
      UNROLL
      for (int v = 0; v < NV; ++v) total[m][v] += part[m][v];
  }
  UNROLL
  for (int m = 0; m < MR; ++m)
    UNROLL
    for (int v = 0; v < NV; ++v) store<T>(c + m * ldc + v * vl, total[m][v]);
}

// C (m x n) = A (m x k) B (k x n), n a multiple of the vector.
template <class T> void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  for (int64_t row = 0; row < m;) {
    const int64_t left = m - row, rows = left > 5 ? (left >= 10 ? 5 : left / 2) : left;
    for_lanes<T, max_vectors<T> / 2>(n, [&](auto nv, int64_t l, int64_t) {
      const auto tile = [&](auto mr) { product_tile<mr(), Step<nv(), T>::vectors>(k, a + row * lda, lda, b + l, ldb, c + row * ldc + l, ldc); };
      if (rows == 1) tile(std::integral_constant<int, 1>());
      else if (rows == 2) tile(std::integral_constant<int, 2>());
      else if (rows == 3) tile(std::integral_constant<int, 3>());
      else if (rows == 4) tile(std::integral_constant<int, 4>());
      else tile(std::integral_constant<int, 5>());
    });
    row += rows;
  }
}

}  // namespace
}  // namespace SIMD_NAME
}  // namespace spanet
