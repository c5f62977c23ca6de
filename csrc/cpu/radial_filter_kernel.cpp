// radial_filter, its gradient and mode_coefficients on the CPU, for the instruction set this file is compiled for (simd.h).
//
//   Z[a,b] = sum_ij phi[a,i] X[i,j] psi[b,j]         P = G o Z
//   Y[i,j] = base X[i,j] + sum_ab phi[a,i] P[a,b] psi[b,j]
//
// mode_coefficients is the first line alone.
// Both sums run over one axis at a time, always by the same two steps, with vectors along another axis:
//   reduce   V[a,l] = sum_i phi[a,i] X[i,l]           expand   Y[i,l] = base_l X[i,l] + sum_a phi[a,i] T[a,l]
// A cosine is even under i -> n - i and a sine odd, so a pair of rows enters as its sum and its difference:
// half the multiply-adds, and the additions run on ports of their own.
//
// Cuts: columns (NCHW): l is a column, the reduced axis the rows; along columns, up to one vector of modes is summed
//         by dot products, more by a small GEMM. Columns that are not adjacent are first copied, a plane at a time.
//         Small planes go through whole instead, as rows of pixels (flat.h).
//       lanes (channels_last): l is a channel; reduce along columns, then along rows, expand in reverse.
// Every output is owned by one thread and the order of its sum is fixed: bit-equal for any number of threads.
// Memory: x is read once from memory and once more from the cache, y is written once, past the cache if `stream` (columns).

#include "cpu/radial_filter_kernel.h"

#include "cpu/flat.h"
#include "cpu/tiles.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

// Parts of the thread's working memory, handed out one after the other, each on a cache line of its own.
template <class T> struct Scratch {
  explicit Scratch(int64_t elements) : next(static_cast<T*>(thread_scratch(elements * sizeof(T)))) {}
  T* take(int64_t elements) {
    T* part = next;
    next += line_up(elements);
    return part;
  }
  T* zeros(int64_t elements) {
    T* part = take(elements);
    for (int64_t i = 0; i < line_up(elements); ++i) part[i] = T(0);
    return part;
  }
  T* next;
};

// Writes n elements past the cache; whole vectors only, the ends by ordinary stores.
template <class IO> void stream_copy(const IO* from, IO* to, int64_t n) {
  constexpr int64_t vector = SIMD_BYTES / sizeof(IO);
  const int64_t head = (SIMD_BYTES - reinterpret_cast<uintptr_t>(to) % SIMD_BYTES) % SIMD_BYTES / sizeof(IO);
  int64_t i = head < n ? head : n;
  std::memcpy(to, from, i * sizeof(IO));
  for (; i + vector <= n; i += vector) store_streaming<float>(reinterpret_cast<float*>(to + i), load_raw<Vec<float>>(from + i));
  std::memcpy(to + i, from + i, (n - i) * sizeof(IO));
}

// Rows of w elements that stand a vector apart, brought together. A whole vector is written for each, in order, so that
// what it writes too much belongs to the next rows; the last ones are written element by element.
template <class IO> void compact(const IO* rows, int64_t vector, IO* to, int64_t h, int64_t w) {
  typedef uint8_t Bytes __attribute__((vector_size(SIMD_BYTES)));
  typedef uint8_t HalfBytes __attribute__((vector_size(SIMD_BYTES / 2)));
  for (int64_t i = 0; i < h; ++i, rows += vector, to += w) {
    if (i * w + vector > h * w) {
      for (int64_t j = 0; j < w; ++j) to[j] = rows[j];
    } else if (vector * sizeof(IO) == SIMD_BYTES) {
      const Bytes row = load_raw<Bytes>(rows);
      std::memcpy(to, &row, sizeof row);
    } else {
      const HalfBytes row = load_raw<HalfBytes>(rows);
      std::memcpy(to, &row, sizeof row);
    }
  }
}

template <class IO> const IO* copy_plane(const IO* x, Planes<const IO> p, int64_t h, int64_t w, IO* copy) {
  for (int64_t i = 0; i < h; ++i)
    for (int64_t j = 0; j < w; ++j) copy[i * w + j] = x[i * p.h + j * p.w];
  return copy;
}

// A plane as rows of adjacent columns: the plane itself, or a copy in scratch if its columns are apart.
template <class IO> const IO* adjacent_columns(const IO* x, Planes<const IO> p, int64_t& h_stride, int64_t h, int64_t w, IO* copy) {
  h_stride = p.w == 1 ? p.h : w;
  return p.w == 1 ? x : copy_plane(x, p, h, w, copy);
}

