// Two 1x1 convolutions with something between them, for the instruction set this file is compiled for (simd.h).
//
//   h = gelu(W_in x + b_in)   or, with a factor f,   h = f o (W_in x + b_in)          y = r + W_out h + b_out
//
// Work: 2 (in + out) hidden FLOP a pixel. Memory: x, f, r, y once, and the weights once for every tile; h never leaves the cache.
//
// A tile of pixels is laid out with pixels adjacent, X (in, pixels), so that a vector is a run of pixels and a weight is one number for
// all of it: the weights are read where they stand, in either product, and h is written as the second product reads it.
//   strip  `strip` pixels, NV vectors of them, the columns of a block; a shorter one has fewer vectors
//   block  MR rows of a product by one strip: MR x NV accumulators in registers
//   tile   a few strips, for which a part of the hidden channels is computed and multiplied again at once
// Sums are cut every `summed` terms: a sum of few partial sums rounds less than one long sum does.
// What stands in memory is a unit of four bytes: an fp32 number, or two adjacent channels in bf16, which one instruction multiplies and
// adds where the processor has it (vdpbf16ps). Every output is computed by one thread in a fixed order.

#include "cpu/pointwise_pair_kernel.h"

#include "cpu/radial_filter_kernel.h"
#include "cpu/simd.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

using V = Vec<float>;
using U = Simd<float>::U;
constexpr int VL = lanes_of<float>, MR = SIMD_BYTES == 64 ? 8 : 4, most_vectors = 3;
constexpr int64_t strip_pixels = most_vectors * VL, tile_strips = 2, hidden_part = 256, summed = 64;

// gelu(x) = max(x, 0) - a Phi(-a), a = |x|, with Phi(-a) as a polynomial in 2 a / end - 1 on [0, end] and its value at the end beyond it:
// minimax fits of a Phi(-a) by weighted least squares.
template <int N> struct Tail {
  float end, terms[N];
};
// GELU to 4e-7, where PyTorch's fp32 errs by 1e-6.
constexpr Tail<16> tail_of_numbers{5.5f, {-0.00558056595f, 0.00532761978f, 0.0301311124f, -0.043508002f, -0.0490751352f, 0.133205494f,
                                          -0.0349252235f, -0.163058874f, 0.218434852f, -0.0513972174f, -0.177165405f, 0.271889747f,
                                          -0.206808051f, 0.0945579348f, -0.0250080628f, 0.00297977417f}};
// To 1.4e-5, where bf16 rounds by up to 4e-3 of the value.
constexpr Tail<10> tail_of_pairs{4.4f, {-0.0169292852f, 0.0282012057f, 0.0401872848f, -0.119978246f, 0.0476827905f, 0.138779013f,
                                        -0.242884792f, 0.189044968f, -0.0780001475f, 0.0139002877f}};

template <int N> SIMD_INLINE V gelu(V x, const Tail<N>& tail) {
  const V a = at_most((V)((U)x & 0x7fffffffu), tail.end), at = a * (2 / tail.end) - 1.0f;
  V phi = V{} + tail.terms[0];
  UNROLL
  for (int i = 1; i < N; ++i) phi = phi * at + tail.terms[i];
  return at_least(x, 0.0f) - a * phi;
}

// fp32: a unit is a number.
struct Numbers {
  using IO = float;
  static constexpr int channels = 1;  // of a unit
  static constexpr const auto& tail = tail_of_numbers;
  static SIMD_MEMBER V multiply_add(V sum, V a, V b) { return sum + a * b; }
  static SIMD_MEMBER V channel(V unit, int) { return unit; }
  static SIMD_MEMBER V join(V only, V) { return only; }
};

// bf16: a unit is two adjacent channels, the first in its lower half.
struct Pairs {
  using IO = Bf16;
  static constexpr int channels = 2;
  static constexpr const auto& tail = tail_of_pairs;
  static SIMD_MEMBER V multiply_add(V sum, V a, V b) { return sum + channel(a, 0) * channel(b, 0) + channel(a, 1) * channel(b, 1); }
  static SIMD_MEMBER V channel(V unit, int which) { return which ? (V)((U)unit & 0xffff0000u) : (V)((U)unit << 16); }
  static SIMD_MEMBER V join(V first, V second) { return (V)(bf16_bits(first) >> 16 | (bf16_bits(second) & 0xffff0000u)); }
};

