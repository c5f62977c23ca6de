// Radial filter on the CPU, for the instruction set this file is compiled for (simd.h).
//
//   Z[a,b] = sum_ij phi[a,i] X[i,j] psi[b,j]         P = G o Z
//   Y[i,j] = base X[i,j] + sum_ab phi[a,i] P[a,b] psi[b,j]
//
// Both sums run over one axis at a time, always by the same two steps, with vectors along another axis:
//   reduce   V[a,l] = sum_i phi[a,i] X[i,l]           expand   Y[i,l] = base_l X[i,l] + sum_a phi[a,i] T[a,l]
// A cosine is even under i -> n - i and a sine odd, so a pair of rows enters as its sum and its difference:
// half the multiply-adds, and the additions run on ports of their own.
//
// Cuts: columns (NCHW): l is a column, the reduced axis the rows; the small products along columns are a GEMM.
//       lanes (channels_last): l is a channel; reduce along columns, then along rows, expand in reverse.
//       packed (anything else): a chunk of channels is gathered into lanes first.
// Every output is owned by one thread and the order of its sum is fixed: bit-equal for any number of threads.
// Memory: x is read once from memory and once more from the cache, y is written once, past the cache if `stream`.

#include "cpu/radial_filter_kernel.h"

#include "cpu/simd.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

// The loops over a tile must be gone before the compiler decides what lives in registers.
#define UNROLL _Pragma("GCC unroll 8")

constexpr int max_vectors = SIMD_BYTES == 64 ? 4 : 2;

// Lanes [0, lanes) in steps of up to MOST vectors; the last vector of the last step is moved back so that it ends at lanes.
// f(integral constant NV, first lane, offset of the last vector).
template <class T, int MOST, class F> SIMD_INLINE void for_lanes(int64_t lanes, F f) {
  constexpr int64_t vl = lanes_of<T>;
  int64_t l = 0;
  while (l < lanes) {
    const int64_t left = lanes - l, vectors = (left + vl - 1) / vl;
    if (MOST >= 4 && vectors >= 4) {
      f(std::integral_constant<int, MOST >= 4 ? 4 : 1>(), l, left >= 4 * vl ? 3 * vl : left - vl);
      l += 4 * vl;
    } else if (MOST >= 2 && vectors >= 2) {
      f(std::integral_constant<int, MOST >= 2 ? 2 : 1>(), l, left >= 2 * vl ? vl : left - vl);
      l += 2 * vl;
    } else {
      f(std::integral_constant<int, 1>(), l + (left < vl ? left - vl : 0), int64_t{0});
      l += vl;
    }
  }
}

// One block of NC cosines and NS sines. CONSTANT: the first cosine is the constant 1, whose sum grows with the mean of x;
// it is added up in blocks of eight pairs, so that its rounding error stays below that of an FFT.
template <int NC, int NS, bool CONSTANT, int NV, class T, class IO>
SIMD_INLINE void reduce_tile(const Axis<T>& axis, const T* table, int64_t sine, const IO* x, int64_t stride, int64_t last, T* v_cos, T* v_sin,
                             int64_t v_stride) {
  constexpr int64_t vl = lanes_of<T>;
  const int64_t count = axis.count(), pairs = axis.pairs();
  Vec<T> even[NC][NV], odd[NS ? NS : 1][NV], total[NV];
  UNROLL
  for (int v = 0; v < NV; ++v) {
    const Vec<T> row = load<T>(x + (v == NV - 1 ? last : v * vl));
    UNROLL
    for (int k = 0; k < NC; ++k) even[k][v] = row * table[k];
    UNROLL
    for (int k = 0; k < NS; ++k) odd[k][v] = Vec<T>{};
    total[v] = Vec<T>{};
  }
  const IO* up = x + stride;
  const IO* down = x + (axis.n - 1) * stride;
  for (int64_t block = 0; block < pairs; block += 8) {
    const int64_t end = block + 8 < pairs ? block + 8 : pairs;
    for (int64_t i = block; i < end; ++i, up += stride, down -= stride) {
      table += count;
      UNROLL
      for (int v = 0; v < NV; ++v) {
        const int64_t at = v == NV - 1 ? last : v * vl;
        const Vec<T> a = load<T>(up + at), b = load<T>(down + at);
        const Vec<T> sum = a + b, difference = a - b;
        if constexpr (CONSTANT) even[0][v] += sum;
        UNROLL
        for (int k = CONSTANT; k < NC; ++k) even[k][v] += sum * table[k];
        UNROLL
        for (int k = 0; k < NS; ++k) odd[k][v] += difference * table[sine + k];
      }
    }
    if constexpr (CONSTANT)
      UNROLL
      for (int v = 0; v < NV; ++v) {
        total[v] += even[0][v];
        even[0][v] = Vec<T>{};
      }
  }
  if (axis.n % 2 == 0) {
    table += count;
    UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<T> row = load<T>(up + (v == NV - 1 ? last : v * vl));
      UNROLL
      for (int k = 0; k < NC; ++k) even[k][v] += row * table[k];
    }
  }
  UNROLL
  for (int v = 0; v < NV; ++v) {
    const int64_t at = v == NV - 1 ? last : v * vl;
    even[0][v] += total[v];
    UNROLL
    for (int k = 0; k < NC; ++k) store<T>(v_cos + k * v_stride + at, even[k][v]);
    UNROLL
    for (int k = 0; k < NS; ++k) store<T>(v_sin + k * v_stride + at, odd[k][v]);
  }
}

