// axial_conv and axial_conv_backward on the CPU: checks, the way the work is cut, and the registration.
// The arithmetic is in axial_conv_kernel.cpp, compiled once per instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <tuple>
#include <vector>

#include "cpu/axial_conv_kernel.h"
#include "cpu/capability.h"
#include "cpu/mode_table.h"

namespace spanet {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels of the best instruction set; with vectors half as long if half a vector holds all channels, but not for
// 16-bit elements, of which AVX2 cannot load a part of a vector.
template <class T, class IO>
const AxialConvKernels<T, IO>& pick([[maybe_unused]] int64_t channels, const AxialConvKernels<T, IO>& plain,
                                    [[maybe_unused]] const AxialConvKernels<T, IO>* avx2,
                                    [[maybe_unused]] const AxialConvKernels<T, IO>* avx512) {
#if defined(__x86_64__)
  static const Capability capability = cpu_capability();
  if (capability == Capability::avx512 && (channels > avx2->lanes || sizeof(IO) == 2)) return *avx512;
  if (capability != Capability::plain) return *avx2;
#endif
  return plain;
}

#if defined(__x86_64__)
#define SPANET_PICK(KERNEL) pick(channels, plain::KERNEL, &avx2::KERNEL, &avx512::KERNEL)
#else
#define SPANET_PICK(KERNEL) plain::KERNEL
#endif

// Calls f(kernels) with the kernels for the dtype and so many channels.
template <class F> void for_dtype(ScalarType dtype, int64_t channels, F f) {
  if (dtype == ScalarType::Float) f(SPANET_PICK(axial_conv_f32));
  else if (dtype == ScalarType::BFloat16) f(SPANET_PICK(axial_conv_bf16));
  else if (dtype == ScalarType::Half) f(SPANET_PICK(axial_conv_f16));
  else if (dtype == ScalarType::Double) f(SPANET_PICK(axial_conv_f64));
  else STD_TORCH_CHECK(false, "axial_conv: x must be float64, float32, float16 or bfloat16");
}

template <class IO> Planes<IO> planes(const Tensor& t) {
  return {static_cast<IO*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}
// A parameter (C, k) or (C,) as one row a channel.
template <class T> Planes<T> row_planes(const Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), 0, t.stride(0), 0, t.dim() == 2 ? t.stride(1) : 1};
}

// Work for a thread to be worth its start: this many elements.
constexpr int64_t grain = 16384;

template <class F> void parallel(int64_t units, int64_t elements, const F& f) {
  torch::stable::parallel_for(0, units, (grain + elements - 1) / elements, f);
}

