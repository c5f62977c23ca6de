// Planes side by side: up to a vector of channels, a pixel of all of them being one vector, whatever their layout in memory.
// Channels that are not adjacent are brought there by transposing squares of VL pixels of VL planes, and back.
// Included once by a file that is compiled per instruction set, like simd.h.
#pragma once

#include "cpu/radial_filter_kernel.h"
#include "cpu/simd.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

#define ALL_LANES _Pragma("GCC unroll 16")

// Rows of w pixels in lanes: pixel j of row i is the vector at data + i row + j VL, in T or as it is in memory.
template <class IO> struct Pixels {
  IO* data;
  int64_t row, w;
  inline IO* at(int64_t i, int64_t j) const { return data + i * row + j * (sizeof(IO) == 8 ? lanes_of<double> : lanes_of<float>); }
};

// A run of n adjacent pixels of each lane's plane, cut into squares of vl pixels of vl lanes: f(first pixel, pixels, lanes);
// the last square is moved back so that it is full too. Full ones have constant sizes.
template <class T, class F> SIMD_INLINE void for_squares(int64_t n, int64_t lanes, F f) {
  constexpr std::integral_constant<int64_t, lanes_of<T>> vl;
  if (n < vl) return f(0, n, lanes);
  for (int64_t i = 0; i < n; i += vl) {
    const int64_t first = i + vl <= n ? i : n - vl;
    if (lanes == vl) f(first, vl, vl);
    else f(first, n < vl ? n : vl(), lanes);
  }
}

template <class T, class IO> void load_run(const IO* from, int64_t c_stride, int64_t lanes, int64_t n, Pixels<T> to) {
  constexpr int64_t vl = lanes_of<T>;
  for_squares<T>(n, lanes, [&](int64_t first, auto pixels, auto lanes) {
    Vec<T> v[vl];
    ALL_LANES
    for (int64_t l = 0; l < vl; ++l)
      if (l >= lanes) v[l] = Vec<T>{};
      else v[l] = pixels == vl ? load<T>(from + l * c_stride + first) : load_part<T>(from + l * c_stride + first, pixels);
    transpose<T>(v);
    int64_t j = first % to.w;
    T* p = to.at(first / to.w, j);
    for (int64_t e = 0; e < pixels; ++e, p += vl) {
      store<T>(p, v[e]);
      if (++j == to.w) j = 0, p += to.row - to.w * vl;
    }
  });
}

// Elements as they stand in memory, one to a lane of T: what is only moved is not converted.
template <class T, class IO> SIMD_INLINE Vec<T> load_bits(const IO* p) {
  if constexpr (sizeof(IO) == sizeof(T)) return load_raw<Vec<T>>(p);
  else return (Vec<T>)__builtin_convertvector(load_raw<Simd<float>::U16>(p), Simd<float>::U);
}
template <class T, class IO> SIMD_INLINE void store_bits(IO* p, Vec<T> v) {
  if constexpr (sizeof(IO) == sizeof(T)) {
    std::memcpy(p, &v, sizeof v);
  } else {
    const auto bits = __builtin_convertvector((Simd<float>::U)v, Simd<float>::U16);
    std::memcpy(p, &bits, sizeof bits);
  }
}

template <class T, class IO> void store_run(Pixels<const IO> from, IO* to, int64_t c_stride, int64_t lanes, int64_t n) {
  constexpr int64_t vl = lanes_of<T>;
  for_squares<T>(n, lanes, [&](int64_t first, auto pixels, auto lanes) {
    Vec<T> v[vl] = {};
    int64_t j = first % from.w;
    const IO* p = from.at(first / from.w, j);
    ALL_LANES
    for (int64_t e = 0; e < vl; ++e, p += vl) {
      if (e >= pixels) break;
      v[e] = load_bits<T>(p);
      if (++j == from.w) j = 0, p += from.row - from.w * vl;
    }
    transpose<T>(v);
    ALL_LANES
    for (int64_t l = 0; l < vl; ++l) {
      if (l >= lanes) break;
      IO* plane = to + l * c_stride + first;
      if (pixels == vl) {
        store_bits<T>(plane, v[l]);
      } else if constexpr (sizeof(IO) == sizeof(T)) {
        store_part<T>((T*)plane, v[l], pixels);
      } else {
        IO part[vl];
        store_bits<T>(part, v[l]);
        for (int64_t e = 0; e < pixels; ++e) plane[e] = part[e];
      }
    }
  });
}

// `rows` rows of the planes of up to a vector of channels, into lanes; lanes without a channel are zeros.
template <class T, class IO> void load_rows(Planes<const IO> from, int64_t lanes, int64_t rows, Pixels<T> to) {
  constexpr int64_t vl = lanes_of<T>;
  if (from.c == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < to.w; ++j) {
        const IO* p = from.data + i * from.h + j * from.w;
        store<T>(to.at(i, j), lanes == vl ? load<T>(p) : load_part<T>(p, lanes));
      }
  } else if (from.w == 1 && (from.h == to.w || rows == 1)) {
    load_run(from.data, from.c, lanes, rows * to.w, to);
  } else if (from.w == 1) {
    for (int64_t i = 0; i < rows; ++i) load_run(from.data + i * from.h, from.c, lanes, to.w, Pixels<T>{to.at(i, 0), to.row, to.w});
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < to.w; ++j)
        for (int64_t l = 0; l < vl; ++l) to.at(i, j)[l] = l < lanes ? T(widen(from.data[i * from.h + j * from.w + l * from.c])) : T(0);
  }
}

// The way back, to planes that are contiguous or whose channels are adjacent.
template <class T, class IO> void store_rows(Pixels<const IO> from, int64_t lanes, int64_t rows, Planes<IO> to) {
  if (to.c != 1) return store_run<T>(from, to.data, to.c, lanes, rows * from.w);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < from.w; ++j) {
      IO* p = to.data + i * to.h + j * to.w;
      const IO* pixel = from.at(i, j);
      if (lanes == lanes_of<T>) store_bits<T>(p, load_bits<T>(pixel));
      else
        for (int64_t l = 0; l < lanes; ++l) p[l] = pixel[l];
    }
}

}  // namespace
}  // namespace SIMD_NAME
}  // namespace spanet
