// What the filter by real FFTs does between the transforms, for the instruction set this file is compiled for (simd.h).

#include "cpu/spectrum_kernel.h"

#include "cpu/runs.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

// f(image, first channel, channels) for units [begin, end).
template <class F> void over_groups(const Part& part, int64_t begin, int64_t end, F f) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t c = unit % part.groups() * part.group, rest = part.channels - c;
    f(unit / part.groups(), c, rest < part.group ? rest : part.group);
  }
}

template <class T, class IO> void read(const Part& part, Planes<const IO> x, T* planes, int64_t begin, int64_t end) {
  over_groups(part, begin, end, [&](int64_t image, int64_t c, int64_t n) {
    const IO* from = x.data + image * x.b + c * x.c;
    T* to = planes + (image * part.channels + c) * part.h * part.w;
    if (part.group > 1) return gather_lanes<T>(from, x.w, part.h * part.w, n, to);
    for (int64_t i = 0; i < part.h; ++i, from += x.h, to += part.w) {
      if (x.w == 1) read_run(from, part.w, to);
      else
        for (int64_t j = 0; j < part.w; ++j) to[j] = widen(from[j * x.w]);
    }
  });
}

template <class T, class IO> void write(const Part& part, const T* planes, Planes<IO> y, int64_t begin, int64_t end) {
  const int64_t pixels = part.h * part.w;
  over_groups(part, begin, end, [&](int64_t image, int64_t c, int64_t n) {
    const T* from = planes + (image * part.channels + c) * pixels;
    IO* to = y.data + image * y.b + c * y.c;
    if (part.group > 1) return scatter_lanes<T>(from, pixels, n, to, y.w);
    int64_t i = 0;
    for (; y.w == 1 && i + lanes_of<T> <= pixels; i += lanes_of<T>) store<T>(to + i, load<T>(from + i));
    for (; i < pixels; ++i) narrow(from[i], to + i * y.w);
  });
}

template <class T> struct Complex {
  T re, im;
};

// to = the transpose of from; their rows are so far apart.
template <class T> void transpose_complex(const T* from, int64_t rows, int64_t columns, int64_t apart, T* to, int64_t to_apart) {
  const auto* source = reinterpret_cast<const Complex<T>*>(from);
  auto* target = reinterpret_cast<Complex<T>*>(to);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) target[j * to_apart + i] = source[i * apart + j];
}

// Vectors of complex numbers in fp32 move as those of fp64.
template <class T> bool in_squares(const Bins& b) { return sizeof(T) == sizeof(float) && b.h >= lanes_of<double>; }

template <class T> void turn(const Bins& b, const T* rows, T* turned, int64_t begin, int64_t end) {
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* from = rows + 2 * plane * b.h * b.bins();
    T* to = turned + 2 * plane * b.h * b.columns;
    if (in_squares<T>(b))
      gather_lanes<double>(reinterpret_cast<const double*>(from), b.bins(), b.h, b.columns, reinterpret_cast<double*>(to));
    else transpose_complex(from, b.h, b.columns, b.bins(), to, b.h);
  }
}

template <class T>
void turn_back(const Bins& b, const Part& part, const T* turned, const T* rest, int64_t rest_stride, T* rows, int64_t begin, int64_t end) {
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* from = turned + 2 * plane * b.h * b.columns;
    T* to = rows + 2 * plane * b.h * b.bins();
    if (in_squares<T>(b))
      scatter_lanes<double>(reinterpret_cast<const double*>(from), b.h, b.columns, reinterpret_cast<double*>(to), b.bins());
    else transpose_complex(from, b.columns, b.h, b.h, to, b.bins());
    const T factor = rest[plane % part.channels * rest_stride];
    for (int64_t i = 0; i < b.h; ++i)
      for (int64_t k = 2 * b.columns; k < 2 * b.bins(); ++k) to[2 * i * b.bins() + k] *= factor;
  }
}

template <class T>
void scale(const Bins& b, const Part& part, const T* values, int64_t stride, T* turned, int64_t begin, int64_t end) {
  const int64_t count = b.columns * b.h;
  T* factor = Scratch<T>(count).take(count);
  for (int64_t c = begin; c < end; ++c) {
    if (c == begin || stride != 0)
      for (int64_t k = 0; k < count; ++k) factor[k] = values[c * stride + b.shell[k]];
    for (int64_t image = 0; image < part.images; ++image) {
      T* at = turned + 2 * (image * part.channels + c) * count;
      for (int64_t k = 0; k < count; ++k) {
        at[2 * k] *= factor[k];
        at[2 * k + 1] *= factor[k];
      }
    }
  }
}

template <class T> double dot(const T* p, const T* q, int64_t n) {
  constexpr int64_t vl = lanes_of<T>, run = 64 * vl;
  double total = 0;
  for (int64_t first = 0; first < n; first += run) {
    const int64_t end = first + run < n ? first + run : n;
    Vec<T> sum{};
    for (int64_t i = first; i < end; i += vl)
      sum += end - i < vl ? load_part<T>(p + i, end - i) * load_part<T>(q + i, end - i) : load<T>(p + i) * load<T>(q + i);
    for (int64_t l = 0; l < vl; ++l) total += sum[l];
  }
  return total;
}

template <class T>
void products(const Bins& b, const Part& part, const T* a, const T* x, const T* p, const T* q, double* of_shell, double* total,
              int64_t begin, int64_t end) {
  const int64_t count = b.columns * b.h, pixels = b.h * b.w;
  for (int64_t c = begin; c < end; ++c)
    for (int64_t image = 0; image < part.images; ++image) {
      const int64_t plane = image * part.channels + c;
      double* sums = of_shell + c * b.shells;
      for (int64_t v = 0; v < b.columns; ++v) {
        const double times = v == 0 || 2 * v == b.w ? 1 : 2;  // its mirror image is in the other half
        const T *left = a + 2 * (plane * count + v * b.h), *right = x + 2 * (plane * count + v * b.h);
        for (int64_t i = 0; i < b.h; ++i) {
          const int32_t shell = b.shell[v * b.h + i];
          if (shell < b.shells) sums[shell] += times * (left[2 * i] * right[2 * i] + left[2 * i + 1] * right[2 * i + 1]);
        }
      }
      total[c] += dot(p + plane * pixels, q + plane * pixels, pixels);
    }
}

template <class T, class IO>
constexpr SpectrumKernels<T, IO> kernels{read<T, IO>, write<T, IO>, turn<T>, turn_back<T>, scale<T>, products<T>, lanes_of<T>};

}  // namespace

SPANET_DEFINE_KERNELS(spectrum_kernels, SpectrumKernels, SPANET_NATIVE_KERNELS)

}  // namespace SIMD_NAME
}  // namespace spanet
