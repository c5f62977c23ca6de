// The columns cut of radial_filter_kernel.cpp: planes in NCHW, one after the other.
// Included once by a file that is compiled per instruction set.
#pragma once

#include "cpu/disc.h"
#include "cpu/flat.h"
#include "cpu/runs.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

// A plane as rows of adjacent columns: the plane itself, or a copy if its columns are apart or its elements are to be widened.
template <class T, class IO>
const Read<T, IO>* adjacent_columns(const IO* x, Planes<const IO> p, int64_t& h_stride, int64_t h, int64_t w, Read<T, IO>* copy) {
  h_stride = w;
  if constexpr (widened<T, IO>) {
    for (int64_t i = 0; i < h; ++i) {
      if (p.w == 1) read_run(x + i * p.h, w, copy + i * w);
      else
        for (int64_t j = 0; j < w; ++j) copy[i * w + j] = widen(x[i * p.h + j * p.w]);
    }
    return copy;
  } else {
    if (p.w == 1) h_stride = p.h;
    for (int64_t i = 0; p.w != 1 && i < h; ++i)
      for (int64_t j = 0; j < w; ++j) copy[i * w + j] = x[i * p.h + j * p.w];
    return p.w == 1 ? x : copy;
  }
}

// Whether planes of x are read where they lie.
template <class T, class IO> bool in_place(Planes<const IO> x) { return !widened<T, IO> && x.w == 1; }

// What the columns cut works in, for each plane of a group. v and t are (A_H, width) in slots; parts has a vector for each mode,
// z a number; full and weighed, (A_H, padded), serve the matrix products.
template <class T, class X> struct ColumnsScratch {
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
    for (X*& part : plane) part = reinterpret_cast<X*>(scratch.take(copied));
  }
  int64_t rows, padded;
  Scratch<T> scratch;
  T *v, *t, *z, *full, *weighed, *base, *stage;
  Vec<T>* parts;
  double *dots, *products;
  X* plane[2];
};