// The same as rows that follow each other.
template <class IO> const IO* packed_plane(const IO* x, Planes<const IO> p, int64_t h, int64_t w, IO* copy) {
  return p.w == 1 && p.h == w ? x : copy_plane(x, p, h, w, copy);
}

// What the columns cut works in, for each of a group of planes. v and t are (A_H, width) in slots; z has one number a mode;
// full and weighed, (A_H, padded), serve the GEMM.
template <class T, class IO> struct ColumnsScratch {
  ColumnsScratch(const Modes<T>& m, int64_t planes)
      : rows(m.rows.count() * m.columns.width), modes(line_up(m.inside + lanes_of<T>)),
        scratch(planes * (2 * rows + modes) + 2 * m.rows.count() * m.columns.padded + 2 * line_up(m.rows.n * m.columns.width) +
                3 * m.columns.width + 256) {
    v = scratch.take(planes * rows);
    t = scratch.take(planes * rows);
    z = scratch.take(planes * modes);
    full = scratch.take(m.rows.count() * m.columns.padded);
    weighed = scratch.zeros(m.rows.count() * m.columns.padded);
    base = scratch.take(m.columns.width);
    dots = reinterpret_cast<double*>(scratch.take(2 * m.columns.width));
    for (IO*& part : plane) part = reinterpret_cast<IO*>(scratch.take(m.rows.n * m.columns.width));
  }
  int64_t rows, modes;
  Scratch<T> scratch;
  T *v, *t, *z, *full, *weighed, *base;
  double* dots;
  IO* plane[2];
};

// Up to this many modes are cheaper as dot products along the columns than as a GEMM.
constexpr int64_t few_modes = 16;

// z[k] = sum_ab v[a, b] over mode k.
template <class T, class IO> void columns_coefficients(const Modes<T>& m, const T* v, ColumnsScratch<T, IO>& s, T* z) {
  constexpr int64_t vl = lanes_of<T>;
  const int64_t width = m.columns.width, padded = m.columns.padded;
  if (m.inside > few_modes) {
    product(m.rows.count(), padded, width, v, width, m.columns.transposed, padded, s.full, padded);
    for (int64_t k = 0; k < m.inside; ++k) z[k] = s.full[m.mode[k].row * padded + m.mode[k].column];
    return;
  }
  for (int64_t first = 0; first < m.inside; first += vl) {
    Vec<T> sums[vl];  // those of absent modes are summed up too, and not read
    const int64_t count = m.inside - first < vl ? m.inside - first : vl;
    for (int64_t k = 0; k < count; ++k) {
      const T* row = v + m.mode[first + k].row_at;
      const T* function = m.columns.once + m.mode[first + k].column_at;
      Vec<T> sum = load_raw<Vec<T>>(row) * load_raw<Vec<T>>(function);
      for (int64_t j = vl; j < width; j += vl) sum += load_raw<Vec<T>>(row + j) * load_raw<Vec<T>>(function + j);
      sums[k] = sum;
    }
    store<T>(z + first, sum_lanes<T>(sums));
  }
}

// t[a, j] = sum_b z[a, b] psi[b, j] with the weighed coefficients.
template <class T, class IO> void columns_expand(const Modes<T>& m, const T* z, ColumnsScratch<T, IO>& s, T* t) {
  constexpr int64_t vl = lanes_of<T>;
  const int64_t width = m.columns.width, padded = m.columns.padded;
  if (m.inside > few_modes) {
    for (int64_t k = 0; k < m.inside; ++k) s.weighed[m.mode[k].row * padded + m.mode[k].column] = z[k];
    product(m.rows.count(), width, m.columns.count(), s.weighed, padded, m.columns.functions, width, t, width);
    return;
  }
  for (int64_t j = 0; j < width; j += vl)
    for (int64_t k = 0; k < m.inside;) {
      const int64_t row = m.mode[k].row_at;
      Vec<T> sum = load_raw<Vec<T>>(m.columns.functions + m.mode[k].column_at + j) * z[k];
      for (++k; k < m.inside && m.mode[k].row_at == row; ++k) sum += load_raw<Vec<T>>(m.columns.functions + m.mode[k].column_at + j) * z[k];
      store<T>(t + row + j, sum);
    }
}

