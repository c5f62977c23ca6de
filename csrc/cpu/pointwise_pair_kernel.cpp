// Two 1x1 convolutions with something between them, for the instruction set this file is compiled for (simd.h).
//
//   h = gelu(g), g = W_in n + b_in   or, with a factor f,   h = f o g or gelu'(f) o g   or   h = n          y = s o r + W_out h + b_out
//   n = x   or, with moments,   n = gamma o (x - mean) / deviation + delta, mean and deviation of an image
//
// Work: 2 (in + out) hidden FLOP a pixel. Memory: x, f, r, y once, g or h where it is wanted, and the weights once for every tile; else n,
// g and h never leave the cache.
//
// A tile of pixels is laid out with pixels adjacent, X (in, pixels), so that a vector is a run of pixels and a weight is one number for
// all of it: the weights are read where they stand, in either product, and h is written as the second product reads it.
//   strip  NV vectors of pixels, of one image or of several, the columns of a block
//   block  some rows of a product by one strip: its accumulators are in registers
//   tile   a few strips, for which a part of the hidden channels is computed and multiplied again at once
// Sums are cut every `summed` terms: a sum of few partial sums rounds less than one long sum does.
// What stands in memory is a unit of four bytes: an fp32 number, or two adjacent channels in bf16. In a tile these are widened to fp32,
// and so is each block of weights; or they stay units, where one instruction multiplies and adds both channels: vdpbf16ps of a vector, or
// tdpbf16ps of 16 rows of weights by 16 rows of units, both as they stand.
// Every output is computed by one thread in a fixed order.

#include "cpu/pointwise_pair_kernel.h"

#include <algorithm>

#include "cpu/bf16_dot.h"
#include "cpu/gelu.h"
#include "cpu/radial_filter_kernel.h"
#include "cpu/simd.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

using V = Vec<float>;
using U = Simd<float>::U;
constexpr int VL = lanes_of<float>;
constexpr int64_t summed = 64;

// Rows of weights, `stride` bytes apart, of so many numbers or units.
struct Weights {
  const char* first;
  int64_t stride, columns;
};

// An engine: what a unit is, and the size of blocks and tiles that suits its products.

// fp32: a unit is a number.
struct Numbers {
  using IO = float;
  static constexpr int channels = 1, packed = 1;  // of a unit in memory and in a tile
  static constexpr int rows = SIMD_BYTES == 64 ? 8 : 4, vectors = 3;  // of a block
  static constexpr int64_t tile_vectors = 6, hidden_part = 256;  // of a tile, and hidden channels that it takes at a time
  static constexpr bool in_registers = true;  // the accumulators of a block
  static constexpr const auto &tail = tail_of_numbers, &slope = slope_of_numbers;
  struct Session {};  // what lives while a thread multiplies
  static SIMD_MEMBER V multiply_add(V sum, V a, V b) { return sum + a * b; }
  static SIMD_MEMBER V channel(V unit, int) { return unit; }
  static SIMD_MEMBER V join(V only, V) { return only; }
};

// bf16: a unit is two adjacent channels, the first in its lower half.
struct Pairs : Numbers {
  using IO = Bf16;
  static constexpr int channels = 2;
  static constexpr const auto &tail = tail_of_pairs, &slope = slope_of_pairs;
  static SIMD_MEMBER V channel(V unit, int which) { return which ? (V)((U)unit & 0xffff0000u) : (V)((U)unit << 16); }
  static SIMD_MEMBER V join(V first, V second) { return (V)(bf16_bits(first) >> 16 | (bf16_bits(second) & 0xffff0000u)); }
};

#if SIMD_BYTES == 64
// By AVX512_BF16.
struct PairsByDot : Pairs {
  static constexpr int packed = 2;
  static SIMD_MEMBER V multiply_add(V sum, V a, V b) { return dot_pairs(sum, a, b); }
  static SIMD_MEMBER V join(V first, V second) { return join_pairs(first, second); }
};

// By AMX: a block is two tiles of 16 rows by up to two tiles of 16 pixels.
struct PairsByTiles : PairsByDot {
  static constexpr int rows = 32, vectors = 2;
  static constexpr int64_t tile_vectors = 16, hidden_part = 512;
  static constexpr bool in_registers = false;