// V[a,l] for all functions a of the axis: first the constant with up to two more frequencies, then three at a time.
template <class T, class IO> void reduce(const Axis<T>& axis, const IO* x, int64_t stride, int64_t lanes, T* v, int64_t v_stride) {
  const auto block = [&](int64_t c, int64_t s, auto nc, auto ns) {
    for_lanes<T, max_vectors>(lanes, [&](auto nv, int64_t l, int64_t last) {
      const auto tile = [&](auto constant) {
        reduce_tile<nc(), ns(), constant(), nv()>(axis, axis.table + c, axis.nc + s - c, x + l, stride, last, v + c * v_stride + l,
                                                  v + (axis.nc + s) * v_stride + l, v_stride);
      };
      if (c == 0) tile(std::bool_constant<true>());
      else if constexpr (nc() == ns() || ns() == 0) tile(std::bool_constant<false>());
    });
  };
  constexpr std::integral_constant<int, 0> zero;
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 3> three;
  int64_t s = axis.ns < 2 ? axis.ns : 2, c = s + 1;
  if (s == 0) block(0, 0, one, zero);
  else if (s == 1) block(0, 0, two, one);
  else block(0, 0, three, two);
  for (int64_t step; s < axis.ns; s += step, c += step) {
    step = axis.ns - s < 3 ? axis.ns - s : 3;
    if (step == 1) block(c, s, one, one);
    else if (step == 2) block(c, s, two, two);
    else block(c, s, three, three);
  }
  if (c < axis.nc) block(c, s, one, zero);
}

// Where expand reads x, if there is one, and writes y: rows of lanes, `stride` elements apart.
template <class T, class IO> struct Rows {
  const T* base;
  const IO* x;
  int64_t x_stride;
  IO* y;
  int64_t y_stride;
  Rows operator+(int64_t l) const { return {base + l, x + l, x_stride, y + l, y_stride}; }
};

// y[row, at] = base x[row, at] + correction, for one vector.
template <bool SCALED, bool STREAM, class T, class IO>
SIMD_INLINE void write_row(const Rows<T, IO>& rows, int64_t row, int64_t at, Vec<T> scale, Vec<T> correction) {
  if constexpr (SCALED) correction += scale * load<T>(rows.x + row * rows.x_stride + at);
  if constexpr (STREAM) store_streaming<T>(rows.y + row * rows.y_stride + at, correction);
  else store<T>(rows.y + row * rows.y_stride + at, correction);
}