#if SIMD_BYTES == 64
// By AVX512_BF16. Its instructions as such: this file is compiled for processors without it too. Denormals are zeros to them.
struct PairsByDot : Pairs {
  static SIMD_MEMBER V multiply_add(V sum, V a, V b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  static SIMD_MEMBER V join(V first, V second) {
    typedef uint16_t Halves __attribute__((vector_size(64)));
    Halves halves, zipped;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(first), "v"(second));
    for (int i = 0; i < 32; ++i) zipped[i] = uint16_t(i / 2 + i % 2 * 16);
    return (V)__builtin_shuffle(halves, zipped);
  }
};
#endif

// A strip: n adjacent pixels of an image, in NV vectors.
struct Strip {
  int64_t image, first, n;
};

// Calls f(integral constant) with the number of vectors that hold n pixels.
template <class F> SIMD_INLINE void for_vectors(int64_t n, F f) {
  if (n > 2 * VL) f(std::integral_constant<int, 3>());
  else if (n > VL) f(std::integral_constant<int, 2>());
  else f(std::integral_constant<int, 1>());
}

// The pixels of a vector that are there.
SIMD_INLINE int64_t pixels_of(const Strip& strip, int v) {
  const int64_t left = strip.n - v * VL;
  return left < VL ? left : VL;
}

// to (channels / E::channels, NV VL) units = the strip of a tensor; pixels that are not there are zeros.
template <class E, int NV, class Op, class IO>
void load_strip(const Op& op, const IO* from, int64_t channels, bool last, const Strip& strip, float* to) {
  constexpr int64_t width = NV * VL;
  const int64_t units = channels / E::channels;
  if (last) {
    const char* pixel = reinterpret_cast<const char*>(from) + (strip.image * op.pixels + strip.first) * units * 4;
    for (int v = 0; v < NV; ++v)
      for (int64_t k = 0; k < units; k += VL) {
        V square[VL];
        UNROLL
        for (int i = 0; i < VL; ++i) square[i] = i < pixels_of(strip, v) ? load_raw<V>(pixel + ((v * VL + i) * units + k) * 4) : V{};
        transpose<float>(square);
        UNROLL
        for (int i = 0; i < VL; ++i) store<float>(to + (k + i) * width + v * VL, square[i]);
      }
    return;
  }
  const IO* plane = from + strip.image * channels * op.pixels + strip.first;
  for (int64_t k = 0; k < units; ++k, plane += E::channels * op.pixels)
    for (int v = 0; v < NV; ++v) {
      const int64_t n = pixels_of(strip, v);
      V part[E::channels];
      UNROLL
      for (int c = 0; c < E::channels; ++c)
        part[c] = n == VL ? load<float>(plane + c * op.pixels + v * VL) : load_part<float>(plane + c * op.pixels + v * VL, n);
      store<float>(to + k * width + v * VL, E::join(part[0], part[E::channels - 1]));
    }
}

// The strip of y from sums (out, NV VL).
template <class E, int NV, class Op> void store_strip(const Op& op, const float* sums, const Strip& strip) {
  constexpr int64_t width = NV * VL;
  if (op.y_last) {
    const int64_t units = op.out / E::channels;
    char* pixel = reinterpret_cast<char*>(op.y) + (strip.image * op.pixels + strip.first) * units * 4;
    for (int v = 0; v < NV; ++v)
      for (int64_t k = 0; k < units; k += VL) {
        V square[VL];
        UNROLL
        for (int i = 0; i < VL; ++i) {
          const float* row = sums + (k + i) * E::channels * width + v * VL;
          square[i] = E::join(load_raw<V>(row), load_raw<V>(row + (E::channels - 1) * width));
        }
        transpose<float>(square);
        UNROLL
        for (int i = 0; i < VL; ++i)
          if (i < pixels_of(strip, v)) std::memcpy(pixel + ((v * VL + i) * units + k) * 4, &square[i], sizeof(V));
      }
    return;
  }
  auto* plane = op.y + strip.image * op.out * op.pixels + strip.first;
  for (int64_t c = 0; c < op.out; ++c, plane += op.pixels)
    for (int v = 0; v < NV; ++v) {
      const V sum = load_raw<V>(sums + c * width + v * VL);
      if (pixels_of(strip, v) == VL) store<float>(plane + v * VL, sum);
      else store_part<float>(plane + v * VL, sum, pixels_of(strip, v));
    }
}