  // Eight tiles of 16 rows of 64 bytes; what the thread had before comes back.
  class Session {
    struct alignas(64) Config {
      uint8_t palette, unused[15];
      uint16_t bytes[16];
      uint8_t rows[16];
    } before;

   public:
    Session() {
      Config config{};
      config.palette = 1;
      for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
      asm volatile("sttilecfg %0\n\tldtilecfg %1" : "=m"(before) : "m"(config));
    }
    ~Session() {
      if (before.palette) asm volatile("ldtilecfg %0" ::"m"(before));
      else asm volatile("tilerelease");
    }
    Session(const Session&) = delete;
  };

  // total = weights x columns.
  template <int NV> static SIMD_MEMBER void multiply(const Weights& weights, const float* columns, V (&total)[rows][NV]) {
    constexpr int64_t line = 64, row = NV * line;
    const int64_t stride = weights.stride;
    const char *above = weights.first, *below = above + 16 * stride;
    asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
    for (int64_t k = 0; k < weights.columns; k += 16, above += line, below += line, columns += 16 * NV * VL) {
      if constexpr (NV == 2)
        asm volatile(
            "tileloadd (%2,%3), %%tmm6\n\ttileloadd (%0,%4), %%tmm4\n\ttdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
            "tileloadd 64(%2,%3), %%tmm7\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
            "tileloadd (%1,%4), %%tmm5\n\ttdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3"
            ::"r"(above), "r"(below), "r"(columns), "r"(row), "r"(stride) : "memory");
      else
        asm volatile(
            "tileloadd (%2,%3), %%tmm6\n\ttileloadd (%0,%4), %%tmm4\n\ttdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
            "tileloadd (%1,%4), %%tmm5\n\ttdpbf16ps %%tmm6, %%tmm5, %%tmm2"
            ::"r"(above), "r"(below), "r"(columns), "r"(row), "r"(stride) : "memory");
    }
    asm volatile("tilestored %%tmm0, (%0,%2)\n\ttilestored %%tmm2, (%1,%2)" ::"r"(&total[0][0]), "r"(&total[16][0]), "r"(row) : "memory");
    if constexpr (NV == 2)
      asm volatile("tilestored %%tmm1, 64(%0,%2)\n\ttilestored %%tmm3, 64(%1,%2)" ::"r"(&total[0][0]), "r"(&total[16][0]), "r"(row) : "memory");
  }
};
#endif

// A strip: n adjacent pixels of all images, in NV vectors; `before` it stand as many vectors of its tile.
struct Strip {
  int64_t first, n, before;
};

// Calls f(integral constant) with the number of vectors that hold n pixels, at most `most`.
template <int most, class F> SIMD_INLINE void for_vectors(int64_t n, F f) {
  if constexpr (most > 1)
    if (n <= (most - 1) * VL) return for_vectors<most - 1>(n, f);
  f(std::integral_constant<int, most>());
}

// The pixels of a vector that are there.
SIMD_INLINE int64_t pixels_of(const Strip& strip, int v) {
  const int64_t left = strip.n - v * VL;
  return left < VL ? left : VL;
}

// What stands in a tile: a number where units are widened, else a unit.
template <class E> SIMD_INLINE V channel_in_tile(V value, int which) {
  if constexpr (E::packed == 1) return value;
  else return E::channel(value, which);
}
template <class E> SIMD_INLINE V for_tile(const V (&part)[E::packed]) {
  if constexpr (E::packed == 1) return part[0];
  else return E::join(part[0], part[1]);
}
template <class E> SIMD_INLINE void put(float* to, int64_t width, V unit) {
  UNROLL
  for (int c = 0; c < E::channels; c += E::packed) store<float>(to + c * width, E::packed == E::channels ? unit : E::channel(unit, c));
}

// (x - mean) / deviation of every pixel of a strip, times weight, plus bias, of channel units.
struct Norm {
  const float *scale, *shift;   // 1 / deviation and - mean / deviation by pixel
  const float *weight, *bias;  // (E::channels, units): the first channels of all units, then the second
};