// A constant, NC - 1 more cosines and NS sines: their coefficients stay in registers for all rows.
template <int NC, int NS, bool SCALED, bool STREAM, int NV, class T, class IO>
SIMD_INLINE void expand_few(const Axis<T>& axis, const T* t, int64_t t_stride, int64_t last, Rows<T, IO> rows) {
  constexpr int64_t vl = lanes_of<T>;
  Vec<T> even[NC][NV], odd[NS ? NS : 1][NV], scale[NV];
  UNROLL
  for (int v = 0; v < NV; ++v) {
    const int64_t at = v == NV - 1 ? last : v * vl;
    UNROLL
    for (int k = 0; k < NC; ++k) even[k][v] = load_raw<Vec<T>>(t + k * t_stride + at);
    UNROLL
    for (int k = 0; k < NS; ++k) odd[k][v] = load_raw<Vec<T>>(t + (NC + k) * t_stride + at);
    scale[v] = SCALED ? load_raw<Vec<T>>(rows.base + at) : Vec<T>{};
  }
  const T* table = axis.table;
  const auto single = [&](int64_t i) {
    UNROLL
    for (int v = 0; v < NV; ++v) {
      Vec<T> sum = even[0][v];
      UNROLL
      for (int k = 1; k < NC; ++k) sum += even[k][v] * table[k];
      write_row<SCALED, STREAM, T>(rows, i, v == NV - 1 ? last : v * vl, scale[v], sum);
    }
  };
  single(0);
  const int64_t n = axis.n, pairs = axis.pairs();
  for (int64_t i = 1; i <= pairs; ++i) {
    table += NC + NS;
    UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t at = v == NV - 1 ? last : v * vl;
      Vec<T> sum = even[0][v], difference{};
      UNROLL
      for (int k = 1; k < NC; ++k) sum += even[k][v] * table[k];
      UNROLL
      for (int k = 0; k < NS; ++k) difference += odd[k][v] * table[NC + k];
      write_row<SCALED, STREAM, T>(rows, i, at, scale[v], sum + difference);
      write_row<SCALED, STREAM, T>(rows, n - i, at, scale[v], sum - difference);
    }
  }
  if (n % 2 == 0) {
    table += NC + NS;
    single(n / 2);
  }
}

// Any number of functions: MR pairs of rows (i, n - i) at a time, or with PAIR = false one row that is its own partner.
template <int MR, bool PAIR, bool SCALED, bool STREAM, int NV, class T, class IO>
SIMD_INLINE void expand_tile(const Axis<T>& axis, int64_t i, const T* t, int64_t t_stride, int64_t last, const Rows<T, IO>& rows) {
  constexpr int64_t vl = lanes_of<T>;
  const int64_t count = axis.count();
  const T* table = axis.table + i * count;
  Vec<T> even[MR][NV], odd[MR][NV];
  UNROLL
  for (int m = 0; m < MR; ++m)
    UNROLL
    for (int v = 0; v < NV; ++v) even[m][v] = odd[m][v] = Vec<T>{};
  for (int64_t k = 0; k < axis.nc; ++k, t += t_stride)
    UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<T> coefficient = load_raw<Vec<T>>(t + (v == NV - 1 ? last : v * vl));
      UNROLL
      for (int m = 0; m < MR; ++m) even[m][v] += coefficient * table[m * count + k];
    }
  if constexpr (PAIR)
    for (int64_t k = axis.nc; k < count; ++k, t += t_stride)
      UNROLL
      for (int v = 0; v < NV; ++v) {
        const Vec<T> coefficient = load_raw<Vec<T>>(t + (v == NV - 1 ? last : v * vl));
        UNROLL
        for (int m = 0; m < MR; ++m) odd[m][v] += coefficient * table[m * count + k];
      }
  UNROLL
  for (int m = 0; m < MR; ++m)
    UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t at = v == NV - 1 ? last : v * vl;
      const Vec<T> scale = SCALED ? load_raw<Vec<T>>(rows.base + at) : Vec<T>{};
      write_row<SCALED, STREAM, T>(rows, i + m, at, scale, even[m][v] + odd[m][v]);
      if constexpr (PAIR) write_row<SCALED, STREAM, T>(rows, axis.n - i - m, at, scale, even[m][v] - odd[m][v]);
    }
}

