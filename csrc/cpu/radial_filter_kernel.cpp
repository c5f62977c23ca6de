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
//         Radii 1 and 2 over planes of a few vectors stay in registers, two planes in a vector if their rows fit in half of it
//         (disc.h). Rows of y are brought together in the cache where they are not whole vectors, and written by whole ones.
//       lanes (channels_last): l is a channel; reduce along columns, then along rows, expand in reverse.
// Every output is owned by one thread and the order of its sum is fixed: bit-equal for any number of threads.
// Memory: x is read once from memory and once more from the cache, y is written once, past the cache if `stream` (columns).

#include "cpu/radial_filter_kernel.h"

#include "cpu/disc.h"
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

// n elements of scratch, which has room for a vector more, to memory in whole aligned vectors, past the caches if `stream`.
template <class T, class IO> void write_out(const T* from, IO* to, int64_t n, bool stream) {
  constexpr int64_t vl = lanes_of<T>, line = vl * vectors_of_line<T, IO>;
  const auto write_part = [&](int64_t i, int64_t end) {
    for (; i < end; i += vl) store_part<T>(to + i, load<T>(from + i), end - i < vl ? end - i : vl);
  };
  const int64_t ahead = (SIMD_BYTES - reinterpret_cast<uintptr_t>(to) % SIMD_BYTES) % SIMD_BYTES / sizeof(IO);
  int64_t i = ahead < n ? ahead : n;
  write_part(0, i);
  for (; i + line <= n; i += line) store_line<T>(from + i, to + i, stream);
  write_part(i, n);
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

// What the columns cut works in, for each plane of a group. v and t are (A_H, width) in slots; parts has a vector for each mode,
// z a number; full and weighed, (A_H, padded), serve the matrix products.
template <class T, class IO> struct ColumnsScratch {
  ColumnsScratch(const Modes<T>& m, int64_t planes, int64_t staged, int64_t copied)
      : rows(m.rows.count() * m.columns.width), padded(m.rows.count() * m.columns.padded),
        scratch(planes * 2 * rows + (planes * m.inside + lanes_of<T>) * (lanes_of<T> + 3) + 2 * padded + 3 * m.columns.width + 2 * m.inside +
                staged + 2 * copied + 512) {
    v = scratch.take(planes * rows);
    t = scratch.take(planes * rows);
    parts = reinterpret_cast<Vec<T>*>(scratch.take((planes * m.inside + lanes_of<T>) * lanes_of<T>));
    z = scratch.take(planes * m.inside + lanes_of<T>);
    full = scratch.take(padded);
    weighed = scratch.zeros(padded);
    base = scratch.take(m.columns.width);
    dots = reinterpret_cast<double*>(scratch.take(2 * m.columns.width));
    products = reinterpret_cast<double*>(scratch.take(2 * m.inside));
    stage = scratch.take(staged);
    for (IO*& part : plane) part = reinterpret_cast<IO*>(scratch.take(copied));
  }
  int64_t rows, padded;
  Scratch<T> scratch;
  T *v, *t, *z, *full, *weighed, *base, *stage;
  Vec<T>* parts;
  double *dots, *products;
  IO* plane[2];
};

// z[i, k] = sum_ab v[i, a, b] over mode k, for so many planes.
template <class T, class IO> void columns_coefficients(const Modes<T>& m, ColumnsScratch<T, IO>& s, int64_t planes) {
  constexpr int64_t vl = lanes_of<T>;
  const int64_t width = m.columns.width, padded = m.columns.padded, inside = m.inside;
  if (inside > few_modes) {
    for (int64_t i = 0; i < planes; ++i) {
      product(m.rows.count(), padded, width, s.v + i * s.rows, width, m.columns.transposed, padded, s.full, padded);
      for (int64_t k = 0; k < inside; ++k) s.z[i * inside + k] = s.full[m.mode[k].row * padded + m.mode[k].column];
    }
    return;
  }
  Vec<T>* part = s.parts;
  for (int64_t i = 0; i < planes; ++i)
    for (int64_t k = 0; k < inside; ++k) {
      const T* row = s.v + i * s.rows + m.mode[k].row_at;
      const T* function = m.columns.once + m.mode[k].column_at;
      Vec<T> sum = load_raw<Vec<T>>(row) * load_raw<Vec<T>>(function);
      for (int64_t j = vl; j < width; j += vl) sum += load_raw<Vec<T>>(row + j) * load_raw<Vec<T>>(function + j);
      *part++ = sum;
    }
  // of vectors beyond the last one the sums are not read
  for (int64_t i = 0; i < planes * inside; i += vl) store<T>(s.z + i, sum_lanes<T>(s.parts + i));
}

// t[a, j] = sum_b z[a, b] psi[b, j] with the weighed coefficients of a plane.
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
      for (++k; k < m.inside && m.mode[k].row_at == row; ++k)
        sum += load_raw<Vec<T>>(m.columns.functions + m.mode[k].column_at + j) * z[k];
      store<T>(t + row + j, sum);
    }
}