// A tensor of so many channels, channels_last or contiguous.
template <class IO> struct Map {
  IO* data;
  int64_t channels;
  bool last;
};

// Where the pixels of a vector stand in planes that are contiguous: runs of lanes, one for every image that they are of.
struct Runs {
  struct Run {
    int64_t at, lane, n;  // its first pixel, in the first channel of all planes
  } run[VL];
  int64_t count = 0;

  template <class IO> V load(const IO* channel) const {
    float lanes[2 * VL] = {};
    for (int64_t r = 0; r < count; ++r) store<float>(lanes + run[r].lane, load_part<float>(channel + run[r].at, run[r].n));
    return load_raw<V>(lanes);
  }
  template <class IO> void store_to(IO* channel, V value) const {
    float lanes[2 * VL] = {};
    store<float>(lanes, value);
    for (int64_t r = 0; r < count; ++r) store_part<float>(channel + run[r].at, load_raw<V>(lanes + run[r].lane), run[r].n);
  }
};

// Calls f(at(v) to load or store vector v of a channel) for a strip in planes that are contiguous.
template <int NV, class Op, class F> SIMD_INLINE void in_planes(const Op& op, int64_t channels, const Strip& strip, F f) {
  const int64_t pixels = op.image_pixels, image = strip.first / pixels, pixel = strip.first % pixels;
  if (strip.n == NV * VL && pixel + strip.n <= pixels) {
    const int64_t first = image * channels * pixels + pixel;
    return f([&](const auto* channel, int v) __attribute__((always_inline)) { return load<float>(channel + first + v * VL); },
             [&](auto* channel, int v, V value) __attribute__((always_inline)) { store<float>(channel + first + v * VL, value); });
  }
  Runs runs[NV];
  for (int64_t lane = 0, n; lane < strip.n; lane += n) {
    const int64_t image = (strip.first + lane) / pixels, pixel = (strip.first + lane) % pixels, v = lane / VL;
    n = std::min({pixels - pixel, strip.n - lane, VL - lane % VL});
    runs[v].run[runs[v].count++] = {image * channels * pixels + pixel, lane % VL, n};
  }
  f([&](const auto* channel, int v) __attribute__((always_inline)) { return runs[v].load(channel); },
    [&](auto* channel, int v, V value) __attribute__((always_inline)) { runs[v].store_to(channel, value); });
}

// load_strip and store_strip of a map that is contiguous.
template <class E, int NV, class Op, class IO>
__attribute__((noinline)) void load_planes(const Op& op, const Map<const IO>& from, int64_t first, int64_t wanted, const Strip& strip,
                                           const Norm* norm, float* to) {
  constexpr int64_t width = NV * VL, unit_size = E::channels / E::packed * width;
  const int64_t units = from.channels / E::channels;
  in_planes<NV>(op, from.channels, strip, [&](auto load_at, auto) __attribute__((always_inline)) {
    const IO* channel = from.data + first * op.image_pixels;
    for (int64_t k = 0; k < wanted; ++k, channel += E::channels * op.image_pixels)
      for (int v = 0; v < NV; ++v) {
        V part[E::channels];
        UNROLL
        for (int c = 0; c < E::channels; ++c) {
          part[c] = load_at(channel + c * op.image_pixels, v);
          if (norm) {
            const V normal = part[c] * load_raw<V>(norm->scale + v * VL) + load_raw<V>(norm->shift + v * VL);
            part[c] = normal * norm->weight[c * units + k] + norm->bias[c * units + k];
          }
        }
        put<E>(to + k * unit_size + v * VL, width, E::join(part[0], part[E::channels - 1]));
      }
  });
}

template <class E, int NV, int packed, class Op, class IO>
__attribute__((noinline)) void store_planes(const Op& op, const Map<IO>& to, int64_t first, int64_t n, const float* rows,
                                            const Strip& strip) {
  in_planes<NV>(op, to.channels, strip, [&](auto, auto store_at) __attribute__((always_inline)) {
    IO* channel = to.data + first * op.image_pixels;
    for (int64_t c = 0; c < n; ++c, channel += op.image_pixels)
      for (int v = 0; v < NV; ++v) {
        const V value = load_raw<V>(rows + (c / packed * NV + v) * VL);
        store_at(channel, v, packed == 1 ? value : E::channel(value, c % packed));
      }
  });
}