// z[i, k] = sum_ab v[i, a, b] over mode k, for so many planes.
template <class T, class X> void columns_coefficients(const Modes<T>& m, ColumnsScratch<T, X>& s, int64_t planes) {
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
template <class T, class X> void columns_expand(const Modes<T>& m, const T* z, ColumnsScratch<T, X>& s, T* t) {
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
template <class T> int64_t group_planes(int64_t pixels) {
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
  const bool lies = in_place<T>(x);
  const int64_t planes = x.w == 1 ? group_planes<T>(pixels) : 1;
  using X = Read<T, IO>;
  ColumnsScratch<T, X> s(m, planes, staged ? planes * pixels + lanes_of<T> : 0, lies ? 0 : planes * pixels);
  int64_t image = begin / channels, channel = begin % channels;
  for (int64_t first = begin; first < end; first += planes) {
    const int64_t group = end - first < planes ? end - first : planes;
    const X* plane[most_planes];
    int64_t h_stride, b[most_planes], c[most_planes];
    for (int64_t g = 0; g < group; ++g) {
      b[g] = image;
      c[g] = channel;
      if (++channel == channels) channel = 0, ++image;
      plane[g] = adjacent_columns<T>(x.data + b[g] * x.b + c[g] * x.c, x, h_stride, h, w, s.plane[0] + g * pixels);
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
        const auto rows = [&](auto* to) {
          expand<Out::scaled>(m.rows, t, width, w, true, Rows<T, X, std::remove_pointer_t<decltype(to)>>{s.base, plane[g], h_stride, to, w});
        };
        if constexpr (widened<T, IO>) rows(s.stage + g * pixels);
        else if constexpr (!std::is_same_v<T, IO>) rows(out + g * pixels);
        else rows(staged ? s.stage + g * pixels : out + g * pixels);
      }
      if (staged) write_run(s.stage, out, group * pixels, stream);
    }
  }
  if (stream) fence_streaming();
}

// Rows in T to elements that are read as X.
template <class T, class X> using WriteRun = void (*)(const T* from, X* to, int64_t n, bool stream);

// filter for planes [begin, end) with the modes of Disc<R2>.
template <int R2, int NV, class T, class X>
void filter_disc(const Modes<T>& m, Planes<const X> x, Planes<X> y, const Profile<T>& p, int64_t channels, WriteRun<T, X> write,
                 bool stream, int64_t begin, int64_t end) {
  constexpr int PARTS = parts_of<NV>;
  constexpr int64_t modes = Disc<R2>::modes, vl = lanes_of<T>, half = vl / 2;
  const int64_t w = m.columns.n, pixels = m.rows.n * w, planes = group_planes<T>(pixels);
  Scratch<T> scratch((planes + 1) * pixels + vl + 64);
  T* stage = scratch.take((planes + 1) * pixels + vl);
  Coefficients<R2, NV, T> z, weights{};
  Vec<T> base{};
  int64_t image = begin / channels, channel = begin % channels;
  const bool same = p.base_stride == 0 && p.gain_channel == 0;
  for (int64_t first = begin; first < end; first += planes) {
    const int64_t group = end - first < planes ? end - first : planes;
    X* out = y.data + image * y.b + channel * y.c;
    for (int64_t g = 0; g < group; g += PARTS) {
      const X* plane[2] = {};
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
      disc_expand(m, z, base, step, Rows<T, X, T>{nullptr, plane[0], x.h, stage + g * pixels, w, pixels});
    }
    write(stage, out, group * pixels, stream);
  }
  if (stream) fence_streaming();
}

// Whether there are kernels for discs: where time is measured, the others do without.
template <class T, class IO> constexpr bool has_discs = SIMD_BYTES >= 32 && std::is_same_v<T, float> && !widened<T, IO>;

// Planes whose staged copies would leave the second-level cache are written at once, if they need not be narrowed; those that would leave
// the first-level cache are not staged for their rows to be whole vectors.
constexpr int64_t most_staged = int64_t{1} << 20, most_aligned = int64_t{1} << 14;

template <class T, class IO>
void filter_columns(const Modes<T>& m, Planes<const IO> x, Planes<IO> y, const Profile<T>& p, int64_t channels, bool stream, int64_t begin,
                    int64_t end) {
  constexpr int64_t line = SIMD_BYTES / sizeof(IO);
  const int64_t bytes = m.rows.n * m.columns.n * static_cast<int64_t>(sizeof(T));
  const bool fits = bytes <= most_staged, pays = stream ? fits : bytes <= most_aligned && m.columns.n % line != 0;
  const bool staged = widened<T, IO> || (std::is_same_v<T, IO> && pays);
  if constexpr (has_discs<T, IO>) {
    using X = Read<T, IO>;
    if constexpr (has_flat<T>)
      if (is_flat(m, x) && !stream) {
        const auto filter = m.inside == 1 ? filter_flat<1, T, X, IO> : filter_flat<flat_modes, T, X, IO>;
        return filter(m, as_read<T>(x), y, p, channels, begin, end);
      }
    const auto write = [](const T* from, X* to, int64_t n, bool stream) { write_run(from, static_cast<IO*>(to), n, stream); };
    const auto disc = [&](auto r2, auto nv) {
      const Planes<X> as_y{y.data, y.b, y.c, y.h, y.w};
      filter_disc<r2(), nv(), T, X>(m, as_read<T>(x), as_y, p, channels, write, stream, begin, end);
    };
    if (fits && x.w == 1 && for_disc(m, disc)) return;
  }
  over_columns<true>(
      m, x, y, channels, staged, stream, begin, end, [&](int64_t c) { return p.base[c * p.base_stride]; },
      [&](int64_t, int64_t c, T* z) {
        const T* gain = p.gain + c * p.gain_channel;
        for (int64_t k = 0; k < m.inside; ++k) z[k] *= m.scales[k] * gain[m.mode[k].index * p.gain_shell];
      });
}

template <class T, class IO>
void mode_coefficients_columns(const Modes<T>& m, Planes<const IO> x, T* out, int64_t channels, int64_t begin, int64_t end) {
  over_columns<false>(m, x, Planes<IO>{}, channels, false, false, begin, end, 0, [&](int64_t b, int64_t c, T* z) {
    T* to = out + (b * channels + c) * m.inside;
    for (int64_t k = 0; k < m.inside; ++k) to[m.mode[k].index] = T(z[k] * m.mode[k].scale);
  });
}

template <class T, class IO>
void backward_planes(const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t channels,
                      int64_t begin, int64_t end) {
  const int64_t h = m.rows.n, w = m.columns.n, inside = m.inside;
  using X = Read<T, IO>;
  ColumnsScratch<T, X> s(m, 2, 0, in_place<T>(grad) && in_place<T>(x) ? 0 : h * w);
  int64_t stride[2];
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t k = 0; k < inside; ++k) s.products[k] = 0;
    for (int64_t j = 0; j < w; ++j) s.dots[j] = 0;
    for (int64_t b = 0; b < images; ++b) {
      const X* plane[2];
      for (int side = 0; side < 2; ++side) {
        const Planes<const IO>& p = side == 0 ? grad : x;
        plane[side] = adjacent_columns<T>(p.data + b * p.b + c * p.c, p, stride[side], h, w, s.plane[side]);
        reduce(m.rows, plane[side], stride[side], w, true, s.v + side * s.rows, m.columns.width);
      }
      columns_coefficients(m, s, 2);
      for (int64_t k = 0; k < inside; ++k) s.products[k] += double(s.z[k]) * double(s.z[inside + k]);
      // rows in groups of eight: short sums in T
      for (int64_t i = 0; i < h; i += 8)
        add_dots(plane[0] + i * stride[0], stride[0], 0, plane[1] + i * stride[1], stride[1], 0, h - i < 8 ? h - i : 8, 1, w, s.t, s.dots);
    }
    for (int64_t k = 0; k < inside; ++k) sums[k * channels + c] = s.products[k];
    for (int64_t j = 0; j < w; ++j) sums[inside * channels + c] += s.dots[j];
  }
}