// Planes of a group: what is read and written of them stays in the first-level cache.
constexpr int64_t most_planes = 16;
template <class T, class IO> int64_t group_planes(int64_t pixels) {
  constexpr int64_t cached = 8192;
  const int64_t fit = cached / (pixels * static_cast<int64_t>(sizeof(T)));
  return fit < 2 ? 1 : fit < most_planes ? fit / 2 * 2 : most_planes;
}

// Planes [begin, end), in groups: the short steps of one overlap with those of the next.
// z are the coefficients of x, not normalised; between(b, c, z) is what happens to them.
// WRITE: then their functions are added to base(c) x; else there is no y. `staged`: rows of y are brought together in scratch, where
// what crosses a cache line costs little.
template <bool WRITE, class T, class IO, class Base, class Between>
void over_columns(const Modes<T>& m, Planes<const IO> x, Planes<IO> y, int64_t channels, bool staged, bool stream, int64_t begin,
                  int64_t end, Base base, Between between) {
  const int64_t h = m.rows.n, w = m.columns.n, width = m.columns.width, pixels = h * w;
  const int64_t planes = x.w == 1 ? group_planes<T, IO>(pixels) : 1;
  ColumnsScratch<T, IO> s(m, planes, staged ? planes * pixels + lanes_of<T> : 0, x.w == 1 ? 0 : pixels);
  int64_t image = begin / channels, channel = begin % channels;
  for (int64_t first = begin; first < end; first += planes) {
    const int64_t group = end - first < planes ? end - first : planes;
    const IO* plane[most_planes];
    int64_t h_stride, b[most_planes], c[most_planes];
    for (int64_t g = 0; g < group; ++g) {
      b[g] = image;
      c[g] = channel;
      if (++channel == channels) channel = 0, ++image;
      plane[g] = adjacent_columns(x.data + b[g] * x.b + c[g] * x.c, x, h_stride, h, w, s.plane[0]);
      reduce(m.rows, plane[g], h_stride, w, true, s.v + g * s.rows, width);
    }
    columns_coefficients(m, s, group);
    for (int64_t g = 0; g < group; ++g) between(b[g], c[g], s.z + g * m.inside);
    if constexpr (WRITE) {
      IO* out = y.data + b[0] * y.b + c[0] * y.c;
      for (int64_t g = 0; g < group; ++g) columns_expand(m, s.z + g * m.inside, s, s.t + g * s.rows);
      for (int64_t g = 0; g < group; ++g) {
        for (int64_t j = 0; j < width; ++j) s.base[j] = base(c[g]);
        const T* t = s.t + g * s.rows;
        if (staged) expand<Out::scaled>(m.rows, t, width, w, true, Rows<T, IO, T>{s.base, plane[g], h_stride, s.stage + g * pixels, w});
        else expand<Out::scaled>(m.rows, t, width, w, true, Rows<T, IO, IO>{s.base, plane[g], h_stride, out + g * pixels, w});
      }
      if (staged) write_out(s.stage, out, group * pixels, stream);
    }
  }
  if (stream) fence_streaming();
}