// to (n / E::packed, NV VL) = the strip of n channels from one on, normalised if norm is not nullptr; pixels that are not there are anything.
template <class E, int NV, class Op, class IO>
void load_strip(const Op& op, const Map<const IO>& from, int64_t first, int64_t n_channels, const Strip& strip, const Norm* norm, float* to) {
  constexpr int64_t width = NV * VL, unit_size = E::channels / E::packed * width;
  const int64_t units = from.channels / E::channels, wanted = n_channels / E::channels;
  if (!from.last) return load_planes<E, NV>(op, from, first, wanted, strip, norm, to);
  const char* pixel = reinterpret_cast<const char*>(from.data + first) + strip.first * units * 4;
  for (int v = 0; v < NV; ++v)
    for (int64_t k = 0; k < wanted; k += VL) {
      V square[VL];
      UNROLL
      for (int i = 0; i < VL; ++i) square[i] = i < pixels_of(strip, v) ? load_raw<V>(pixel + ((v * VL + i) * units + k) * 4) : V{};
      if (norm) {
        V weight[E::channels], bias[E::channels];
        for (int c = 0; c < E::channels; ++c) {
          weight[c] = load_raw<V>(norm->weight + c * units + k);
          bias[c] = load_raw<V>(norm->bias + c * units + k);
        }
        UNROLL
        for (int i = 0; i < VL; ++i) {
          V part[E::channels];
          for (int c = 0; c < E::channels; ++c)
            part[c] = (E::channel(square[i], c) * norm->scale[v * VL + i] + norm->shift[v * VL + i]) * weight[c] + bias[c];
          square[i] = E::join(part[0], part[E::channels - 1]);
        }
      }
      transpose<float>(square);
      UNROLL
      for (int i = 0; i < VL; ++i) put<E>(to + (k + i) * unit_size + v * VL, width, square[i]);
    }
}

// The strip of n of its channels from one on, of rows (n / packed, NV VL): sums, or units if packed is not 1; past the caches
// if `stream`.
template <class E, int NV, int packed, class Op, class IO>
void store_strip(const Op& op, const Map<IO>& to, int64_t first, int64_t n, const float* rows, const Strip& strip, bool stream = false) {
  constexpr int64_t width = NV * VL;
  if (!to.last) return store_planes<E, NV, packed>(op, to, first, n, rows, strip);
  const int64_t units = to.channels / E::channels;
  char* pixel = reinterpret_cast<char*>(to.data + first) + strip.first * units * 4;
  for (int v = 0; v < NV; ++v)
    for (int64_t k = 0; k < n / E::channels; k += VL) {
      V square[VL];
      UNROLL
      for (int i = 0; i < VL; ++i) {
        const float* row = rows + (k + i) * (E::channels / packed) * width + v * VL;
        square[i] = packed == E::channels ? load_raw<V>(row) : E::join(load_raw<V>(row), load_raw<V>(row + (E::channels - 1) * width));
      }
      transpose<float>(square);
      UNROLL
      for (int i = 0; i < VL; ++i)
        if (i < pixels_of(strip, v)) store_whole(pixel + ((v * VL + i) * units + k) * 4, square[i], stream);
    }
}

// Rows of n weights, `stride` apart, as a block multiplies them: where they stand, or in `widened` (E::rows, n).
template <class E> SIMD_INLINE Weights block_of(const typename E::IO* from, int64_t stride, int64_t n, float* widened) {
  if constexpr (E::packed == E::channels)
    return {reinterpret_cast<const char*>(from), stride * int64_t{sizeof *from}, n / E::packed};
  for (int m = 0; m < E::rows; ++m)
    for (int64_t k = 0; k < n; k += VL) store<float>(widened + m * n + k, load<float>(from + m * stride + k));
  return {reinterpret_cast<const char*>(widened), n * int64_t{sizeof *widened}, n};
}