// Planes [begin, end), in groups that stay in the first-level cache: the short steps of one overlap with those of the next.
// z are the coefficients of x, not normalised; between(b, c, z) is what happens to them.
// WRITE: then their functions are added to base(c) x; else there is no y.
template <bool WRITE, class T, class IO, class Base, class Between>
void over_columns(const Modes<T>& m, Planes<const IO> x, Planes<IO> y, int64_t channels, bool stream, int64_t begin, int64_t end, Base base,
                  Between between) {
  constexpr int64_t most = 8, cached = 16384;
  const int64_t h = m.rows.n, w = m.columns.n, width = m.columns.width, bytes = h * w * static_cast<int64_t>(sizeof(IO));
  const int64_t planes = x.w != 1 || bytes * 2 > cached ? 1 : (cached / bytes < most ? cached / bytes : most);
  ColumnsScratch<T, IO> s(m, planes);
  int64_t image = begin / channels, channel = begin % channels;
  for (int64_t first = begin; first < end; first += planes) {
    const int64_t group = end - first < planes ? end - first : planes;
    const IO* plane[most];
    int64_t h_stride, b[most], c[most];
    for (int64_t g = 0; g < group; ++g) {
      b[g] = image;
      c[g] = channel;
      if (++channel == channels) channel = 0, ++image;
      plane[g] = adjacent_columns(x.data + b[g] * x.b + c[g] * x.c, x, h_stride, h, w, s.plane[0]);
      reduce(m.rows, plane[g], h_stride, w, true, s.v + g * s.rows, width);
    }
    for (int64_t g = 0; g < group; ++g) columns_coefficients(m, s.v + g * s.rows, s, s.z + g * s.modes);
    for (int64_t g = 0; g < group; ++g) between(b[g], c[g], s.z + g * s.modes);
    if constexpr (WRITE) {
      for (int64_t g = 0; g < group; ++g) columns_expand(m, s.z + g * s.modes, s, s.t + g * s.rows);
      for (int64_t g = 0; g < group; ++g) {
        for (int64_t j = 0; j < width; ++j) s.base[j] = base(c[g]);
        const bool narrow = w < width && width == lanes_of<T>;
        IO* out = y.data + b[g] * y.b + c[g] * y.c;
        IO* to = stream || narrow ? s.plane[1] : out;
        expand<Out::scaled>(m.rows, s.t + g * s.rows, width, w, true, Rows<T, IO>{s.base, plane[g], h_stride, to, narrow ? width : w});
        if (narrow) compact(s.plane[1], width, out, h, w);
        else if (stream) stream_copy(s.plane[1], out, h * w);
      }
    }
  }
  if (stream) fence_streaming();
}

// Planes [begin, end) as over_columns, whole planes at a time; planes that are not contiguous are first copied.
template <bool WRITE, class T, class IO, class Base, class Between>
void over_flat(const Modes<T>& m, Planes<const IO> x, Planes<IO> y, int64_t channels, bool stream, int64_t begin, int64_t end, Base base,
               Between between) {
  constexpr int64_t most = 16, vl = lanes_of<T>;
  const int64_t h = m.rows.n, w = m.columns.n, rows = flat_rows(m.inside);
  const int64_t planes = x.w == 1 && x.h == w ? most : 1;
  Scratch<T> scratch(planes * rows * (vl + 1) + vl * vl + 2 * line_up(h * w) + 256);
  Vec<T>* sums = reinterpret_cast<Vec<T>*>(scratch.take(planes * rows * vl + vl * vl));
  T* z = scratch.take(planes * rows + vl);
  IO* copy[2];
  for (IO*& part : copy) part = reinterpret_cast<IO*>(scratch.take(h * w));
  int64_t image = begin / channels, channel = begin % channels;
  for (int64_t first = begin; first < end; first += planes) {
    const int64_t group = end - first < planes ? end - first : planes;
    const IO* plane[most];
    int64_t b[most], c[most];
    for (int64_t g = 0; g < group; ++g) {
      b[g] = image;
      c[g] = channel;
      if (++channel == channels) channel = 0, ++image;
      plane[g] = packed_plane(x.data + b[g] * x.b + c[g] * x.c, x, h, w, copy[0]);
      flat_reduce(m, plane[g], sums + g * rows);
    }
    for (int64_t i = 0; i < group * rows; i += vl) store<T>(z + i, sum_lanes<T>(sums + i));
    for (int64_t g = 0; g < group; ++g) between(b[g], c[g], z + g * rows);
    if constexpr (WRITE)
      for (int64_t g = 0; g < group; ++g) {
        IO* out = y.data + b[g] * y.b + c[g] * y.c;
        flat_expand(m, z + g * rows, base(c[g]), plane[g], stream ? copy[1] : out);
        if (stream) stream_copy(copy[1], out, h * w);
      }
  }
  if (stream) fence_streaming();
}