// The same for the modes of Disc<R2>. A few channels take turns in every image: their planes lie one behind the other.
template <int R2, int NV, class T, class X>
void backward_disc(const Modes<T>& m, Planes<const X> grad, Planes<const X> x, double* sums, int64_t images, int64_t channels,
                   int64_t begin, int64_t end) {
  constexpr int PARTS = parts_of<NV>;
  using Z = Coefficients<R2, NV, T>;
  constexpr int64_t modes = Disc<R2>::modes, vl = lanes_of<T>, steps = 8;
  const int64_t last = NV > 0 ? m.columns.n - vl : m.columns.n;
  for (int64_t first = begin; first < end; first += steps * PARTS) {
    const int64_t few = end - first < steps * PARTS ? end - first : steps * PARTS;
    double products[steps][Z::vectors * vl] = {};
    for (int64_t b = 0; b < images; ++b)
      for (int64_t c = 0; c < few; c += PARTS) {
        // a plane without another one beside it is its own second
        const bool pair = PARTS == 2 && c + 1 < few;
        const X* g = grad.data + b * grad.b + (first + c) * grad.c;
        const X* f = x.data + b * x.b + (first + c) * x.c;
        const Step<NV, T> grad_step{last, true, pair ? grad.c : 0}, x_step{last, true, pair ? x.c : 0};
        Z of_grad, of_x;
        // the number behind the coefficients is <grad, x> itself, once
        disc_coefficients(m, g, grad.h, grad_step, Vec<T>{} + T(PARTS) / vl, of_grad);
        disc_coefficients(m, f, x.h, x_step, disc_dot(m, g, grad.h, grad_step, f, x.h, x_step), of_x);
        double* to = products[c / PARTS];
        for (int64_t i = 0; i < Z::vectors * vl; ++i) to[i] += double(of_grad.number(i)) * double(of_x.number(i));
      }
    for (int64_t c = 0; c < few; ++c)
      for (int64_t k = 0; k <= modes; ++k) sums[k * channels + first + c] = products[c / PARTS][k * PARTS + c % PARTS];
  }
}

template <class T, class IO>
void backward_columns(const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t channels,
                      int64_t begin, int64_t end) {
  if constexpr (has_discs<T, IO>) {
    if constexpr (has_flat<T>)
      if (is_flat(m, grad) && is_flat(m, x)) {
        const auto backward = m.inside == 1 ? backward_flat<1, T, Read<T, IO>> : backward_flat<flat_modes, T, Read<T, IO>>;
        return backward(m, as_read<T>(grad), as_read<T>(x), sums, images, channels, begin, end);
      }
    const auto disc = [&](auto r2, auto nv) {
      backward_disc<r2(), nv(), T, Read<T, IO>>(m, as_read<T>(grad), as_read<T>(x), sums, images, channels, begin, end);
    };
    if (grad.w == 1 && x.w == 1 && for_disc(m, disc)) return;
  }
  backward_planes(m, grad, x, sums, images, channels, begin, end);
}

}  // namespace
}  // namespace SIMD_NAME
}  // namespace spanet