// total = weights x columns, whose rows are NV VL apart.
template <class E, int NV> SIMD_INLINE void multiply(const Weights& weights, const float* columns, V (&total)[E::rows][NV]) {
  if constexpr (requires { &E::template multiply<NV>; }) return E::multiply(weights, columns, total);
  const char* row[E::rows];
  UNROLL
  for (int m = 0; m < E::rows; ++m) {
    row[m] = weights.first + m * weights.stride;
    UNROLL
    for (int v = 0; v < NV; ++v) total[m][v] = V{};
  }
  for (int64_t first = 0; first < weights.columns; first += summed) {
    const int64_t end = first + summed < weights.columns ? first + summed : weights.columns;
    V sum[E::rows][NV];
    UNROLL
    for (int m = 0; m < E::rows; ++m)
      UNROLL
      for (int v = 0; v < NV; ++v) sum[m][v] = V{};
#pragma GCC unroll 4
    for (int64_t k = first; k < end; ++k, columns += NV * VL) {
      V column[NV];
      UNROLL
      for (int v = 0; v < NV; ++v) column[v] = load_raw<V>(columns + v * VL);
      UNROLL
      for (int m = 0; m < E::rows; ++m) {
        uint32_t weight;
        std::memcpy(&weight, row[m] + 4 * k, 4);
        UNROLL
        for (int v = 0; v < NV; ++v) sum[m][v] = E::multiply_add(sum[m][v], (V)(U{} + weight), column[v]);
      }
    }
    UNROLL
    for (int m = 0; m < E::rows; ++m)
      UNROLL
      for (int v = 0; v < NV; ++v) total[m][v] += sum[m][v];
  }
}

// What a channel is multiplied by or what is added to it, in fp32.
struct Vectors {
  float *norm_weight, *norm_bias;  // (E::channels, units): the first channels of all units, then the second
  float *bias_in, *bias_out, *residual_scale;
};

// to (channels, n / channels) = values, adjacent ones below each other; all `otherwise` where there are none. Returns its end.
template <uint64_t channels, class IO> float* widen_all(const IO* values, uint64_t n, float otherwise, float* to) {
  for (uint64_t c = 0; c < n; ++c) to[c % channels * (n / channels) + c / channels] = values ? widen(values[c]) : otherwise;
  return to + n;
}

// Calls f(m) for the rows of a block: unrolled where they are in registers, else in a loop that stays small.
template <class E, int step, class F> SIMD_INLINE void for_rows(F f) {
  if constexpr (E::in_registers) {
    UNROLL
    for (int m = 0; m < E::rows; m += step) f(m);
  } else {
#pragma GCC unroll 1
    for (int m = 0; m < E::rows; m += step) f(m);
  }
}

// What a hidden channel is multiplied by.
enum class Factor { gelu, given, slope };  // h = gelu(g), f o g, gelu'(f) o g

// E::rows hidden channels: h (E::rows / E::packed, NV VL) of x and their bias; factor are those of f, laid out like h; before, like h, is g,
// or nullptr.
template <class E, int NV>
SIMD_INLINE void first_product(const Weights& weights, const float* bias, const float* x, Factor kind, const float* factor, float* h,
                               float* before) {
  V total[E::rows][NV];
  multiply<E, NV>(weights, x, total);
  const auto finish = [&](auto of) __attribute__((always_inline)) {  // of(sum, where its value of f stands, which of a unit's channels)
    for_rows<E, E::packed>([&](int m) __attribute__((always_inline)) {
      UNROLL
      for (int v = 0; v < NV; ++v) {
        const int64_t at = (m / E::packed * NV + v) * VL;
        V part[E::packed];
        UNROLL
        for (int c = 0; c < E::packed; ++c) part[c] = total[m + c][v] + bias[m + c];
        if (before) store<float>(before + at, for_tile<E>(part));
        UNROLL
        for (int c = 0; c < E::packed; ++c) part[c] = of(part[c], at, c);
        store<float>(h + at, for_tile<E>(part));
      }
    });
  };
  const auto of_factor = [&](int64_t at, int c) __attribute__((always_inline)) { return channel_in_tile<E>(load_raw<V>(factor + at), c); };
  if (kind == Factor::gelu) finish([](V sum, int64_t, int) { return gelu(sum, E::tail); });
  else if (kind == Factor::given) finish([&](V sum, int64_t at, int c) { return sum * of_factor(at, c); });
  else finish([&](V sum, int64_t at, int c) { return sum * gelu_slope(of_factor(at, c), E::slope); });
}