// Planes [begin, end), by the one or the other.
template <bool WRITE, class T, class IO, class... More> void over_planes(const Modes<T>& m, Planes<const IO> x, More... more) {
  if (m.flat) over_flat<WRITE>(m, x, more...);
  else over_columns<WRITE>(m, x, more...);
}

struct Chunk {
  int64_t first, lanes;
};

// Chunk number i of the channels.
inline Chunk chunk_of(int64_t channels, int64_t chunk, int64_t i) {
  const int64_t first = i * chunk;
  return {first, i == chunks_of(channels, chunk) - 1 ? channels - first : chunk};
}

// What the lanes cut works in, for up to 2 chunks of lanes and at least one vector of them; lanes beyond the chunk's are zeros.
template <class T> struct LanesScratch {
  LanesScratch(const Modes<T>& m, int64_t channels, int64_t chunk)
      : most(channels < 2 * chunk ? (channels < lanes_of<T> ? lanes_of<T> : channels) : 2 * chunk),
        modes(m.rows.count() * m.columns.count()),
        scratch((m.rows.n * m.columns.count() + 3 * modes + 8) * line_up(most) + 256) {
    u = scratch.take(m.rows.n * m.columns.count() * most);
    gains = scratch.zeros(modes * most);
    for (T*& part : z) part = scratch.zeros(modes * most);
    base = scratch.zeros(most);
    partial = scratch.take(most);
    dots = reinterpret_cast<double*>(scratch.take(2 * most));
  }
  int64_t most, modes;
  Scratch<T> scratch;
  T *u, *gains, *base, *partial, *z[2];
  double* dots;
};

// z (A_H, A_W, wide) of the planes side by side in `lanes` adjacent elements.
template <class T, class IO>
void lanes_coefficients(const Modes<T>& m, const IO* x, int64_t h_stride, int64_t w_stride, int64_t lanes, int64_t wide, T* u, T* z) {
  const int64_t row = m.columns.count() * wide;
  for (int64_t i = 0; i < m.rows.n; ++i) reduce(m.columns, x + i * h_stride, w_stride, lanes, false, u + i * row, wide);
  reduce(m.rows, u, row, row, false, z, row);
}

// Units [begin, end): chunks of the channels of one image. between and WRITE as in over_columns; here z is (A_H, A_W, wide).
// prepare(part, wide, base, gains) fills base (wide) and gains (like z), zeros before, whenever the chunk is another one.
template <bool WRITE, class T, class IO, class Prepare, class Between>
void over_lanes(const Modes<T>& m, Planes<const IO> x, Planes<IO> y, int64_t channels, int64_t chunk, int64_t begin, int64_t end,
                Prepare prepare, Between between) {
  const int64_t columns = m.columns.count(), chunks = chunks_of(channels, chunk);
  LanesScratch<T> s(m, channels, chunk);
  int64_t prepared = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / chunks;
    const Chunk part = chunk_of(channels, chunk, unit % chunks);
    const int64_t wide = part.lanes < lanes_of<T> ? lanes_of<T> : part.lanes, row = columns * wide;
    if (prepared != part.first) {
      prepared = part.first;
      for (int64_t i = 0; i < m.rows.count() * row; ++i) s.gains[i] = T(0);
      prepare(part, wide, s.base, s.gains);
    }
    const IO* from = x.data + b * x.b + part.first * x.c;
    lanes_coefficients(m, from, x.h, x.w, part.lanes, wide, s.u, s.z[0]);
    between(b, part, wide, s.z[0], s.gains);
    if constexpr (WRITE) {
      expand<Out::sum>(m.rows, s.z[0], row, row, false, Rows<T, T>{s.base, s.u, 0, s.u, row});
      IO* to = y.data + b * y.b + part.first * y.c;
      for (int64_t i = 0; i < m.rows.n; ++i)
        expand<Out::scaled>(m.columns, s.u + i * row, wide, part.lanes, false, Rows<T, IO>{s.base, from + i * x.h, x.w, to + i * y.h, y.w});
    }
  }
}

