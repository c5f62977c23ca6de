// radial_filter, radial_filter_backward and mode_coefficients on the CPU: the way the work is cut, and the registration.
// The arithmetic is in radial_filter_kernel.cpp, compiled once per instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/capability.h"
#include "cpu/mode_table.h"
#include "cpu/radial_filter_kernel.h"
#include "modes.h"

namespace spanet {

void* thread_scratch(int64_t bytes) {
  thread_local std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < bytes + 64) memory = std::vector<char>(bytes + 64);
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Outputs of this size do not fit the caches that the next operator reads from: they are streamed past them. Not so those
// that malloc maps afresh for every call (from 32 MiB with glibc): the kernel has just zeroed their pages in the cache.
constexpr int64_t stream_bytes = int64_t{8} << 20, fresh_bytes = int64_t{32} << 20;
// Planes beyond this would leave the second-level cache if they were staged for streaming.
constexpr int64_t staged_bytes = int64_t{512} << 10;

// The kernels of the best instruction set; the one with vectors half as long if half a vector holds all lanes, but not for
// 16-bit elements, of which AVX2 cannot load a part of a vector.
template <class T, class IO>
const Kernels<T, IO>& pick([[maybe_unused]] int64_t lanes, const Kernels<T, IO>& plain, [[maybe_unused]] const Kernels<T, IO>* avx2,
                           [[maybe_unused]] const Kernels<T, IO>* avx512) {
#if defined(__x86_64__)
  static const Capability capability = cpu_capability();
  if (capability == Capability::avx512 && (lanes > avx2->lanes || sizeof(IO) == 2)) return *avx512;
  if (capability != Capability::plain) return *avx2;
#endif
  return plain;
}

#if defined(__x86_64__)
#define SPANET_PICK(KERNEL) pick(lanes, plain::KERNEL, &avx2::KERNEL, &avx512::KERNEL)
#else
#define SPANET_PICK(KERNEL) plain::KERNEL
#endif

// Calls f(kernels) with the kernels for the dtype and so many adjacent elements to work on.
template <class F> void for_dtype(const char* op, ScalarType dtype, int64_t lanes, F f) {
  if (dtype == ScalarType::Float) f(SPANET_PICK(f32));
  else if (dtype == ScalarType::BFloat16) f(SPANET_PICK(bf16));
  else if (dtype == ScalarType::Half) f(SPANET_PICK(f16));
  else if (dtype == ScalarType::Double) f(SPANET_PICK(f64));
  else STD_TORCH_CHECK(false, op, ": x must be float64, float32, float16 or bfloat16");
}

template <class IO> Planes<IO> planes(const Tensor& t) {
  return {static_cast<IO*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// Work for a thread to be worth its start: this many elements.
constexpr int64_t grain = 32768;

template <class F> void parallel(int64_t units, int64_t elements, const F& f) {
  torch::stable::parallel_for(0, units, (grain + elements - 1) / elements, f);
}

// Channels of a chunk whose planes stay in half of the second-level cache between reduce and expand.
int64_t lanes_chunk(int64_t lanes, int64_t plane_bytes) {
  int64_t chunk = lanes;
  while (chunk < 4 * lanes && 2 * chunk * plane_bytes <= staged_bytes) chunk *= 2;
  return chunk;
}

bool is_channels_last(const Tensor& x) { return !x.is_contiguous() && x.stride(1) == 1; }

// A new tensor, straight from the allocator: `torch::stable::empty` goes through the dispatcher, which costs as much again.
Tensor empty(std::array<int64_t, 4> sizes, int32_t dtype, bool channels_last = false) {
  const auto [b, c, h, w] = sizes;
  const std::array<int64_t, 4> contiguous{c * h * w, h * w, w, 1}, last{h * w * c, 1, w * c, c};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), (channels_last ? last : contiguous).data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_in_layout_of(const Tensor& x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty({x.size(0), x.size(1), x.size(2), x.size(3)}, dtype, is_channels_last(x));
}

// The work on the planes of x, cut into units of so many elements.
struct Plan {
  Cut cut = Cut::columns;
  int64_t chunk = 1, units, elements;
  bool stream;

  Plan(const Tensor& x, int64_t lanes) {
    const int64_t plane = x.size(2) * x.size(3), bytes = plane * x.element_size(), all_bytes = x.numel() * x.element_size();
    units = x.size(0) * x.size(1);
    elements = plane;
    stream = !is_channels_last(x) && all_bytes >= stream_bytes && all_bytes < fresh_bytes && bytes <= staged_bytes;
    if (!is_channels_last(x)) return;
    cut = Cut::lanes;
    chunk = lanes_chunk(lanes, bytes);
    units = x.size(0) * chunks_of(x.size(1), chunk);
    elements *= chunk;
  }
};

// How many adjacent elements a kernel sees.
int64_t adjacent(const Tensor& x, bool channels_last, int64_t radius_squared) {
  const int64_t h = x.size(2), w = x.size(3);
  return channels_last ? x.size(1) : serves_flat(h, w, radius_squared) ? h * w : w;
}

// Calls f(kernels, modes, plan) for the operator on x.
template <class F> void for_planes(const char* op, const Tensor& x, int64_t radius_squared, Extent extent, F f) {
  for_dtype(op, x.scalar_type(), adjacent(x, is_channels_last(x), radius_squared), [&]<class T, class IO>(const Kernels<T, IO>& kernel) {
    const auto table = mode_table<T>(x.size(2), x.size(3), radius_squared, extent, kernel.lanes);
    f(kernel, table->modes, Plan(x, kernel.lanes));
  });
}

Tensor radial_filter(const Tensor& x, const Tensor& base, const Tensor& gain, int64_t radius_squared) {
  Tensor y = empty_in_layout_of(x);
  if (x.numel() == 0) return y;
  const int64_t channels = x.size(1);
  for_planes("radial_filter", x, radius_squared, Extent::disc,
             [&]<class T, class IO>(const Kernels<T, IO>& kernel, const Modes<T>& modes, const Plan& plan) {
    STD_TORCH_CHECK(base.scalar_type() == gain.scalar_type() && base.element_size() == sizeof(T) && base.numel() == channels &&
                        gain.numel() == modes.shells * channels,
                    "radial_filter: base must have shape (C,) and gain (S, C), in the dtype of the accumulators");
    const Profile<T> profile{static_cast<const T*>(base.data_ptr()), static_cast<const T*>(gain.data_ptr()), base.stride(0), gain.stride(0),
                             gain.stride(1)};
    parallel(plan.units, plan.elements, [&](int64_t begin, int64_t end) {
      kernel.filter(plan.cut, modes, planes<const IO>(x), planes<IO>(y), profile, channels, plan.chunk, plan.stream, begin, end);
    });
  });
  return y;
}

Tensor mode_coefficients(const Tensor& x, int64_t radius_squared) {
  const auto functions = [&](int64_t n) { return radius_squared < 0 ? 0 : axis_functions(n, radius_squared); };
  const int64_t channels = x.size(1);
  const int32_t dtype = x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  Tensor coefficients = empty({x.size(0), channels, functions(x.size(2)), functions(x.size(3))}, dtype);
  if (coefficients.numel() == 0) return coefficients;
  for_planes("mode_coefficients", x, radius_squared, Extent::square,
             [&]<class T, class IO>(const Kernels<T, IO>& kernel, const Modes<T>& modes, const Plan& plan) {
    T* out = static_cast<T*>(coefficients.data_ptr());
    parallel(plan.units, plan.elements, [&](int64_t begin, int64_t end) {
      kernel.mode_coefficients(plan.cut, modes, planes<const IO>(x), out, channels, plan.chunk, begin, end);
    });
  });
  return coefficients;
}

std::tuple<Tensor, Tensor> radial_filter_backward(const Tensor& grad, const Tensor& x, int64_t radius_squared) {
  const int64_t images = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t shells = shell_count(radius_squared);
  const auto zeros = [&](std::vector<int64_t> size) {
    Tensor t = torch::stable::empty(size, dtype, std::nullopt, x.device());
    return torch::stable::zero_(t);
  };
  Tensor base_grad = zeros({channels}), gain_grad = zeros({shells, channels});
  if (x.numel() == 0) return {base_grad, gain_grad};
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.size(0) == images && grad.size(1) == channels && grad.size(2) == h &&
                      grad.size(3) == w,
                  "radial_filter_backward: grad must have the shape and dtype of x");
  const bool channels_last = grad.stride(1) == 1 && x.stride(1) == 1 && channels > 1;
  const int64_t lanes = adjacent(x, channels_last, radius_squared);
  for_dtype("radial_filter_backward", x.scalar_type(), lanes, [&]<class T, class IO>(const Kernels<T, IO>& kernel) {
    const auto table = mode_table<T>(h, w, radius_squared, Extent::disc, kernel.lanes);
    const Modes<T>& modes = table->modes;
    std::vector<double> sums((modes.inside + 1) * channels);
    Cut cut = Cut::columns;
    int64_t chunk = 1, units = channels, elements = images * h * w;
    if (channels_last) {
      cut = Cut::lanes;
      chunk = lanes_chunk(kernel.lanes, h * w * 2 * static_cast<int64_t>(sizeof(IO)));
      units = chunks_of(channels, chunk);
      elements *= chunk;
    }
    parallel(units, elements, [&](int64_t begin, int64_t end) {
      kernel.backward(cut, modes, planes<const IO>(grad), planes<const IO>(x), sums.data(), images, channels, chunk, begin, end);
    });
    T* to_base = static_cast<T*>(base_grad.data_ptr());
    T* to_gain = static_cast<T*>(gain_grad.data_ptr());
    std::vector<double> of_shell(shells * channels);
    for (int64_t k = 0; k < modes.inside; ++k)
      for (int64_t c = 0; c < channels; ++c) of_shell[modes.mode[k].index * channels + c] += modes.mode[k].scale * sums[k * channels + c];
    for (int64_t i = 0; i < shells * channels; ++i) to_gain[i] = static_cast<T>(of_shell[i]);
    for (int64_t c = 0; c < channels; ++c) to_base[c] = static_cast<T>(sums[modes.inside * channels + c]);
  });
  return {base_grad, gain_grad};
}

}  // namespace
}  // namespace spanet

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CPU, m) {
  m.impl("radial_filter", TORCH_BOX(&spanet::radial_filter));
  m.impl("mode_coefficients", TORCH_BOX(&spanet::mode_coefficients));
  m.impl("radial_filter_backward", TORCH_BOX(&spanet::radial_filter_backward));
}