// E::rows outputs: sums (E::rows, NV VL) += W_out h over a part of the hidden channels, s o r + b_out before the first; residual are those
// of r (E::rows / E::packed, NV VL), or nullptr.
template <class E, int NV>
SIMD_INLINE void second_product(const Weights& weights, bool first, const float* scale, const float* bias, const float* h,
                                const float* residual, float* sums) {
  V total[E::rows][NV];
  multiply<E, NV>(weights, h, total);
  const auto finish = [&](auto before) __attribute__((always_inline)) {
    for_rows<E, 1>([&](int m) __attribute__((always_inline)) {
      UNROLL
      for (int v = 0; v < NV; ++v) store<float>(sums + (m * NV + v) * VL, total[m][v] + before(m, v));
    });
  };
  const auto before = [&](int m, int v) { return load_raw<V>(residual + (m / E::packed * NV + v) * VL); };
  if (!first) finish([&](int m, int v) { return load_raw<V>(sums + (m * NV + v) * VL); });
  else if (residual) finish([&](int m, int v) { return channel_in_tile<E>(before(m, v), m % E::packed) * scale[m] + bias[m]; });
  else finish([&](int m, int) { return V{} + bias[m]; });
}

// The strips of a tile, which starts at vector `first` and has `vectors` of them: as few as can be and as even. Returns how many there are.
template <class E, class Op> int64_t cut(const Op& op, int64_t first, int64_t vectors, Strip* strips) {
  const int64_t count = (vectors + E::vectors - 1) / E::vectors;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t before = vectors * s / count, pixel = (first + before) * VL, end = (first + vectors * (s + 1) / count) * VL;
    strips[s] = {pixel, (end < op.pixels ? end : op.pixels) - pixel, before};
  }
  return count;
}