// total[m] += sum over `units` of weights[m] x columns; rows of weights are `stride` elements apart, of columns NV VL.
template <class E, int NV>
SIMD_INLINE void multiply(const typename E::IO* weights, int64_t stride, int64_t units, const float* columns, V (&total)[MR][NV]) {
  const char* row[MR];
  UNROLL
  for (int m = 0; m < MR; ++m) row[m] = reinterpret_cast<const char*>(weights + m * stride);
  for (int64_t first = 0; first < units; first += summed) {
    const int64_t end = first + summed < units ? first + summed : units;
    V sum[MR][NV];
    UNROLL
    for (int m = 0; m < MR; ++m)
      UNROLL
      for (int v = 0; v < NV; ++v) sum[m][v] = V{};
#pragma GCC unroll 4
    for (int64_t k = first; k < end; ++k, columns += NV * VL) {
      V column[NV];
      UNROLL
      for (int v = 0; v < NV; ++v) column[v] = load_raw<V>(columns + v * VL);
      UNROLL
      for (int m = 0; m < MR; ++m) {
        uint32_t weight;
        std::memcpy(&weight, row[m] + 4 * k, 4);
        UNROLL
        for (int v = 0; v < NV; ++v) sum[m][v] = E::multiply_add(sum[m][v], (V)(U{} + weight), column[v]);
      }
    }
    UNROLL
    for (int m = 0; m < MR; ++m)
      UNROLL
      for (int v = 0; v < NV; ++v) total[m][v] += sum[m][v];
  }
}

template <class IO> SIMD_INLINE float bias_at(const IO* bias, int64_t i) { return bias ? widen(bias[i]) : 0.0f; }

// MR hidden channels from `channel` on: h (MR / E::channels, NV VL) units. factor are those of f, laid out like h, or nullptr.
template <class E, int NV, class Op> void first_product(const Op& op, int64_t channel, const float* x, const float* factor, float* h) {
  V total[MR][NV];
  UNROLL
  for (int m = 0; m < MR; ++m)
    UNROLL
    for (int v = 0; v < NV; ++v) total[m][v] = V{} + bias_at(op.bias_in, channel + m);
  multiply<E, NV>(op.weight_in + channel * op.in, op.in, op.in / E::channels, x, total);
  UNROLL
  for (int m = 0; m < MR; m += E::channels)
    UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t at = (m / E::channels * NV + v) * VL;
      V part[E::channels];
      UNROLL
      for (int c = 0; c < E::channels; ++c) {
        const V sum = total[m + c][v];
        part[c] = factor ? sum * E::channel(load_raw<V>(factor + at), c) : gelu(sum, E::tail);
      }
      store<float>(h + at, E::join(part[0], part[E::channels - 1]));
    }
}

// MR outputs from `channel` on: sums (MR, NV VL) += W_out h over `hidden` channels from `from` on, r + b_out first; residual are those
// of r (MR / E::channels, NV VL) units, or nullptr.
template <class E, int NV, class Op>
void second_product(const Op& op, int64_t channel, int64_t from, int64_t hidden, const float* h, const float* residual, float* sums) {
  V total[MR][NV];
  UNROLL
  for (int m = 0; m < MR; ++m)
    UNROLL
    for (int v = 0; v < NV; ++v) {
      total[m][v] = from ? load_raw<V>(sums + (m * NV + v) * VL) : V{} + bias_at(op.bias_out, channel + m);
      if (residual && !from) total[m][v] += E::channel(load_raw<V>(residual + (m / E::channels * NV + v) * VL), m % E::channels);
    }
  multiply<E, NV>(op.weight_out + channel * op.hidden + from, op.hidden, hidden / E::channels, h, total);
  UNROLL
  for (int m = 0; m < MR; ++m)
    UNROLL
    for (int v = 0; v < NV; ++v) store<float>(sums + (m * NV + v) * VL, total[m][v]);
}

