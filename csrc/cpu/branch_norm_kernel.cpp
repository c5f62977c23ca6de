// The norm and the sum around the body f of a residual branch, for the instruction set this file is compiled for (simd.h).
//
//   n = weight o u + bias,   u = (x - mean) / deviation of an image        y = scale o x + f(n)
//   x_grad = (weight o n_grad - mean(weight o n_grad) - u mean(weight o n_grad o u)) / deviation + scale o y_grad
//
// Memory: forward x once and n once; backward x and n_grad twice, y_grad once, or twice where a scale learns, x_grad once.

#include "cpu/branch_norm_kernel.h"

#include "cpu/simd.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

using V = Vec<float>;
constexpr int64_t VL = lanes_of<float>;

template <class IO> SIMD_INLINE V read(const IO* p, int64_t n) { return n >= VL ? load<float>(p) : load_part<float>(p, n); }
template <class IO> SIMD_INLINE void write(IO* p, V v, int64_t n) { n >= VL ? store<float>(p, v) : store_part<float>(p, v, n); }

// Calls f(image, offset, elements left, values) for the elements of a unit, up to a vector at a time; values(vector) is what a vector
// (channels,) has for them.
template <class Op, class F> SIMD_INLINE void for_unit(const Op& op, int64_t unit, F f) {
  if (!op.last) {
    const int64_t c = unit % op.channels, first = unit * op.pixels;
    const auto values = [&](const float* p) __attribute__((always_inline)) { return V{} + p[c]; };
    for (int64_t i = 0; i < op.pixels; i += VL) f(unit / op.channels, first + i, op.pixels - i, values);
    return;
  }
  const int64_t blocks = op.blocks(), image = unit / blocks, begin = unit % blocks * branch_norm_block;
  const int64_t end = begin + branch_norm_block < op.pixels ? begin + branch_norm_block : op.pixels;
  for (int64_t pixel = begin; pixel < end; ++pixel)
    for (int64_t c = 0; c < op.channels; c += VL)
      f(image, (image * op.pixels + pixel) * op.channels + c, op.channels - c,
        [&](const float* p) __attribute__((always_inline)) { return read(p + c, op.channels - c); });
}

template <class X, class N> void forward(const BranchNorm<X, N>& op, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit)
    for_unit(op, unit, [&](int64_t image, int64_t at, int64_t n, auto values) __attribute__((always_inline)) {
      const float mean = op.moments[2 * image], scale = op.moments[2 * image + 1];
      write(op.n + at, (read(op.x + at, n) - mean) * scale * values(op.weight) + values(op.bias), n);
    });
}

template <class X, class N> void backward(const BranchNorm<X, N>& op, int64_t begin, int64_t end) {
  const auto of = [&](auto sum, auto scaled) {
    for (int64_t unit = begin; unit < end; ++unit)
      for_unit(op, unit, [&](int64_t image, int64_t at, int64_t n, auto values) __attribute__((always_inline)) {
        const float mean = op.moments[2 * image], scale = op.moments[2 * image + 1];
        const V u = (read(op.x + at, n) - mean) * scale;
        V grad = (read(op.n + at, n) * values(op.weight) - op.slope[2 * image] - u * op.slope[2 * image + 1]) * scale;
        if constexpr (sum()) grad += scaled() ? read(op.sum_grad + at, n) * values(op.scale) : read(op.sum_grad + at, n);
        write(op.x_grad + at, grad, n);
      });
  };
  if (!op.sum_grad) of(std::false_type(), std::false_type());
  else if (op.scale) of(std::true_type(), std::true_type());
  else of(std::true_type(), std::false_type());
}

template <class X, class N> void add(const BranchNorm<X, N>& op, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit)
    for_unit(op, unit, [&](int64_t, int64_t at, int64_t n, auto values) __attribute__((always_inline)) {
      const V x = read(op.x + at, n);
      write(op.x_grad + at, (op.scale ? x * values(op.scale) : x) + read(op.n + at, n), n);
    });
}

// The three sums over so many pixels, `stride` elements apart, of NV vectors of channels, the last of n.
template <int NV, class X, class N>
SIMD_INLINE void sums_of(const BranchNorm<X, N>& op, int64_t image, int64_t at, int64_t pixels, int64_t stride, int64_t n, V (&sums)[3][NV]) {
  const float mean = op.moments[2 * image], scale = op.moments[2 * image + 1];
  for (int k = 0; k < 3; ++k)
    for (int v = 0; v < NV; ++v) sums[k][v] = V{};
  for (int64_t i = 0; i < pixels; ++i, at += stride)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t here = at + v * VL, left = v == NV - 1 ? n : VL;
      const V x = read(op.x + here, left), grad = read(op.n + here, left);
      sums[0][v] += grad * ((x - mean) * scale);
      sums[1][v] += grad;
      if (op.scale) sums[2][v] += read(op.sum_grad + here, left) * x;
    }
}

template <class X, class N> void sum(const BranchNorm<X, N>& op, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    if (!op.last) {  // a plane, of which a vector is a run of pixels
      const int64_t image = unit / op.channels;
      double total[3] = {};
      for (int64_t i = 0, n; i < op.pixels; i += n) {
        const int64_t left = op.pixels - i, vectors = left / VL < branch_norm_block ? left / VL : branch_norm_block;
        n = vectors ? vectors * VL : left;
        V sums[3][1];
        sums_of<1>(op, image, unit * op.pixels + i, vectors ? vectors : 1, VL, vectors ? VL : left, sums);
        for (int k = 0; k < 3; ++k)
          for (int64_t l = 0; l < VL; ++l) total[k] += sums[k][0][l];
      }
      for (int k = 0; k < 3; ++k) op.sums[(image * 3 + k) * op.channels + unit % op.channels] = static_cast<float>(total[k]);
      continue;
    }
    const int64_t blocks = op.blocks(), image = unit / blocks, first = unit % blocks * branch_norm_block;
    const int64_t pixels = op.pixels - first < branch_norm_block ? op.pixels - first : branch_norm_block;
    const int64_t at = (image * op.pixels + first) * op.channels;
    float* const to = op.sums + unit * 3 * op.channels;
    const auto of = [&](auto nv, int64_t c, int64_t n) {
      V sums[3][nv()];
      sums_of<nv()>(op, image, at + c, pixels, op.channels, n, sums);
      for (int k = 0; k < 3; ++k)
        for (int v = 0; v < nv(); ++v) write(to + k * op.channels + c + v * VL, sums[k][v], v == nv() - 1 ? n : VL);
    };
    int64_t c = 0;
    for (; c + 4 * VL <= op.channels; c += 4 * VL) of(std::integral_constant<int, 4>(), c, VL);
    for (; c < op.channels; c += VL) of(std::integral_constant<int, 1>(), c, op.channels - c < VL ? op.channels - c : VL);
  }
}

template <class X, class N> constexpr BranchNormKernels<X, N> kernels{forward<X, N>, sum<X, N>, backward<X, N>, add<X, N>};

}  // namespace

extern const BranchNormSet branch_norm_kernels{kernels<float, float>, kernels<Bf16, Bf16>, kernels<float, Bf16>};

}  // namespace SIMD_NAME
}  // namespace spanet