template <class E> void run(const PointwisePair<typename E::IO>& op, int64_t begin, int64_t end) {
  using IO = typename E::IO;
  constexpr int64_t tile_vectors = E::tile_vectors, hidden_part = E::hidden_part, strip_pixels = E::vectors * VL;
  [[maybe_unused]] const typename E::Session session;
  // of a vector of pixels
  const int64_t x_size = op.in / E::packed * VL, h_size = hidden_part / E::packed * VL, f_size = op.factor ? h_size : 0;
  const int64_t g_size = op.before ? h_size : 0, r_size = op.residual ? op.out / E::packed * VL : 0, y_size = op.out * VL;
  const int64_t vectors_size = 2 * op.in + op.hidden + 2 * op.out;
  const int64_t widened_size = E::packed == E::channels ? 0 : E::rows * (op.in > hidden_part ? op.in : hidden_part);
  const int64_t size = tile_vectors * (x_size + f_size + r_size + h_size + y_size + g_size) + vectors_size + widened_size;
  float* const x = static_cast<float*>(thread_scratch(size * sizeof(float)));
  float *const factor = x + tile_vectors * x_size, *const residual = factor + tile_vectors * f_size;
  float *const h = residual + tile_vectors * r_size, *const y = h + tile_vectors * h_size, *const g = y + tile_vectors * y_size;
  float* const widened = g + tile_vectors * g_size;
  Vectors vectors;
  vectors.norm_weight = widened + widened_size;
  vectors.norm_bias = widen_all<E::channels>(op.norm_weight, op.in, 1.0f, vectors.norm_weight);
  vectors.bias_in = widen_all<E::channels>(op.norm_bias, op.in, 0.0f, vectors.norm_bias);
  vectors.bias_out = widen_all<1>(op.bias_in, op.hidden, 0.0f, vectors.bias_in);
  vectors.residual_scale = widen_all<1>(op.bias_out, op.out, 0.0f, vectors.bias_out);
  widen_all<1>(op.residual_scale, op.out, 1.0f, vectors.residual_scale);
  const Factor kind = !op.factor ? Factor::gelu : op.by_slope ? Factor::slope : Factor::given;
  const bool stream = op.stream && reinterpret_cast<uintptr_t>(op.before) % SIMD_BYTES == 0;
  float scale[strip_pixels], shift[strip_pixels];
  const Norm norm{scale, shift, vectors.norm_weight, vectors.norm_bias};
  const int64_t tiles = (end - begin + tile_vectors - 1) / tile_vectors;
  for (int64_t tile = 0, first = begin, next; tile < tiles; ++tile, first = next) {
    next = begin + (end - begin) * (tile + 1) / tiles;
    Strip strips[tile_vectors];
    const int64_t count = cut<E>(op, first, next - first, strips);
    const auto for_strips = [&](auto f) __attribute__((always_inline)) {  // f(number of its vectors, strip)
      for (int64_t s = 0; s < count; ++s) for_vectors<E::vectors>(strips[s].n, [&](auto nv) { f(nv, strips[s]); });
    };
    for_strips([&](auto nv, const Strip& strip) {
      for (int64_t i = 0; i < (op.moments ? nv() * VL : 0); ++i) {
        const int64_t pixel = strip.first + (i < strip.n ? i : 0);
        const float* moments = op.moments + 2 * (pixel / op.image_pixels);
        scale[i] = moments[1];
        shift[i] = -moments[0] * moments[1];
      }
      load_strip<E, nv()>(op, Map{op.x, op.in, op.x_last}, 0, op.in, strip, op.moments ? &norm : nullptr, x + strip.before * x_size);
      if (op.residual)
        load_strip<E, nv()>(op, Map{op.residual, op.out, op.y_last}, 0, op.out, strip, nullptr, residual + strip.before * r_size);
    });
    for (int64_t from = 0; from < op.hidden; from += hidden_part) {
      const int64_t hidden = op.hidden - from < hidden_part ? op.hidden - from : hidden_part;
      if (op.factor)
        for_strips([&](auto nv, const Strip& strip) {
          load_strip<E, nv()>(op, Map{op.factor, op.hidden, op.factor_last}, from, hidden, strip, nullptr, factor + strip.before * f_size);
        });
      for (int64_t channel = 0; channel < (op.weight_in ? hidden : 0); channel += E::rows) {
        const Weights weights = block_of<E>(op.weight_in + (from + channel) * op.in, op.in, op.in, widened);
        for_strips([&](auto nv, const Strip& strip) {
          const int64_t at = channel / E::packed * nv() * VL;
          first_product<E, nv()>(weights, vectors.bias_in + from + channel, x + strip.before * x_size, kind,
                                 factor + strip.before * f_size + at, h + strip.before * h_size + at,
                                 op.before ? g + strip.before * g_size + at : nullptr);
        });
      }
      for_strips([&](auto nv, const Strip& strip) {
        const auto store = [&](IO* to, const float* rows, bool stream) {
          if (to) store_strip<E, nv(), E::packed>(op, Map<IO>{to, op.hidden, true}, from, hidden, rows, strip, stream);
        };
        store(op.before, g + strip.before * g_size, stream);
        store(op.after, h + strip.before * h_size, false);
      });
      for (int64_t channel = 0; channel < op.out; channel += E::rows) {
        const Weights weights = block_of<E>(op.weight_out + channel * op.hidden + from, op.hidden, hidden, widened);
        for_strips([&](auto nv, const Strip& strip) {
          const int64_t width = nv() * VL;
          const float* columns = op.weight_in ? h + strip.before * h_size : x + strip.before * x_size + from / E::packed * width;
          second_product<E, nv()>(weights, from == 0, vectors.residual_scale + channel, vectors.bias_out + channel, columns,
                                  op.residual ? residual + strip.before * r_size + channel / E::packed * width : nullptr,
                                  y + strip.before * y_size + channel * width);
        });
      }
    }
    for_strips([&](auto nv, const Strip& strip) {
      store_strip<E, nv(), 1>(op, Map<IO>{op.y, op.out, op.y_last}, 0, op.out, y + strip.before * y_size, strip);
    });
  }
  if (stream) fence_streaming();
}