// Y[i,l] = base[l] X[i,l] + sum_a phi[a,i] T[a,l] for all i; SCALED = false leaves out the first term.
template <bool SCALED, bool STREAM, class T, class IO>
void expand(const Axis<T>& axis, const T* t, int64_t t_stride, int64_t lanes, const Rows<T, IO>& all) {
  const bool few = axis.nc == axis.ns + 1 && axis.ns <= 2;
  if (few) {
    for_lanes<T, max_vectors / 2>(lanes, [&](auto nv, int64_t l, int64_t last) {
      if (axis.ns == 0) expand_few<1, 0, SCALED, STREAM, nv()>(axis, t + l, t_stride, last, all + l);
      else if (axis.ns == 1) expand_few<2, 1, SCALED, STREAM, nv()>(axis, t + l, t_stride, last, all + l);
      else expand_few<3, 2, SCALED, STREAM, nv()>(axis, t + l, t_stride, last, all + l);
    });
    return;
  }
  for_lanes<T, max_vectors>(lanes, [&](auto nv, int64_t l, int64_t last) {
    constexpr int block = 2;
    const int64_t n = axis.n, pairs = axis.pairs();
    const Rows<T, IO> rows = all + l;
    expand_tile<1, false, SCALED, STREAM, nv()>(axis, 0, t + l, t_stride, last, rows);
    int64_t i = 1;
    for (; i + block - 1 <= pairs; i += block) expand_tile<block, true, SCALED, STREAM, nv()>(axis, i, t + l, t_stride, last, rows);
    for (; i <= pairs; ++i) expand_tile<1, true, SCALED, STREAM, nv()>(axis, i, t + l, t_stride, last, rows);
    if (n % 2 == 0) expand_tile<1, false, SCALED, STREAM, nv()>(axis, n / 2, t + l, t_stride, last, rows);
  });
}

// Sums run in KU parts: shorter chains of additions, for speed and for accuracy.
template <int MR, int NV, class T>
SIMD_INLINE void product_tile(int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t last) {
  constexpr int64_t vl = lanes_of<T>;
  constexpr int KU = NV * 2 <= max_vectors ? max_vectors / NV : 1;
  Vec<T> sum[KU][MR][NV];
  UNROLL
  for (int part = 0; part < KU; ++part)
    UNROLL
    for (int m = 0; m < MR; ++m)
      UNROLL
      for (int v = 0; v < NV; ++v) sum[part][m][v] = Vec<T>{};
  const auto step = [&](int part, int64_t i) {
    UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<T> row = load_raw<Vec<T>>(b + i * ldb + (v == NV - 1 ? last : v * vl));
      UNROLL
      for (int m = 0; m < MR; ++m) sum[part][m][v] += row * a[m * lda + i];
    }
  };
  int64_t i = 0;
  for (; i + KU <= k; i += KU)
    UNROLL
    for (int part = 0; part < KU; ++part) step(part, i + part);
  for (; i < k; ++i) step(0, i);
  UNROLL
  for (int width = KU / 2; width > 0; width /= 2)
    UNROLL
    for (int part = 0; part < width; ++part)
      UNROLL
      for (int m = 0; m < MR; ++m)
        UNROLL
        for (int v = 0; v < NV; ++v) sum[part][m][v] += sum[part + width][m][v];
  UNROLL
  for (int m = 0; m < MR; ++m)
    UNROLL
    for (int v = 0; v < NV; ++v) store<T>(c + m * ldc + (v == NV - 1 ? last : v * vl), sum[0][m][v]);
}

// C (m x n) = A (m x k) B (k x n), n at least one vector.
template <class T> void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  for (int64_t row = 0; row < m;) {
    const int64_t left = m - row, rows = left > 5 ? (left >= 10 ? 5 : left / 2) : left;
    for_lanes<T, max_vectors>(n, [&](auto nv, int64_t l, int64_t last) {
      constexpr int NV = decltype(nv)::value;
      auto tile = [&](auto mr) { product_tile<decltype(mr)::value, NV>(k, a + row * lda, lda, b + l, ldb, c + row * ldc + l, ldc, last); };
      if (rows == 1) tile(std::integral_constant<int, 1>());
      else if (rows == 2) tile(std::integral_constant<int, 2>());
      else if (rows == 3) tile(std::integral_constant<int, 3>());
      else if (rows == 4) tile(std::integral_constant<int, 4>());
      else tile(std::integral_constant<int, 5>());
    });
    row += rows;
  }
}

