// The discs of radius 0 and 1 over planes of a few vectors whose rows lie one behind the other: a plane is one run of pixels, whose vectors are
// all full but the last, and its functions are tables of as many pixels. Included once by a file that is compiled per instruction set.
#pragma once

#include "cpu/runs.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

// The modes of radius 1: the constant, and cosine and sine of either axis. In what follows there are K of them, 1 of radius 0.
constexpr int flat_modes = 5;

// Whether the coefficients of two planes and their product fit in a vector: of fewer lanes they would not be full.
template <class T> constexpr bool has_flat = lanes_of<T> > 2 * flat_modes;

// Whether these planes are taken so; of 16 bits and radius 1 not those of which two fit in a vector (disc.h).
template <class T, class IO> bool is_flat(const Modes<T>& m, Planes<const IO> p) {
  return m.flat && p.w == 1 && p.h == m.columns.n && (m.inside == 1 || sizeof(IO) == sizeof(T) || 2 * m.columns.n > lanes_of<T>);
}

// sums[k] = x o function k of the table, to be summed over its lanes; also(pixel, vector of x, n) sees every vector of n pixels.
template <int K, class T, class X, class F> SIMD_INLINE void flat_reduce(const T* table, int64_t pixels, const X* x, Vec<T>* sums, F also) {
  constexpr int64_t vl = lanes_of<T>;
  Vec<T> sum[K] = {};
  const auto add = [&](int64_t i, Vec<T> a, int64_t n) {
    sum[0] += a;
    UNROLL
    for (int k = 1; k < K; ++k) sum[k] += a * load_raw<Vec<T>>(table + (k - 1) * vl);
    table += (K - 1) * vl;
    also(i, a, n);
  };
  int64_t i = 0;
  for (; i + vl <= pixels; i += vl) add(i, load<T>(x + i), vl);
  if (i < pixels) add(i, load_part<T>(x + i, pixels - i), pixels - i);
  UNROLL
  for (int k = 0; k < K; ++k) sums[k] = sum[k];
}

// y = base x + the functions with the coefficients z.
template <int K, class T, class X, class IO>
SIMD_INLINE void flat_expand(const T* table, int64_t pixels, const X* x, Vec<T> base, const Vec<T> (&z)[K], IO* y) {
  constexpr int64_t vl = lanes_of<T>;
  const auto at = [&](Vec<T> a) {
    Vec<T> sum = base * a + z[0];
    if constexpr (K == 1) return sum;
    Vec<T> other{};
    UNROLL
    for (int k = 1; k < K; ++k) (k % 2 ? other : sum) += z[k] * load_raw<Vec<T>>(table + (k - 1) * vl);
    table += (K - 1) * vl;
    return sum + other;
  };
  int64_t i = 0;
  for (; i + vl <= pixels; i += vl) store<T>(y + i, at(load<T>(x + i)));
  if (i < pixels) store_part<T>(y + i, at(load_part<T>(x + i, pixels - i)), pixels - i);
}

// filter for planes [begin, end), as many at once as have their coefficients in a vector; the last one is read in place of those beyond.
template <int K, class T, class X, class IO>
void filter_flat(const Modes<T>& m, Planes<const X> x, Planes<IO> y, const Profile<T>& p, int64_t channels, int64_t begin, int64_t end) {
  constexpr int64_t vl = lanes_of<T>, side = vl / K;
  const T* table = m.flat;
  const T constant_scale = m.scales[0], wave_scale = m.scales[K > 1];
  const int64_t pixels = m.rows.n * m.columns.n;
  int64_t image = begin / channels, channel = begin % channels;
  for (int64_t first = begin; first < end; first += side) {
    const X* from[side];
    IO* to[side];
    Vec<T> parts[vl] = {}, base[side], constant[side], waves[side];
    UNROLL
    for (int64_t g = 0; g < side; ++g) {
      const T* gain = p.gain + channel * p.gain_channel;
      from[g] = x.data + image * x.b + channel * x.c;
      to[g] = y.data + image * y.b + channel * y.c;
      base[g] = Vec<T>{} + p.base[channel * p.base_stride];
      constant[g] = Vec<T>{} + gain[0] * constant_scale;
      waves[g] = Vec<T>{} + gain[K > 1 ? p.gain_shell : 0] * wave_scale;
      if (first + g + 1 < end && ++channel == channels) channel = 0, ++image;
      flat_reduce<K>(table, pixels, from[g], parts + g * K, [](int64_t, Vec<T>, int64_t) {});
    }
    const Vec<T> z = sum_lanes<T>(parts);
    UNROLL
    for (int64_t g = 0; g < side; ++g) {
      if (first + g >= end) break;
      Vec<T> spread[K];
      UNROLL
      for (int k = 0; k < K; ++k)
        spread[k] = __builtin_shuffle(z, LaneIndex<T>{} + static_cast<int>(g * K + k)) * (k == 0 ? constant[g] : waves[g]);
      flat_expand(table, pixels, from[g], base[g], spread, to[g]);
    }
  }
}

// backward for channels [begin, end). A few channels take turns in every image: their planes lie one behind the other.
template <int K, class T, class X>
void backward_flat(const Modes<T>& m, Planes<const X> grad, Planes<const X> x, double* sums, int64_t images, int64_t channels,
                   int64_t begin, int64_t end) {
  constexpr int64_t vl = lanes_of<T>, steps = 16;
  const T* table = m.flat;
  const int64_t pixels = m.rows.n * m.columns.n;
  for (int64_t first = begin; first < end; first += steps) {
    const int64_t few = end - first < steps ? end - first : steps;
    double products[steps][K + 1] = {};
    for (int64_t b = 0; b < images; ++b)
      for (int64_t c = 0; c < few; ++c) {
        const X *g = grad.data + b * grad.b + (first + c) * grad.c, *f = x.data + b * x.b + (first + c) * x.c;
        Vec<T> parts[vl] = {}, dot{};
        flat_reduce<K>(table, pixels, g, parts, [](int64_t, Vec<T>, int64_t) {});
        flat_reduce<K>(table, pixels, f, parts + K, [&](int64_t i, Vec<T> a, int64_t n) {
          dot += a * (n == vl ? load<T>(g + i) : load_part<T>(g + i, n));
        });
        parts[2 * K] = dot;
        const Vec<T> z = sum_lanes<T>(parts);
        UNROLL
        for (int k = 0; k < K; ++k) products[c][k] += double(z[k]) * double(z[K + k]);
        products[c][K] += double(z[2 * K]);
      }
    for (int64_t c = 0; c < few; ++c)
      for (int k = 0; k <= K; ++k) sums[k * channels + first + c] = products[c][k];
  }
}

}  // namespace
}  // namespace SIMD_NAME
}  // namespace spanet