Tensor empty_like_input(const Tensor& x) {
  const bool channels_last = !x.is_contiguous() && x.stride(1) == 1;
  return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

ScalarType parameter_dtype(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

void check(const char* name, const Tensor& parameter, const Tensor& x, int64_t size) {
  const bool shape = parameter.size(0) == x.size(1) && parameter.dim() == (size ? 2 : 1) && (!size || parameter.size(1) == size);
  STD_TORCH_CHECK(shape && parameter.scalar_type() == parameter_dtype(x), "axial_conv: ", name,
                  " must have shape (C, k), k odd, or (C,), in the dtype of the accumulators");
}

template <class T>
AxialConv<T> problem(const Tensor& x, const Tensor& row_weight, const Tensor& row_bias, const Tensor& column_weight,
                     const Tensor& column_bias) {
  return {x.size(0), x.size(1), x.size(2), x.size(3), row_weight.size(1), row_planes<const T>(row_weight), row_planes<const T>(row_bias),
          row_planes<const T>(column_weight), row_planes<const T>(column_bias), {}};
}

std::tuple<Tensor, Tensor> axial_conv(const Tensor& x, const Tensor& row_weight, const Tensor& row_bias, const Tensor& column_weight,
                                      const Tensor& column_bias, int64_t radius_squared) {
  STD_TORCH_CHECK(x.dim() == 4, "axial_conv: x must have shape (B, C, H, W)");
  const int64_t images = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t size = row_weight.dim() == 2 && row_weight.size(1) % 2 ? row_weight.size(1) : -1;
  check("row_weight", row_weight, x, size);
  check("row_bias", row_bias, x, 0);
  check("column_weight", column_weight, x, size);
  check("column_bias", column_bias, x, 0);
  if (radius_squared > h * h + w * w) radius_squared = h * h + w * w;  // holds the whole spectrum
  const int64_t rows = radius_squared < 0 ? 0 : axis_functions(h, radius_squared);
  const int64_t columns = radius_squared < 0 ? 0 : axis_functions(w, radius_squared);
  Tensor z = empty_like_input(x);
  Tensor coefficients =
      torch::stable::empty({images, channels, rows, columns}, parameter_dtype(x), std::nullopt, x.device());
  if (x.numel() == 0) return {z, coefficients};
  for_dtype(x.scalar_type(), channels, [&]<class T, class IO>(const AxialConvKernels<T, IO>& kernel) {
    AxialConv<T> op = problem<T>(x, row_weight, row_bias, column_weight, column_bias);
    std::shared_ptr<const ModeTable<T>> table;
    if (radius_squared >= 0) {
      table = mode_table<T>(h, w, radius_squared, Extent::square, kernel.lanes);
      op.modes = table->modes;
    }
    const Planes<T> to{static_cast<T*>(coefficients.data_ptr()), channels * rows * columns, rows * columns, 0, 1};
    const int64_t chunks = (channels + kernel.lanes - 1) / kernel.lanes;
    parallel(images * chunks, h * w * kernel.lanes,
             [&](int64_t begin, int64_t end) { kernel.forward(op, planes<const IO>(x), planes<IO>(z), to, begin, end); });
  });
  return {z, coefficients};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> axial_conv_backward(const Tensor& grad, const Tensor& x, const Tensor& row_weight,
                                                                       const Tensor& row_bias, const Tensor& column_weight) {
  STD_TORCH_CHECK(x.dim() == 4 && grad.dim() == 4, "axial_conv_backward: x and grad must have shape (B, C, H, W)");
  const int64_t images = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t size = row_weight.dim() == 2 && row_weight.size(1) % 2 ? row_weight.size(1) : -1;
  check("row_weight", row_weight, x, size);
  check("row_bias", row_bias, x, 0);
  check("column_weight", column_weight, x, size);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.size(0) == images && grad.size(1) == channels && grad.size(2) == h &&
                      grad.size(3) == w,
                  "axial_conv_backward: grad must have the shape and dtype of x");
  const auto zeros = [&](std::vector<int64_t> shape) {
    Tensor t = torch::stable::empty(shape, parameter_dtype(x), std::nullopt, x.device());
    return torch::stable::zero_(t);
  };
  Tensor x_grad = empty_like_input(x);
  Tensor row_weight_grad = zeros({channels, size}), column_weight_grad = zeros({channels, size});
  Tensor row_bias_grad = zeros({channels}), column_bias_grad = zeros({channels});
  if (x.numel() > 0)
    for_dtype(x.scalar_type(), channels, [&]<class T, class IO>(const AxialConvKernels<T, IO>& kernel) {
      const AxialConv<T> op = problem<T>(x, row_weight, row_bias, column_weight, row_bias);
      const int64_t chunks = (channels + kernel.lanes - 1) / kernel.lanes;
      const Tensor partial =
          torch::stable::empty({chunks, images, op.sums(), kernel.lanes}, ScalarType::Double, std::nullopt, x.device());
      double* sums = static_cast<double*>(partial.data_ptr());
      parallel(images * chunks, h * w * kernel.lanes, [&](int64_t begin, int64_t end) {
        kernel.backward(op, planes<const IO>(grad), planes<const IO>(x), planes<IO>(x_grad), sums, begin, end);
      });
      parallel(chunks, images * op.sums() * kernel.lanes, [&](int64_t begin, int64_t end) {
        kernel.sum_images(op, sums, row_planes<T>(row_weight_grad), row_planes<T>(row_bias_grad), row_planes<T>(column_weight_grad),
                          row_planes<T>(column_bias_grad), begin, end);
      });
    });
  return {x_grad, row_weight_grad, row_bias_grad, column_weight_grad, column_bias_grad};
}

}  // namespace
}  // namespace spanet

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CPU, m) {
  m.impl("axial_conv", TORCH_BOX(&spanet::axial_conv));
  m.impl("axial_conv_backward", TORCH_BOX(&spanet::axial_conv_backward));
}