// filter for planes [begin, end) with the modes of Disc<R2>.
template <int R2, int NV, class T, class IO>
void filter_disc(const Modes<T>& m, Planes<const IO> x, Planes<IO> y, const Profile<T>& p, int64_t channels, bool stream, int64_t begin,
                 int64_t end) {
  constexpr int PARTS = parts_of<NV>;
  constexpr int64_t modes = Disc<R2>::modes, vl = lanes_of<T>, half = vl / 2;
  const int64_t w = m.columns.n, pixels = m.rows.n * w, planes = group_planes<T, IO>(pixels);
  Scratch<T> scratch((planes + 1) * pixels + vl + 64);
  T* stage = scratch.take((planes + 1) * pixels + vl);
  Coefficients<R2, NV, T> z, weights{};
  Vec<T> base{};
  int64_t image = begin / channels, channel = begin % channels;
  const bool same = p.base_stride == 0 && p.gain_channel == 0;
  for (int64_t first = begin; first < end; first += planes) {
    const int64_t group = end - first < planes ? end - first : planes;
    IO* out = y.data + image * y.b + channel * y.c;
    for (int64_t g = 0; g < group; g += PARTS) {
      const IO* plane[2] = {};
      for (int part = 0; part < PARTS && g + part < group; ++part) {
        plane[part] = x.data + image * x.b + channel * x.c;
        if (!same || first + g == begin) {
          for (int64_t l = part * half; l < vl; ++l) base[l] = p.base[channel * p.base_stride];
          const T* gain = p.gain + channel * p.gain_channel;
          for (int64_t k = 0; k < modes; ++k) weights.of(k, part) = m.scales[k] * gain[m.mode[k].index * p.gain_shell];
        }
        if (++channel == channels) channel = 0, ++image;
      }
      // a plane without another one beside it is its own second
      const Step<NV, T> step{NV > 0 ? w - vl : w, true, PARTS == 2 && plane[1] ? plane[1] - plane[0] : 0};
      disc_coefficients(m, plane[0], x.h, step, Vec<T>{}, z);
      z *= weights;
      disc_expand(m, z, base, step, Rows<T, IO, T>{nullptr, plane[0], x.h, stage + g * pixels, w, pixels});
    }
    write_out(stage, out, group * pixels, stream);
  }
  if (stream) fence_streaming();
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
        scratch((2 * m.rows.n * m.columns.count() + 3 * modes + 8) * line_up(most) + 256) {
    for (T*& part : u) part = scratch.take(m.rows.n * m.columns.count() * most);
    gains = scratch.zeros(modes * most);
    for (T*& part : z) part = scratch.zeros(modes * most);
    base = scratch.zeros(most);
    partial = scratch.take(most);
    dots = reinterpret_cast<double*>(scratch.take(2 * most));
  }
  int64_t most, modes;
  Scratch<T> scratch;
  T *u[2], *gains, *base, *partial, *z[2];
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
    lanes_coefficients(m, from, x.h, x.w, part.lanes, wide, s.u[0], s.z[0]);
    between(b, part, wide, s.z[0], s.gains);
    if constexpr (WRITE) {
      expand<Out::sum>(m.rows, s.z[0], row, row, false, Rows<T, T, T>{s.base, s.u[0], 0, s.u[0], row});
      IO* to = y.data + b * y.b + part.first * y.c;
      for (int64_t i = 0; i < m.rows.n; ++i)
        expand<Out::scaled>(m.columns, s.u[0] + i * row, wide, part.lanes, false, Rows<T, IO, IO>{s.base, from + i * x.h, x.w, to + i * y.h, y.w});
    }
  }
}

// Planes whose staged copies would leave the second-level cache are written at once.
constexpr int64_t most_staged = int64_t{1} << 20;

