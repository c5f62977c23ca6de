// Axial convolution on the CPU, for the instruction set this file is compiled for (simd.h).
//
//   t[i,j] = row_bias + sum_m row_weight[m] x[i, j+m-p]         z[i,j] = column_bias + sum_m column_weight[m] t[i+m-p, j]
//   gt = flipped columns of g,  x_grad = flipped rows of gt,  column_weight_grad[m] = sum g[i+m'-p, j] t[i,j],  m' = k-1-m,
//   row_weight_grad[m] = sum gt[i, j+m'-p] x[i,j]:  each weight gradient needs the taps that the flipped convolution just read
//
// Lanes are channels: up to a vector of planes side by side, a chunk, is worked on at a time, so that a pixel is a vector,
// taps are whole vectors apart along both axes, and every sum stays in its lane. Channels that are not adjacent in memory
// are brought into lanes on the way in and out (lanes.h).
// Rows run through in strips: x (or the gradient), widened and with zeros at both ends -> its convolution along one axis in
// a window of the last 2p rows and a strip -> the convolution along the other -> out; the coefficients of z by the steps of
// the radial filter (tiles.h), rows as they leave. All of it stays in the first two cache levels.
// Weights go through in groups of 7, 5, 3 and 1 taps held in registers; any odd k is a few such groups.
// Every output is owned by one unit of image and chunk, weight gradients are summed row by row, over a strip, then in
// fp64 over strips and images, in an order that depends on nothing else: bit-equal for any number of threads.
// Memory: x read once and z written once forward; g and x read once and x_grad written once backward.

#include "cpu/axial_conv_kernel.h"

#include "cpu/lanes.h"
#include "cpu/tiles.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

template <class T> void zero(T* p, int64_t elements) { std::memset(p, 0, elements * sizeof(T)); }

// f(first, J) for groups of J = 7, 5, 3 or 1 taps that make up `size`.
template <class F> SIMD_INLINE void for_taps(int64_t size, F f) {
  for (int64_t first = 0; first < size;) {
    const auto group = [&](auto taps) {
      f(first, taps);
      first += taps();
    };
    if (size - first >= 7) group(std::integral_constant<int, 7>());
    else if (size - first >= 5) group(std::integral_constant<int, 5>());
    else if (size - first >= 3) group(std::integral_constant<int, 3>());
    else group(std::integral_constant<int, 1>());
  }
}

// In the direction of the taps and in the other: distances between vectors, or how many there are.
struct Steps {
  int64_t along, across;
};

// out[a, b] = start[a, b] + sum_m weight[m] s[a + m, b] for M outputs a at a time, which share what they read; start is the
// bias, for all of them, or what out holds.
template <int J, int M, class T, class Out>
SIMD_INLINE void conv_block(const T* weights, const T* start, Steps from_start, const T* s, Steps from, Out* out, Steps to,
                            int64_t across) {
  constexpr int64_t vl = lanes_of<T>;
  Vec<T> weight[J];
  UNROLL
  for (int m = 0; m < J; ++m) weight[m] = load_raw<Vec<T>>(weights + m * vl);
  for (int64_t b = 0; b < across; ++b, start += from_start.across, s += from.across, out += to.across) {
    Vec<T> sum[M];
    UNROLL
    for (int a = 0; a < M; ++a) sum[a] = load_raw<Vec<T>>(start + a * from_start.along);
#pragma GCC unroll 16
    for (int tap = 0; tap < J + M - 1; ++tap) {
      const Vec<T> v = load_raw<Vec<T>>(s + tap * from.along);
      UNROLL
      for (int a = 0; a < M; ++a)
        if (tap >= a && tap - a < J) sum[a] += weight[tap - a] * v;
    }
    UNROLL
    for (int a = 0; a < M; ++a) store<T>(out + a * to.along, sum[a]);
  }
}