template <class IO> void add_product(const IO* a, const IO* b, IO* y, int64_t n) {
  for (int64_t i = 0; i < n; i += VL) {
    if (n - i >= VL) store<float>(y + i, load<float>(y + i) + load<float>(a + i) * load<float>(b + i));
    else store_part<float>(y + i, load_part<float>(y + i, n - i) + load_part<float>(a + i, n - i) * load_part<float>(b + i, n - i), n - i);
  }
}

// Columns [begin, end) of to = those rows of from, in squares of a vector of columns by the rows of a vector, adjacent pairs of which are lanes
// in bf16; the last of a row may have fewer columns.
template <class IO> void transposed(const IO* from, int64_t rows, int64_t columns, int64_t begin, int64_t end, IO* to) {
  constexpr int64_t of_lane = 4 / sizeof(IO);
  for (int64_t row = begin; row < end; row += of_lane * VL)
    for (int64_t column = 0; column < columns; column += VL) {
      const int64_t n = columns - column < VL ? columns - column : VL;
      const auto bits = [&](int64_t r) __attribute__((always_inline)) {  // of bf16 in the upper halves
        const IO* at = from + (row + r) * columns + column;
        return (U)(n == VL ? load<float>(at) : load_part<float>(at, n));
      };
      V square[VL];
      UNROLL
      for (int i = 0; i < VL; ++i) square[i] = (V)(of_lane == 1 ? bits(i) : bits(2 * i) >> 16 | bits(2 * i + 1));
      transpose<float>(square);
      UNROLL
      for (int i = 0; i < VL; ++i)
        if (i < n) std::memcpy(to + (column + i) * rows + row, &square[i], sizeof(V));
    }
}

// In chunks that stay in the first-level cache between the two sums; those of all chunks are put together in fp64.
template <class IO> Moments moments_of(const IO* x, int64_t n) {
  constexpr int64_t chunk = 4096, vectors = 4;
  Moments all{0, 0};
  for (int64_t first = 0; first < n; first += chunk) {
    const int64_t length = n - first < chunk ? n - first : chunk, whole = length / (vectors * VL) * (vectors * VL);
    const auto sum = [&](auto of) {  // of of(value)
      V sums[vectors] = {};
      for (int64_t i = 0; i < whole; i += vectors * VL)
        UNROLL
        for (int v = 0; v < vectors; ++v) sums[v] += of(load<float>(x + first + i + v * VL));
      double total = 0;
      for (int64_t i = whole; i < length; ++i) total += of(widen(x[first + i]));
      const V joined = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      for (int l = 0; l < VL; ++l) total += joined[l];
      return total;
    };
    const float pivot = widen(x[first]);  // small numbers round less
    const double mean = pivot + sum([&](auto value) { return value - pivot; }) / length, apart = mean - all.mean;
    const float centre = static_cast<float>(mean);
    const double spread = sum([&](auto value) { return (value - centre) * (value - centre); });
    // squared distances were from the mean as fp32 rounds it
    const double off = mean - centre, seen = static_cast<double>(first);
    all.spread += spread - length * off * off + apart * apart * seen * length / (seen + length);
    all.mean += apart * length / (seen + length);
  }
  return all;
}

template <class E> constexpr PointwisePairEngine<typename E::IO> engine{run<E>, VL};

}  // namespace

extern const PointwisePairKernels pointwise_pair_kernels{
    engine<Numbers>,
    engine<Pairs>,
#if SIMD_BYTES == 64
    engine<PairsByDot>,
    engine<PairsByTiles>,
#else
    {},
    {},
#endif
    moments_of<float>,
    moments_of<Bf16>,
    add_product<float>,
    add_product<Bf16>,
    transposed<float>,
    transposed<Bf16>};

}  // namespace SIMD_NAME
}  // namespace spanet