template <class T, class IO>
void filter(Cut cut, const Modes<T>& m, Planes<const IO> x, Planes<IO> y, const Profile<T>& p, int64_t channels, int64_t chunk, bool stream,
            int64_t begin, int64_t end) {
  if (cut == Cut::columns) {
    constexpr int64_t line = SIMD_BYTES / sizeof(IO);
    const bool fits = m.rows.n * m.columns.n * static_cast<int64_t>(sizeof(T)) <= most_staged;
    const bool staged = fits && (stream || m.columns.n % line != 0 || sizeof(IO) != sizeof(T));
    const auto disc = [&](auto r2, auto nv) { filter_disc<r2(), nv()>(m, x, y, p, channels, stream, begin, end); };
    if (fits && x.w == 1 && for_disc(m, disc)) return;
    over_columns<true>(
        m, x, y, channels, staged, stream, begin, end, [&](int64_t c) { return p.base[c * p.base_stride]; },
        [&](int64_t, int64_t c, T* z) {
          const T* gain = p.gain + c * p.gain_channel;
          for (int64_t k = 0; k < m.inside; ++k) z[k] *= m.scales[k] * gain[m.mode[k].index * p.gain_shell];
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
    over_columns<false>(m, x, none, channels, false, false, begin, end, 0, [&](int64_t b, int64_t c, T* z) {
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

// total[l] += sum over h x w places of <grad, x>, lane by lane; partial sums in T, totals in fp64.
template <class T, class IO>
void accumulate_dot(const IO* grad, Planes<const IO> of_grad, const IO* x, Planes<const IO> of_x, int64_t h, int64_t w, int64_t lanes,
                    T* partial, double* total) {
  for_lanes<T, 2>(lanes, [&](auto nv, int64_t l, int64_t last) {
    const Step<nv(), T> step{last, false};
    Vec<T> sum[step.vectors] = {};
    for (int64_t i = 0; i < h; ++i)
      for (int64_t j = 0; j < w; ++j)
        UNROLL
        for (int v = 0; v < step.vectors; ++v) {
          const int64_t at = l + step.at(v);
          sum[v] += step.read(grad + i * of_grad.h + j * of_grad.w + at) * step.read(x + i * of_x.h + j * of_x.w + at);
        }
    UNROLL
    for (int v = 0; v < step.vectors; ++v) step.write(partial + l + step.at(v), sum[v], 0);
  });
  for (int64_t l = 0; l < lanes; ++l) total[l] += partial[l];
}

template <class T, class IO>
void backward_columns(const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t channels,
                      int64_t begin, int64_t end) {
  const int64_t h = m.rows.n, w = m.columns.n, inside = m.inside;
  ColumnsScratch<T, IO> s(m, 2, 0, grad.w == 1 && x.w == 1 ? 0 : h * w);
  Planes<const IO> from[2] = {grad, x};
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t k = 0; k < inside; ++k) s.products[k] = 0;
    for (int64_t j = 0; j < w; ++j) s.dots[j] = 0;
    for (int64_t b = 0; b < images; ++b) {
      const IO* plane[2];
      for (int side = 0; side < 2; ++side) {
        const Planes<const IO>& p = side == 0 ? grad : x;
        plane[side] = adjacent_columns(p.data + b * p.b + c * p.c, p, from[side].h, h, w, s.plane[side]);
        reduce(m.rows, plane[side], from[side].h, w, true, s.v + side * s.rows, m.columns.width);
      }
      columns_coefficients(m, s, 2);
      for (int64_t k = 0; k < inside; ++k) s.products[k] += double(s.z[k]) * double(s.z[inside + k]);
      // rows in groups of eight: short sums in T
      for (int64_t i = 0; i < h; i += 8)
        accumulate_dot(plane[0] + i * from[0].h, from[0], plane[1] + i * from[1].h, from[1], h - i < 8 ? h - i : 8, 1, w, s.t, s.dots);
    }
    for (int64_t k = 0; k < inside; ++k) sums[k * channels + c] = s.products[k];
    for (int64_t j = 0; j < w; ++j) sums[inside * channels + c] += s.dots[j];
  }
}

// The same for the modes of Disc<R2>; the planes of a step are those of a channel in PARTS images.
template <int R2, int NV, class T, class IO>
void backward_disc(const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t channels,
                   int64_t begin, int64_t end) {
  constexpr int PARTS = parts_of<NV>;
  using Z = Coefficients<R2, NV, T>;
  constexpr int64_t modes = Disc<R2>::modes, vl = lanes_of<T>;
  const int64_t last = NV > 0 ? m.columns.n - vl : m.columns.n;
  for (int64_t c = begin; c < end; ++c) {
    double products[Z::vectors * vl] = {};
    for (int64_t b = 0; b < images; b += PARTS) {
      const bool pair = PARTS == 2 && b + 1 < images;
      const IO* g = grad.data + b * grad.b + c * grad.c;
      const IO* f = x.data + b * x.b + c * x.c;
      const Step<NV, T> grad_step{last, true, pair ? grad.b : 0}, x_step{last, true, pair ? x.b : 0};
      Z of_grad, of_x;
      disc_coefficients(m, g, grad.h, grad_step, Vec<T>{}, of_grad);
      disc_coefficients(m, f, x.h, x_step, disc_dot(m, g, grad.h, grad_step, f, x.h, x_step), of_x);
      // the number behind the coefficients is <grad, x> itself; of a plane without another one beside it the second copy is left out
      for (int64_t part = 0; part < PARTS; ++part) of_grad.of(modes, part) = 1;
      if (PARTS == 2 && !pair)
        for (int64_t k = 0; k <= modes; ++k) of_grad.of(k, 1) = 0;
      for (int64_t i = 0; i < Z::vectors * vl; ++i) products[i] += double(of_grad.number(i)) * double(of_x.number(i));
    }
    for (int64_t k = 0; k <= modes; ++k)
      for (int64_t part = 0; part < PARTS; ++part) sums[k * channels + c] += products[k * PARTS + part];
  }
}

template <class T, class IO>
void backward_lanes(const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t blocks,
                    int64_t channels, int64_t chunk, int64_t begin, int64_t end) {
  const int64_t h = m.rows.n, w = m.columns.n, chunks = chunks_of(channels, chunk);
  const int64_t short_rows = w < 64 ? 64 / w : 1;  // rows that are still in the first-level cache, in whose dot products T rounds little
  LanesScratch<T> s(m, channels, chunk);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit / chunks;
    const Chunk part = chunk_of(channels, chunk, unit % chunks);
    const int64_t lanes = part.lanes, wide = lanes < lanes_of<T> ? lanes_of<T> : lanes, row = m.columns.count() * wide;
    double* to = sums + block * (m.inside + 1) * channels + part.first;
    for (int64_t l = 0; l < lanes; ++l) s.dots[l] = 0;
    for (int64_t b = block * images / blocks; b < (block + 1) * images / blocks; ++b) {
      const IO* g = grad.data + b * grad.b + part.first * grad.c;
      const IO* f = x.data + b * x.b + part.first * x.c;
      for (int64_t first = 0; first < h; first += short_rows) {
        const int64_t rows = h - first < short_rows ? h - first : short_rows;
        for (int64_t i = first; i < first + rows; ++i) {
          reduce(m.columns, g + i * grad.h, grad.w, lanes, false, s.u[0] + i * row, wide);
          reduce(m.columns, f + i * x.h, x.w, lanes, false, s.u[1] + i * row, wide);
        }
        accumulate_dot(g + first * grad.h, grad, f + first * x.h, x, rows, w, lanes, s.partial, s.dots);
      }
      for (int side = 0; side < 2; ++side) reduce(m.rows, s.u[side], row, row, false, s.z[side], row);
      for (int64_t k = 0; k < m.inside; ++k) {
        const int64_t at = m.mode[k].row * row + m.mode[k].column * wide;
        for (int64_t l = 0; l < lanes; ++l) to[k * channels + l] += double(s.z[0][at + l]) * double(s.z[1][at + l]);
      }
    }
    for (int64_t l = 0; l < lanes; ++l) to[m.inside * channels + l] += s.dots[l];
  }
}

template <class T, class IO>
void backward(Cut cut, const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t blocks,
              int64_t channels, int64_t chunk, int64_t begin, int64_t end) {
  if (cut == Cut::lanes) return backward_lanes(m, grad, x, sums, images, blocks, channels, chunk, begin, end);
  const auto disc = [&](auto r2, auto nv) { backward_disc<r2(), nv()>(m, grad, x, sums, images, channels, begin, end); };
  if (grad.w == 1 && x.w == 1 && for_disc(m, disc)) return;
  backward_columns(m, grad, x, sums, images, channels, begin, end);
}

template <class T, class IO>
constexpr RadialFilterKernels<T, IO> kernels{filter<T, IO>, mode_coefficients<T, IO>, backward<T, IO>, lanes_of<T>};

}  // namespace

extern const KernelSet<RadialFilterKernels> radial_filter_kernels{
    kernels<float, float>, kernels<float, Bf16>, kernels<float, Half>, kernels<double, double>,
#if SIMD_BYTES == 64
    kernels<float, NativeBf16>,
#endif
};

}  // namespace SIMD_NAME
}  // namespace spanet