// Out other than T is for kernels of one group of taps.
template <class T, class Out>
void conv(int64_t size, const T* weight, const T* bias, const T* s, Steps from, Out* out, Steps to, Steps count) {
  for_taps(size, [&](int64_t first, auto taps) {
    for (int64_t a = 0; a < count.along;) {
      const auto block = [&](auto m) {
        const T* start = bias;
        Steps from_start{0, 0};
        if constexpr (std::is_same_v<T, Out>)
          if (first) start = out + a * to.along, from_start = to;
        conv_block<taps(), m()>(weight + first * lanes_of<T>, start, from_start, s + (a + first) * from.along, from, out + a * to.along,
                                to, count.across);
        a += m();
      };
      const int64_t left = count.along - a;
      if (left >= 4) block(std::integral_constant<int, 4>());
      else if (left == 3) block(std::integral_constant<int, 3>());
      else if (left == 2) block(std::integral_constant<int, 2>());
      else block(std::integral_constant<int, 1>());
    }
  });
}

// For a run of n pixels: out = sum_m weight[m] s[m], sums[m] += sum other s[m], sums[size] += sum of s in the centre,
// taps m being `tap` elements apart in s.
template <class T>
void conv_backward(int64_t size, const T* weights, const T* s, int64_t tap, const T* other, T* out, int64_t n, T* sums) {
  constexpr int64_t vl = lanes_of<T>, most = 64;  // short sums, for accuracy
  for (; n > most; n -= most, s += most * vl, other += most * vl, out += most * vl)
    conv_backward(size, weights, s, tap, other, out, most, sums);
  const auto add = [](T* sum, Vec<T> v) { store<T>(sum, load_raw<Vec<T>>(sum) + v); };
  for_taps(size, [&](int64_t first, auto taps) {
    constexpr int J = taps();
    Vec<T> weight[J], sum[J];
    UNROLL
    for (int m = 0; m < J; ++m) {
      weight[m] = load_raw<Vec<T>>(weights + (first + m) * vl);
      sum[m] = Vec<T>{};
    }
    for (int64_t i = 0; i < n; ++i) {
      const Vec<T> factor = load_raw<Vec<T>>(other + i * vl);
      Vec<T> result = first ? load_raw<Vec<T>>(out + i * vl) : Vec<T>{};
      UNROLL
      for (int m = 0; m < J; ++m) {
        const Vec<T> v = load_raw<Vec<T>>(s + (first + m) * tap + i * vl);
        result += weight[m] * v;
        sum[m] += factor * v;
      }
      store<T>(out + i * vl, result);
    }
    UNROLL
    for (int m = 0; m < J; ++m) add(sums + (first + m) * vl, sum[m]);
  });
  Vec<T> total{};
  for (int64_t i = 0; i < n; ++i) total += load_raw<Vec<T>>(s + size / 2 * tap + i * vl);
  add(sums + size * vl, total);
}

// Pixels rounded to what memory will hold of them, in `rounded`; themselves if that is what they are.
template <class T, class IO> Pixels<const IO> round_rows(Pixels<T> from, int64_t rows, Pixels<IO> rounded) {
  if constexpr (std::is_same_v<IO, T>) {
    return {from.data, from.row, from.w};
  } else {
    for (int64_t i = 0; i < rows * from.row; i += lanes_of<T>) store<T>(rounded.data + i, load_raw<Vec<T>>(from.data + i));
    return {rounded.data, rounded.row, rounded.w};
  }
}

// Where a chunk of one image's channels is.
struct Unit {
  int64_t image, chunk, first, lanes;
};