template <class T, class IO>
void filter(Cut cut, const Modes<T>& m, Planes<const IO> x, Planes<IO> y, const Profile<T>& p, int64_t channels, int64_t chunk, bool stream,
            int64_t begin, int64_t end) {
  if (cut == Cut::columns) {
    over_planes<true>(
        m, x, y, channels, stream, begin, end, [&](int64_t c) { return p.base[c * p.base_stride]; },
        [&](int64_t, int64_t c, T* z) {
          const T* gain = p.gain + c * p.gain_channel;
          for (int64_t k = 0; k < m.inside; ++k) z[k] *= T(m.mode[k].scale) * gain[m.mode[k].index * p.gain_shell];
        });
    return;
  }
  over_lanes<true>(
      m, x, y, channels, chunk, begin, end,
      [&](Chunk part, int64_t wide, T* base, T* gains) {
        for (int64_t l = 0; l < part.lanes; ++l) base[l] = p.base[(part.first + l) * p.base_stride];
        for (int64_t k = 0; k < m.inside; ++k) {
          const Mode& mode = m.mode[k];
          T* to = gains + (mode.row * m.columns.count() + mode.column) * wide;
          const T* gain = p.gain + mode.index * p.gain_shell + part.first * p.gain_channel;
          for (int64_t l = 0; l < part.lanes; ++l) to[l] = T(mode.scale * gain[l * p.gain_channel]);
        }
      },
      [&](int64_t, Chunk, int64_t wide, T* z, const T* gains) {
        for (int64_t i = 0; i < m.rows.count() * m.columns.count() * wide; ++i) z[i] *= gains[i];
      });
}

template <class T, class IO>
void mode_coefficients(Cut cut, const Modes<T>& m, Planes<const IO> x, T* out, int64_t channels, int64_t chunk, int64_t begin,
                       int64_t end) {
  const Planes<IO> none{};
  if (cut == Cut::columns) {
    over_planes<false>(m, x, none, channels, false, begin, end, 0, [&](int64_t b, int64_t c, T* z) {
      T* to = out + (b * channels + c) * m.inside;
      for (int64_t k = 0; k < m.inside; ++k) to[m.mode[k].index] = T(z[k] * m.mode[k].scale);
    });
    return;
  }
  over_lanes<false>(
      m, x, none, channels, chunk, begin, end, [](Chunk, int64_t, T*, T*) {},
      [&](int64_t b, Chunk part, int64_t wide, T* z, const T*) {
        for (int64_t k = 0; k < m.inside; ++k) {
          const T* from = z + (m.mode[k].row * m.columns.count() + m.mode[k].column) * wide;
          T* to = out + (b * channels + part.first) * m.inside + m.mode[k].index;
          for (int64_t l = 0; l < part.lanes; ++l) to[l * m.inside] = T(from[l] * m.mode[k].scale);
        }
      });
}

// total[l] += sum over n rows of <grad, x>, lane by lane; partial sums in T, totals in fp64.
template <class T, class IO>
void accumulate_dot(const IO* grad, int64_t grad_stride, const IO* x, int64_t x_stride, int64_t n, int64_t lanes, T* partial,
                    double* total) {
  for_lanes<T, 2>(lanes, [&](auto nv, int64_t l, int64_t last) {
    const Step<nv(), T> step{last, false};
    Vec<T> sum[step.vectors] = {};
    for (int64_t i = 0; i < n; ++i)
      UNROLL
      for (int v = 0; v < step.vectors; ++v)
        sum[v] += step.read(grad + i * grad_stride + l + step.at(v)) * step.read(x + i * x_stride + l + step.at(v));
    UNROLL
    for (int v = 0; v < step.vectors; ++v) step.write(partial + l + step.at(v), sum[v]);
  });
  for (int64_t l = 0; l < lanes; ++l) total[l] += partial[l];
}

template <class T, class IO>
void backward_flat(const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t channels,
                   int64_t begin, int64_t end) {
  constexpr int64_t vl = lanes_of<T>;
  const int64_t h = m.rows.n, w = m.columns.n, rows = flat_rows(m.inside), count = 2 * rows + 1;
  Scratch<T> scratch((count + vl) * (vl + 1) + 2 * line_up(h * w) + 256);
  Vec<T>* parts = reinterpret_cast<Vec<T>*>(scratch.take((count + vl) * vl));
  T* z = scratch.take(count + vl);
  IO* copy[2];
  for (IO*& part : copy) part = reinterpret_cast<IO*>(scratch.take(h * w));
  for (int64_t c = begin; c < end; ++c)
    for (int64_t b = 0; b < images; ++b) {
      const IO* g = packed_plane(grad.data + b * grad.b + c * grad.c, grad, h, w, copy[0]);
      const IO* f = packed_plane(x.data + b * x.b + c * x.c, x, h, w, copy[1]);
      flat_reduce(m, g, parts);
      flat_reduce(m, f, parts + rows);
      parts[2 * rows] = flat_dot(m, g, f);
      for (int64_t i = 0; i < count; i += vl) store<T>(z + i, sum_lanes<T>(parts + i));
      for (int64_t k = 0; k < m.inside; ++k) sums[k * channels + c] += double(z[k]) * double(z[rows + k]);
      sums[m.inside * channels + c] += z[2 * rows];
    }
}