constexpr int64_t padded(int64_t elements) { return (elements + 15) / 16 * 16; }

// Parts of the thread's working memory, handed out one after the other.
template <class T> struct Scratch {
  explicit Scratch(int64_t elements) : next(static_cast<T*>(thread_scratch(elements * sizeof(T)))) {}
  T* take(int64_t elements) {
    T* part = next;
    next += padded(elements);
    return part;
  }
  T* next;
};

// Writes n elements past the cache; whole cache lines only, the ends by ordinary stores.
template <class IO> void stream_copy(const IO* from, IO* to, int64_t n) {
  constexpr int64_t line = SIMD_BYTES / sizeof(IO);
  using Bits = typename Simd<float>::U;
  const int64_t head = (SIMD_BYTES - reinterpret_cast<uintptr_t>(to) % SIMD_BYTES) % SIMD_BYTES / sizeof(IO);
  int64_t i = head < n ? head : n;
  std::memcpy(to, from, i * sizeof(IO));
  for (; i + line <= n; i += line) store_streaming<float>(reinterpret_cast<float*>(to + i), (Vec<float>)load_raw<Bits>(from + i));
  std::memcpy(to + i, from + i, (n - i) * sizeof(IO));
}

template <class T, class IO> int64_t columns_scratch(const Modes<T>& m, int64_t parts) {
  const int64_t w = padded(m.columns.n), a = m.rows.count();
  return parts * padded(a * w) + 2 * padded(a * m.columns.padded) + w + 2 * padded(m.rows.n * m.columns.n) + 64;
}

// Z (A_H, padded) of one plane whose columns are adjacent.
template <class T, class IO> void columns_coefficients(const Modes<T>& m, const IO* x, int64_t h_stride, T* v, T* z) {
  const int64_t w = m.columns.n;
  reduce(m.rows, x, h_stride, w, v, padded(w));
  product(m.rows.count(), m.columns.padded, w, v, padded(w), m.columns.transposed, m.columns.padded, z, m.columns.padded);
}

// A plane as rows of adjacent columns: the plane itself, or a copy in scratch if its columns are apart.
template <class IO> const IO* adjacent_columns(const IO* x, int64_t& h_stride, int64_t w_stride, int64_t h, int64_t w, IO* copy) {
  if (w_stride == 1) return x;
  for (int64_t i = 0; i < h; ++i)
    for (int64_t j = 0; j < w; ++j) copy[i * w + j] = x[i * h_stride + j * w_stride];
  h_stride = w;
  return copy;
}

template <class T, class IO>
void filter_columns(const Modes<T>& m, Planes<const IO> x, Planes<IO> y, const Profile<T>& p, int64_t channels, bool stream, int64_t begin,
                    int64_t end) {
  const int64_t h = m.rows.n, w = m.columns.n, rows = m.rows.count(), columns = m.columns.count(), zs = m.columns.padded;
  Scratch<T> scratch(columns_scratch<T, IO>(m, 2));
  T* v = scratch.take(rows * padded(w));
  T* t = scratch.take(rows * padded(w));
  T* z = scratch.take(rows * zs);
  T* base = scratch.take(w);
  IO* staged = reinterpret_cast<IO*>(scratch.take(h * w));
  IO* copy = reinterpret_cast<IO*>(scratch.take(h * w));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / channels, c = unit % channels;
    int64_t h_stride = x.h;
    const IO* plane = adjacent_columns(x.data + b * x.b + c * x.c, h_stride, x.w, h, w, copy);
    IO* out = y.data + b * y.b + c * y.c;
    columns_coefficients(m, plane, h_stride, v, z);
    for (int64_t a = 0; a < rows; ++a)
      for (int64_t k = 0; k < columns; ++k) {
        const int32_t shell = m.shell[a * columns + k];
        z[a * zs + k] = shell < 0 ? T(0) : T(z[a * zs + k] * (m.scale[a * columns + k] * p.gain[shell * p.gain_shell + c * p.gain_channel]));
      }
    product(rows, w, columns, z, zs, m.columns.functions, w, t, padded(w));
    for (int64_t j = 0; j < w; ++j) base[j] = p.base[c * p.base_stride];
    expand<true, false>(m.rows, t, padded(w), w, Rows<T, IO>{base, plane, h_stride, stream ? staged : out, w});
    if (stream) stream_copy(staged, out, h * w);
  }
  if (stream) fence_streaming();
}