template <class E> void run(const PointwisePair<typename E::IO>& op, int64_t begin, int64_t end) {
  constexpr int64_t in_unit = E::channels;
  const int64_t x_size = op.in / in_unit * strip_pixels, f_size = op.factor ? op.hidden / in_unit * strip_pixels : 0;
  const int64_t r_size = op.residual ? op.out / in_unit * strip_pixels : 0;
  const int64_t h_size = hidden_part / in_unit * strip_pixels, y_size = op.out * strip_pixels;
  float* const x = static_cast<float*>(thread_scratch(tile_strips * (x_size + f_size + r_size + h_size + y_size) * sizeof(float)));
  float *const factor = x + tile_strips * x_size, *const residual = factor + tile_strips * f_size;
  float *const h = residual + tile_strips * r_size, *const y = h + tile_strips * h_size;
  const int64_t of_image = op.strips_of_image(strip_pixels);
  for (int64_t first = begin; first < end; first += tile_strips) {
    const int64_t count = end - first < tile_strips ? end - first : tile_strips;
    Strip strip[tile_strips];
    for (int64_t s = 0; s < count; ++s) {
      const int64_t pixel = (first + s) % of_image * strip_pixels, left = op.pixels - pixel;
      strip[s] = {(first + s) / of_image, pixel, left < strip_pixels ? left : strip_pixels};
      for_vectors(strip[s].n, [&](auto nv) {
        load_strip<E, nv()>(op, op.x, op.in, op.x_last, strip[s], x + s * x_size);
        if (op.factor) load_strip<E, nv()>(op, op.factor, op.hidden, op.x_last, strip[s], factor + s * f_size);
        if (op.residual) load_strip<E, nv()>(op, op.residual, op.out, op.y_last, strip[s], residual + s * r_size);
      });
    }
    for (int64_t from = 0; from < op.hidden; from += hidden_part) {
      const int64_t hidden = op.hidden - from < hidden_part ? op.hidden - from : hidden_part;
      for (int64_t channel = 0; channel < hidden; channel += MR)
        for (int64_t s = 0; s < count; ++s)
          for_vectors(strip[s].n, [&](auto nv) {
            const int64_t width = nv() * VL;
            first_product<E, nv()>(op, from + channel, x + s * x_size,
                                   op.factor ? factor + s * f_size + (from + channel) / in_unit * width : nullptr,
                                   h + s * h_size + channel / in_unit * width);
          });
      for (int64_t channel = 0; channel < op.out; channel += MR)
        for (int64_t s = 0; s < count; ++s)
          for_vectors(strip[s].n, [&](auto nv) {
            const int64_t width = nv() * VL;
            second_product<E, nv()>(op, channel, from, hidden, h + s * h_size,
                                    op.residual ? residual + s * r_size + channel / in_unit * width : nullptr,
                                    y + s * y_size + channel * width);
          });
    }
    for (int64_t s = 0; s < count; ++s) for_vectors(strip[s].n, [&](auto nv) { store_strip<E, nv()>(op, y + s * y_size, strip[s]); });
  }
}

}  // namespace

#if SIMD_BYTES == 64
extern const PointwisePairKernels pointwise_pair_kernels{run<Numbers>, run<Pairs>, run<PairsByDot>, strip_pixels};
#else
extern const PointwisePairKernels pointwise_pair_kernels{run<Numbers>, run<Pairs>, nullptr, strip_pixels};
#endif

}  // namespace SIMD_NAME
}  // namespace spanet