// The memory that a thread works in. Rows of x and of the result enter and leave in strips; the window slides down over
// rows -p .. h + p of what the columns are taken from, zeros outside the plane.
template <class T, class IO> struct Work {
  static constexpr int64_t vl = lanes_of<T>, cached = 65536;
  int64_t p, h, w, strip, capacity, first = 0, ready = 0;
  T* next;
  T *row_weight, *row_bias, *column_weight, *column_bias, *row_flipped, *sums;
  Pixels<T> window, padded, middle, out;
  Pixels<IO> rounded;
  T *u, *z, *coefficients;

  Work(const AxialConv<T>& op) : p(op.size / 2), h(op.h), w(op.w) {
    strip = 128 / w < 4 ? 4 : 128 / w;
    if (strip > h) strip = h;
    const int64_t fits = cached / (w * vl * static_cast<int64_t>(sizeof(T)));
    const int64_t least = 8 * strip + 2 * p;  // rows that leave the first-level cache anyway move seldom
    capacity = fits < least ? least : fits;
    if (capacity > h + 2 * p) capacity = h + 2 * p;
    const int64_t pad = (strip + p) * (w + p) + p, modes = op.modes.inside;
    const int64_t total = 2 * op.sums() + op.size + capacity * w + 2 * pad + 2 * strip * w + h * op.modes.columns.count() + 2 * modes;
    next = static_cast<T*>(thread_scratch(total * vl * sizeof(T)));
    row_weight = take(op.size);
    row_bias = take(1);
    column_weight = take(op.size);
    column_bias = take(1);
    row_flipped = take(op.size);
    sums = take(op.sums());
    window = {take(capacity * w), w * vl, w};
    padded = {take_zeros(pad) + p * vl, (w + p) * vl, w};
    middle = {take_zeros(pad) + p * vl, (w + p) * vl, w};
    out = {take(strip * w), w * vl, w};
    rounded = {reinterpret_cast<IO*>(take(strip * w)), w * vl, w};
    u = take(h * op.modes.columns.count());
    z = take(modes);
    coefficients = take(modes);
  }
  T* take(int64_t pixels) {
    T* part = next;
    next += pixels * vl;
    return part;
  }
  T* take_zeros(int64_t pixels) {
    zero(next, pixels * vl);
    return take(pixels);
  }

  void load_parameters(const AxialConv<T>& op, const Unit& unit) {
    const auto load = [&](Planes<const T> from, int64_t n, T* to) {
      from.data += unit.first * from.c;
      load_rows(from, unit.lanes, 1, Pixels<T>{to, 0, n});
    };
    load(op.row_weight, op.size, row_weight);
    load(op.row_bias, 1, row_bias);
    load(op.column_weight, op.size, column_weight);
    load(op.column_bias, 1, column_bias);
  }

  T* row(int64_t i) const { return window.at(i - first, 0); }

  void start_plane() {
    first = -p;
    ready = 0;
    zero(row(-p), p * window.row);
  }
  // Makes rows begin - p .. end + p stand in the window: fill(i, n) puts rows i .. i + n of the plane there.
  template <class F> void advance(int64_t begin, int64_t end, F fill) {
    if (end + p - first > capacity) {
      std::memmove(window.data, row(begin - p), (ready - begin + p) * window.row * sizeof(T));
      first = begin - p;
    }
    const int64_t inside = end + p < h ? end + p : h;
    if (inside > ready) {
      fill(ready, inside - ready);
      ready = inside;
    }
    if (end + p > ready) {
      zero(row(ready), (end + p - ready) * window.row);
      ready = end + p;
    }
  }
};

// Image by image where the channels of a pixel share cache lines, else chunk by chunk, which keeps the parameters.
template <class T> Unit unit_of(const AxialConv<T>& op, int64_t i, bool by_image) {
  const int64_t vl = lanes_of<T>, chunks = (op.channels + vl - 1) / vl;
  const int64_t image = by_image ? i / chunks : i % op.images, chunk = by_image ? i % chunks : i / op.images;
  const int64_t first = chunk * vl, left = op.channels - first;
  return {image, chunk, first, left < vl ? left : vl};
}

// The planes of a unit, from row i on.
template <class IO> Planes<IO> part(Planes<IO> all, const Unit& unit, int64_t i) {
  all.data += unit.image * all.b + unit.first * all.c + i * all.h;
  return all;
}