template <class T> int64_t lanes_scratch(const Modes<T>& m, int64_t lanes) {
  const int64_t rows = m.rows.count(), columns = m.columns.count();
  return padded(m.rows.n * columns * lanes) + 2 * padded(rows * columns * lanes) + padded(lanes) + 2 * padded(m.rows.n * m.columns.n * lanes) +
         64;
}

// Z (A_H, A_W, lanes) of the planes side by side in `lanes` adjacent elements; u is (H, A_W, lanes).
template <class T, class IO>
void lanes_coefficients(const Modes<T>& m, const IO* x, int64_t h_stride, int64_t w_stride, int64_t lanes, T* u, T* z) {
  const int64_t row = m.columns.count() * lanes;
  for (int64_t i = 0; i < m.rows.n; ++i) reduce(m.columns, x + i * h_stride, w_stride, lanes, u + i * row, lanes);
  reduce(m.rows, u, row, row, z, row);
}

template <class T, class IO>
void filter_lanes_unit(const Modes<T>& m, const IO* x, int64_t xh, int64_t xw, IO* y, int64_t yh, int64_t yw, int64_t lanes, const T* gains,
                       const T* base, T* u, T* z, bool stream) {
  const int64_t row = m.columns.count() * lanes, all = m.rows.count() * row;
  lanes_coefficients(m, x, xh, xw, lanes, u, z);
  for (int64_t i = 0; i < all; ++i) z[i] *= gains[i];
  expand<false, false>(m.rows, z, row, row, Rows<T, T>{base, u, 0, u, row});
  for (int64_t i = 0; i < m.rows.n; ++i) {
    const Rows<T, IO> rows{base, x + i * xh, xw, y + i * yh, yw};
    if (stream) expand<true, true>(m.columns, u + i * row, lanes, lanes, rows);
    else expand<true, false>(m.columns, u + i * row, lanes, lanes, rows);
  }
}

struct Chunk {
  int64_t first, lanes;
};

// Chunk number i of the channels; the last one takes the rest, so that none is shorter than `chunk` unless all are.
inline Chunk chunk_of(int64_t channels, int64_t chunk, int64_t i) {
  const int64_t count = channels < chunk ? 1 : channels / chunk, first = i * chunk;
  return {first, i == count - 1 ? channels - first : chunk};
}

template <class T, class IO>
void gather(Planes<const IO> x, int64_t h, int64_t w, int64_t b, Chunk part, int64_t lanes, T* packed) {
  for (int64_t l = 0; l < lanes; ++l)
    for (int64_t i = 0; i < h; ++i) {
      const IO* row = x.data + b * x.b + (part.first + l) * x.c + i * x.h;
      if (l < part.lanes)
        for (int64_t j = 0; j < w; ++j) packed[(i * w + j) * lanes + l] = widen(row[j * x.w]);
      else
        for (int64_t j = 0; j < w; ++j) packed[(i * w + j) * lanes + l] = T(0);
    }
}