template <class T, class IO>
void backward_columns(const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t channels,
                      int64_t begin, int64_t end) {
  const int64_t h = m.rows.n, w = m.columns.n;
  ColumnsScratch<T, IO> s(m, 2);
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t j = 0; j < w; ++j) s.dots[j] = 0;
    for (int64_t b = 0; b < images; ++b) {
      int64_t h_stride[2];
      const IO* plane[2] = {adjacent_columns(grad.data + b * grad.b + c * grad.c, grad, h_stride[0], h, w, s.plane[0]),
                            adjacent_columns(x.data + b * x.b + c * x.c, x, h_stride[1], h, w, s.plane[1])};
      for (int side = 0; side < 2; ++side) {
        reduce(m.rows, plane[side], h_stride[side], w, true, s.v, m.columns.width);
        columns_coefficients(m, s.v, s, s.z + side * s.modes);
      }
      for (int64_t k = 0; k < m.inside; ++k) sums[k * channels + c] += double(s.z[k]) * double(s.z[s.modes + k]);
      // rows in groups of eight: short sums in T
      for (int64_t i = 0; i < h; i += 8)
        accumulate_dot(plane[0] + i * h_stride[0], h_stride[0], plane[1] + i * h_stride[1], h_stride[1], h - i < 8 ? h - i : 8, w, s.t,
                       s.dots);
    }
    for (int64_t j = 0; j < w; ++j) sums[m.inside * channels + c] += s.dots[j];
  }
}

template <class T, class IO>
void backward_lanes(const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t channels,
                    int64_t chunk, int64_t begin, int64_t end) {
  LanesScratch<T> s(m, channels, chunk);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk part = chunk_of(channels, chunk, unit);
    const int64_t lanes = part.lanes, wide = lanes < lanes_of<T> ? lanes_of<T> : lanes, row = m.columns.count() * wide;
    for (int64_t l = 0; l < lanes; ++l) s.dots[l] = 0;
    for (int64_t b = 0; b < images; ++b) {
      const IO* g = grad.data + b * grad.b + part.first * grad.c;
      const IO* f = x.data + b * x.b + part.first * x.c;
      lanes_coefficients(m, g, grad.h, grad.w, lanes, wide, s.u, s.z[0]);
      lanes_coefficients(m, f, x.h, x.w, lanes, wide, s.u, s.z[1]);
      for (int64_t i = 0; i < m.rows.n; ++i)
        accumulate_dot(g + i * grad.h, grad.w, f + i * x.h, x.w, m.columns.n, lanes, s.partial, s.dots);
      for (int64_t k = 0; k < m.inside; ++k) {
        const int64_t at = m.mode[k].row * row + m.mode[k].column * wide;
        for (int64_t l = 0; l < lanes; ++l) sums[k * channels + part.first + l] += double(s.z[0][at + l]) * double(s.z[1][at + l]);
      }
    }
    for (int64_t l = 0; l < lanes; ++l) sums[m.inside * channels + part.first + l] += s.dots[l];
  }
}

template <class T, class IO>
void backward(Cut cut, const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t channels,
              int64_t chunk, int64_t begin, int64_t end) {
  if (cut == Cut::columns && m.flat) backward_flat(m, grad, x, sums, images, channels, begin, end);
  else if (cut == Cut::columns) backward_columns(m, grad, x, sums, images, channels, begin, end);
  else backward_lanes(m, grad, x, sums, images, channels, chunk, begin, end);
}

template <class T, class IO>
constexpr RadialFilterKernels<T, IO> kernels{filter<T, IO>, mode_coefficients<T, IO>, backward<T, IO>, lanes_of<T>};

}  // namespace

extern const KernelSet<RadialFilterKernels> radial_filter_kernels{kernels<float, float>, kernels<float, Bf16>, kernels<float, Half>,
                                                                  kernels<double, double>};

}  // namespace SIMD_NAME
}  // namespace spanet