template <class T, class IO> void store_coefficients(const AxialConv<T>& op, Work<T, IO>& s, const Unit& unit, Planes<T> to) {
  constexpr int64_t vl = lanes_of<T>;
  const int64_t columns = op.modes.columns.count();
  reduce(op.modes.rows, s.u, columns * vl, columns * vl, false, s.z, columns * vl);
  for (int64_t k = 0; k < op.modes.inside; ++k) {
    const Mode& mode = op.modes.mode[k];
    store<T>(s.coefficients + mode.index * vl, load_raw<Vec<T>>(s.z + (mode.row * columns + mode.column) * vl) * T(mode.scale));
  }
  store_rows<T>(Pixels<const T>{s.coefficients, 0, op.modes.inside}, unit.lanes, 1, part(to, unit, 0));
}

template <class T, class IO>
void forward(const AxialConv<T>& op, Planes<const IO> x, Planes<IO> z, Planes<T> coefficients, int64_t begin, int64_t end) {
  constexpr int64_t vl = lanes_of<T>;
  const int64_t columns = op.modes.columns.count();
  Work<T, IO> s(op);
  int64_t prepared = -1;
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_of(op, i, x.c == 1 && op.h * op.w >= 256);
    if (prepared != unit.chunk) s.load_parameters(op, unit);
    prepared = unit.chunk;
    s.start_plane();
    for (int64_t top = 0; top < op.h; top += s.strip) {
      const int64_t bottom = top + s.strip < op.h ? top + s.strip : op.h, rows = bottom - top;
      s.advance(top, bottom, [&](int64_t row, int64_t count) {
        load_rows(part(x, unit, row), unit.lanes, count, s.padded);
        conv(op.size, s.row_weight, s.row_bias, s.padded.at(0, -s.p), {vl, s.padded.row}, s.row(row), {vl, s.window.row}, {op.w, count});
      });
      const Planes<IO> to = part(z, unit, top);
      const auto column_conv = [&](auto* out, int64_t row, int64_t pixel) {
        conv(op.size, s.column_weight, s.column_bias, s.row(top - s.p), {s.window.row, vl}, out, {row, pixel}, {rows, op.w});
      };
      const auto reduce_rows = [&](const IO* from, int64_t row, int64_t pixel) {
        for (int64_t i = 0; i < rows && columns > 0; ++i)
          reduce(op.modes.columns, from + i * row, pixel, vl, false, s.u + (top + i) * columns * vl, vl);
      };
      if (to.c == 1 && unit.lanes == vl && op.size <= 7) {
        column_conv(to.data, to.h, to.w);
        reduce_rows(to.data, to.h, to.w);
      } else {
        Pixels<const IO> out{s.rounded.data, s.rounded.row, op.w};
        if (op.size <= 7) {
          column_conv(s.rounded.data, s.rounded.row, vl);
        } else {
          column_conv(s.out.data, s.out.row, vl);
          out = round_rows(s.out, rows, s.rounded);
        }
        reduce_rows(out.data, out.row, vl);
        store_rows<T>(out, unit.lanes, rows, to);
      }
    }
    if (columns > 0) store_coefficients(op, s, unit, coefficients);
  }
}

// The vectors of a kernel of `size` taps, in reverse order.
template <class T> void flip(T* weight, int64_t size) {
  constexpr int64_t vl = lanes_of<T>;
  for (int64_t m = 0; m < size / 2; ++m) {
    const Vec<T> a = load_raw<Vec<T>>(weight + m * vl), b = load_raw<Vec<T>>(weight + (size - 1 - m) * vl);
    store<T>(weight + m * vl, b);
    store<T>(weight + (size - 1 - m) * vl, a);
  }
}