template <class T, class IO>
void filter_lanes(bool pack, const Modes<T>& m, Planes<const IO> x, Planes<IO> y, const Profile<T>& p, int64_t channels, int64_t chunk,
                  bool stream, int64_t begin, int64_t end) {
  const int64_t h = m.rows.n, w = m.columns.n, modes = m.rows.count() * m.columns.count();
  const int64_t chunks = channels < chunk ? 1 : channels / chunk, most = pack ? chunk * 2 : (channels < 2 * chunk ? channels : 2 * chunk);
  Scratch<T> scratch(lanes_scratch(m, most));
  T* u = scratch.take(h * m.columns.count() * most);
  T* z = scratch.take(modes * most);
  T* gains = scratch.take(modes * most);
  T* base = scratch.take(most);
  T* from = pack ? scratch.take(h * w * most) : nullptr;
  T* to = pack ? scratch.take(h * w * most) : nullptr;
  int64_t gains_of = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / chunks;
    const Chunk part = chunk_of(channels, chunk, unit % chunks);
    const int64_t lanes = pack && part.lanes < chunk ? chunk : part.lanes;
    if (gains_of != part.first) {
      gains_of = part.first;
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t c = l < part.lanes ? part.first + l : part.first;
        base[l] = p.base[c * p.base_stride];
        for (int64_t k = 0; k < modes; ++k)
          gains[k * lanes + l] = m.shell[k] < 0 ? T(0) : T(m.scale[k] * p.gain[m.shell[k] * p.gain_shell + c * p.gain_channel]);
      }
    }
    IO* out = y.data + b * y.b + part.first * y.c;
    if (!pack) {
      filter_lanes_unit(m, x.data + b * x.b + part.first, x.h, x.w, out, y.h, y.w, lanes, gains, base, u, z, stream);
      continue;
    }
    gather(x, h, w, b, part, lanes, from);
    filter_lanes_unit<T, T>(m, from, w * lanes, lanes, to, w * lanes, lanes, lanes, gains, base, u, z, false);
    for (int64_t l = 0; l < part.lanes; ++l)
      for (int64_t i = 0; i < h; ++i)
        for (int64_t j = 0; j < w; ++j) narrow(to[(i * w + j) * lanes + l], out + l * y.c + i * y.h + j * y.w);
  }
  if (stream) fence_streaming();
}

template <class T, class IO>
void filter(Cut cut, const Modes<T>& m, Planes<const IO> x, Planes<IO> y, const Profile<T>& p, int64_t channels, int64_t chunk, bool stream,
            int64_t begin, int64_t end) {
  if (cut == Cut::columns) filter_columns(m, x, y, p, channels, stream, begin, end);
  else filter_lanes(cut == Cut::packed, m, x, y, p, channels, chunk, stream, begin, end);
}

// total[l] += sum over the row's w pixels of <grad, x>, lane by lane; partial sums of a row in T, of the plane in fp64.
template <class T, class IO>
void accumulate_dot(const IO* grad, int64_t grad_w, const IO* x, int64_t x_w, int64_t w, int64_t lanes, T* partial, double* total) {
  for (int64_t l = 0; l < lanes; ++l) partial[l] = T(0);
  for (int64_t j = 0; j < w; ++j)
    for (int64_t l = 0; l < lanes; ++l) partial[l] += T(widen(grad[j * grad_w + l])) * T(widen(x[j * x_w + l]));
  for (int64_t l = 0; l < lanes; ++l) total[l] += partial[l];
}

template <class T, class IO>
void backward_columns(const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t channels,
                      int64_t begin, int64_t end) {
  const int64_t h = m.rows.n, w = m.columns.n, rows = m.rows.count(), columns = m.columns.count(), zs = m.columns.padded;
  Scratch<T> scratch(columns_scratch<T, IO>(m, 2) + padded(2 * w));
  T* v = scratch.take(rows * padded(w));
  T* partial = scratch.take(w);
  double* dots = reinterpret_cast<double*>(scratch.take(2 * w));
  T* z[2] = {scratch.take(rows * zs), scratch.take(rows * zs)};
  IO* copy[2] = {reinterpret_cast<IO*>(scratch.take(h * w)), reinterpret_cast<IO*>(scratch.take(h * w))};
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t j = 0; j < w; ++j) dots[j] = 0;
    for (int64_t b = 0; b < images; ++b) {
      int64_t h_stride[2] = {grad.h, x.h};
      const IO* plane[2] = {adjacent_columns(grad.data + b * grad.b + c * grad.c, h_stride[0], grad.w, h, w, copy[0]),
                            adjacent_columns(x.data + b * x.b + c * x.c, h_stride[1], x.w, h, w, copy[1])};
      for (int side = 0; side < 2; ++side) columns_coefficients(m, plane[side], h_stride[side], v, z[side]);
      for (int64_t a = 0; a < rows; ++a)
        for (int64_t k = 0; k < columns; ++k)
          sums[(a * columns + k) * channels + c] += double(z[0][a * zs + k]) * double(z[1][a * zs + k]);
      for (int64_t i = 0; i < h; ++i)
        accumulate_dot(plane[0] + i * h_stride[0], 0, plane[1] + i * h_stride[1], 0, 1, w, partial, dots);
    }
    for (int64_t j = 0; j < w; ++j) sums[rows * columns * channels + c] += dots[j];
  }
}