template <class T, class IO>
void backward(const AxialConv<T>& op, Planes<const IO> grad, Planes<const IO> x, Planes<IO> x_grad, double* partial, int64_t begin,
              int64_t end) {
  constexpr int64_t vl = lanes_of<T>;
  Work<T, IO> s(op);
  int64_t prepared = -1;
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_of(op, i, x.c == 1 && op.h * op.w >= 256);
    if (prepared != unit.chunk) {
      s.load_parameters(op, unit);
      std::memcpy(s.row_flipped, s.row_weight, op.size * vl * sizeof(T));
      flip(s.row_flipped, op.size);
      flip(s.column_weight, op.size);
    }
    prepared = unit.chunk;
    double* total = partial + (unit.chunk * op.images + unit.image) * op.sums() * vl;
    zero(total, op.sums() * vl);
    s.start_plane();
    for (int64_t top = 0; top < op.h; top += s.strip) {
      const int64_t bottom = top + s.strip < op.h ? top + s.strip : op.h, rows = bottom - top;
      s.advance(top, bottom, [&](int64_t row, int64_t count) {
        load_rows(part(grad, unit, row), unit.lanes, count, Pixels<T>{s.row(row), s.window.row, op.w});
      });
      load_rows(part(x, unit, top), unit.lanes, rows, s.padded);
      conv(op.size, s.row_weight, s.row_bias, s.padded.at(0, -s.p), {vl, s.padded.row}, s.out.data, {vl, s.out.row}, {op.w, rows});
      zero(s.sums, op.sums() * vl);
      for (int64_t row = 0; row < rows; ++row) {
        T* middle = s.middle.at(row, 0);
        conv_backward(op.size, s.column_weight, s.row(top + row - s.p), s.window.row, s.out.at(row, 0), middle, op.w,
                      s.sums + (op.size + 1) * vl);
        conv_backward(op.size, s.row_flipped, middle - s.p * vl, vl, s.padded.at(row, 0), s.out.at(row, 0), op.w, s.sums);
      }
      for (int64_t k = 0; k < op.sums() * vl; ++k) total[k] += s.sums[k];
      store_rows<T>(round_rows(s.out, rows, s.rounded), unit.lanes, rows, part(x_grad, unit, top));
    }
  }
}

template <class T>
void sum_images(const AxialConv<T>& op, const double* partial, Planes<T> row_weight, Planes<T> row_bias, Planes<T> column_weight,
                Planes<T> column_bias, int64_t begin, int64_t end) {
  constexpr int64_t vl = lanes_of<T>;
  T* sums = static_cast<T*>(thread_scratch(op.sums() * vl * sizeof(T)));
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    for (int64_t k = 0; k < op.sums(); ++k) {
      double total[vl] = {};
      for (int64_t b = 0; b < op.images; ++b) {
        const double* from = partial + ((chunk * op.images + b) * op.sums() + k) * vl;
        for (int64_t l = 0; l < vl; ++l) total[l] += from[l];
      }
      for (int64_t l = 0; l < vl; ++l) sums[k * vl + l] = T(total[l]);
    }
    const int64_t first = chunk * vl, left = op.channels - first;
    const T* from = sums;
    const auto store = [&](int64_t n, Planes<T> to) {
      to.data += first * to.c;
      store_rows<T>(Pixels<const T>{from, 0, n}, left < vl ? left : vl, 1, to);
      from += n * vl;
    };
    flip(sums, op.size);
    flip(sums + (op.size + 1) * vl, op.size);
    store(op.size, row_weight);
    store(1, row_bias);
    store(op.size, column_weight);
    store(1, column_bias);
  }
}

template <class T, class IO> constexpr AxialConvKernels<T, IO> kernels{forward<T, IO>, backward<T, IO>, sum_images<T>, lanes_of<T>};

}  // namespace

SPANET_DEFINE_KERNELS(axial_conv_kernels, AxialConvKernels)

}  // namespace SIMD_NAME
}  // namespace spanet