template <class T, class IO>
void backward_lanes(bool pack, const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t channels,
                    int64_t chunk, int64_t begin, int64_t end) {
  const int64_t h = m.rows.n, w = m.columns.n, modes = m.rows.count() * m.columns.count();
  const int64_t most = pack ? chunk * 2 : (channels < 2 * chunk ? channels : 2 * chunk);
  Scratch<T> scratch(lanes_scratch(m, most) + padded(2 * most));
  T* u = scratch.take(h * m.columns.count() * most);
  T* z[2] = {scratch.take(modes * most), scratch.take(modes * most)};
  T* partial = scratch.take(most);
  double* dots = reinterpret_cast<double*>(scratch.take(2 * most));
  T* packed[2] = {pack ? scratch.take(h * w * most) : nullptr, pack ? scratch.take(h * w * most) : nullptr};
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk part = chunk_of(channels, chunk, unit);
    const int64_t lanes = pack && part.lanes < chunk ? chunk : part.lanes;
    for (int64_t l = 0; l < lanes; ++l) dots[l] = 0;
    for (int64_t b = 0; b < images; ++b) {
      const Planes<const IO> source[2] = {grad, x};
      const IO* plane[2];
      for (int side = 0; side < 2; ++side) {
        const Planes<const IO>& s = source[side];
        plane[side] = s.data + b * s.b + part.first * s.c;
        if (pack) {
          gather(s, h, w, b, part, lanes, packed[side]);
          lanes_coefficients(m, packed[side], w * lanes, lanes, lanes, u, z[side]);
        } else {
          lanes_coefficients(m, plane[side], s.h, s.w, lanes, u, z[side]);
        }
      }
      for (int64_t i = 0; i < h; ++i) {
        if (pack) accumulate_dot(packed[0] + i * w * lanes, lanes, packed[1] + i * w * lanes, lanes, w, lanes, partial, dots);
        else accumulate_dot(plane[0] + i * grad.h, grad.w, plane[1] + i * x.h, x.w, w, lanes, partial, dots);
      }
      for (int64_t k = 0; k < modes; ++k)
        for (int64_t l = 0; l < part.lanes; ++l)
          sums[k * channels + part.first + l] += double(z[0][k * lanes + l]) * double(z[1][k * lanes + l]);
    }
    for (int64_t l = 0; l < part.lanes; ++l) sums[modes * channels + part.first + l] += dots[l];
  }
}

template <class T, class IO>
void backward(Cut cut, const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t channels,
              int64_t chunk, int64_t begin, int64_t end) {
  if (cut == Cut::columns) backward_columns(m, grad, x, sums, images, channels, begin, end);
  else backward_lanes(cut == Cut::packed, m, grad, x, sums, images, channels, chunk, begin, end);
}

template <class T, class IO> constexpr Kernels<T, IO> kernels{filter<T, IO>, backward<T, IO>, lanes_of<T>};

}  // namespace

extern const Kernels<float, float> f32 = kernels<float, float>;
extern const Kernels<float, Bf16> bf16 = kernels<float, Bf16>;
extern const Kernels<float, Half> f16 = kernels<float, Half>;
extern const Kernels<double, double> f64 = kernels<double, double>;

}  // namespace SIMD_NAME
}  // namespace spanet
