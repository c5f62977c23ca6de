// radial_filter and radial_filter_backward on the CPU: the mode tables, the way the work is cut, and the registration.
// The arithmetic is in radial_filter_kernel.cpp, compiled once per instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <numbers>
#include <tuple>
#include <vector>

#include "cpu/capability.h"
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

template <class T> struct AxisTable {
  std::vector<T> table, functions, once, transposed;
  Axis<T> axis;

  AxisTable(int64_t n, int64_t radius_squared, int64_t lanes) {
    const int64_t count = axis_functions(n, radius_squared), nc = count / 2 + 1, ns = count - nc, padded = line_up(count);
    const int64_t vectors = (n + lanes - 1) / lanes, width = vectors * lanes;
    functions.resize(count * width);
    once.resize(count * width);
    transposed.resize(width * padded);
    table.resize((n / 2 + 1) * count);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t f = k < nc ? k : k - nc + 1;
      const auto value = [&](int64_t i) {
        const double angle = 2 * std::numbers::pi / n * (f * i % n);
        return static_cast<T>(k < nc ? std::cos(angle) : std::sin(angle));
      };
      for (int64_t i = 0; i <= n / 2; ++i) table[i * count + k] = value(i);
      for (int64_t slot = 0; slot < width; ++slot) {
        const bool moved = n >= lanes && slot / lanes == vectors - 1;
        const int64_t i = moved ? slot - (width - n) : slot;
        if (i >= n) continue;
        functions[k * width + slot] = value(i);
        if (!moved || i >= slot / lanes * lanes) once[k * width + slot] = transposed[slot * padded + k] = value(i);
      }
    }
    axis = {n, nc, ns, table.data(), functions.data(), once.data(), transposed.data(), width, padded};
  }
};

template <class T> struct ModeTable {
  AxisTable<T> rows, columns;
  std::vector<Mode> mode;
  Modes<T> modes;

  ModeTable(int64_t h, int64_t w, int64_t radius_squared, int64_t lanes)
      : rows(h, radius_squared, lanes), columns(w, radius_squared, lanes) {
    const std::vector<int32_t> shell_of = shell_table(radius_squared);
    const auto frequency = [](const Axis<T>& axis, int64_t k) { return k < axis.nc ? k : k - axis.nc + 1; };
    for (int32_t a = 0; a < rows.axis.count(); ++a)
      for (int32_t b = 0; b < columns.axis.count(); ++b) {
        const int64_t u = frequency(rows.axis, a), v = frequency(columns.axis, b), squared = u * u + v * v;
        const double weight = (u == 0 || 2 * u == h ? 1.0 : 2.0) * (v == 0 || 2 * v == w ? 1.0 : 2.0);
        if (squared > radius_squared) continue;
        const int32_t width = static_cast<int32_t>(columns.axis.width);
        mode.push_back({a, b, shell_of[squared], a * width, b * width, weight / static_cast<double>(h * w)});
      }
    int64_t shells = 0;
    for (int32_t index : shell_of) shells += index >= 0;
    modes = {rows.axis, columns.axis, mode.data(), static_cast<int64_t>(mode.size()), shells};
  }
};

template <class T> std::shared_ptr<const ModeTable<T>> mode_table(int64_t h, int64_t w, int64_t radius_squared, int64_t lanes) {
  using Key = std::array<int64_t, 4>;
  static std::mutex mutex;
  static std::map<Key, std::shared_ptr<const ModeTable<T>>> tables;
  const Key key{h, w, radius_squared, lanes};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = tables.find(key);
  if (found != tables.end()) return found->second;
  if (tables.size() >= 256) tables.clear();
  return tables[key] = std::make_shared<const ModeTable<T>>(h, w, radius_squared, lanes);
}

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
template <class F> void for_dtype(ScalarType dtype, int64_t lanes, F f) {
  if (dtype == ScalarType::Float) f(SPANET_PICK(f32));
  else if (dtype == ScalarType::BFloat16) f(SPANET_PICK(bf16));
  else if (dtype == ScalarType::Half) f(SPANET_PICK(f16));
  else if (dtype == ScalarType::Double) f(SPANET_PICK(f64));
  else STD_TORCH_CHECK(false, "radial_filter: x must be float64, float32, float16 or bfloat16");
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

Tensor radial_filter(const Tensor& x, const Tensor& base, const Tensor& gain, int64_t radius_squared) {
  using torch::headeronly::MemoryFormat;
  const bool channels_last = !x.is_contiguous() && x.stride(1) == 1;
  Tensor y = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (x.numel() == 0) return y;
  const int64_t images = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  for_dtype(x.scalar_type(), channels_last ? channels : w, [&]<class T, class IO>(const Kernels<T, IO>& kernel) {
    const auto table = mode_table<T>(h, w, radius_squared, kernel.lanes);
    STD_TORCH_CHECK(base.scalar_type() == gain.scalar_type() && base.element_size() == sizeof(T) && base.numel() == channels &&
                        gain.numel() == table->modes.shells * channels,
                    "radial_filter: base must have shape (C,) and gain (S, C), in the dtype of the accumulators");
    const Profile<T> profile{static_cast<const T*>(base.data_ptr()), static_cast<const T*>(gain.data_ptr()), base.stride(0), gain.stride(0),
                             gain.stride(1)};
    const int64_t bytes = h * w * static_cast<int64_t>(sizeof(IO)), lanes = kernel.lanes;
    const int64_t all_bytes = y.numel() * static_cast<int64_t>(sizeof(IO));
    Cut cut = Cut::columns;
    int64_t chunk = 1, units = images * channels, elements = h * w;
    const bool stream = !channels_last && all_bytes >= stream_bytes && all_bytes < fresh_bytes && bytes <= staged_bytes;
    if (channels_last) {
      cut = Cut::lanes;
      chunk = lanes_chunk(lanes, bytes);
      units = images * chunks_of(channels, chunk);
      elements *= chunk;
    }
    parallel(units, elements, [&](int64_t begin, int64_t end) {
      kernel.filter(cut, table->modes, planes<const IO>(x), planes<IO>(y), profile, channels, chunk, stream, begin, end);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> radial_filter_backward(const Tensor& grad, const Tensor& x, int64_t radius_squared) {
  const int64_t images = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const std::vector<int32_t> shell_of = shell_table(radius_squared);
  int64_t shells = 0;
  for (int32_t index : shell_of) shells += index >= 0;
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
  for_dtype(x.scalar_type(), channels_last ? channels : w, [&]<class T, class IO>(const Kernels<T, IO>& kernel) {
    const auto table = mode_table<T>(h, w, radius_squared, kernel.lanes);
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
      for (int64_t c = 0; c < channels; ++c) of_shell[modes.mode[k].shell * channels + c] += modes.mode[k].scale * sums[k * channels + c];
    for (int64_t i = 0; i < shells * channels; ++i) to_gain[i] = static_cast<T>(of_shell[i]);
    for (int64_t c = 0; c < channels; ++c) to_base[c] = static_cast<T>(sums[modes.inside * channels + c]);
  });
  return {base_grad, gain_grad};
}

}  // namespace
}  // namespace spanet

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CPU, m) {
  m.impl("radial_filter", TORCH_BOX(&spanet::radial_filter));
  m.impl("radial_filter_backward", TORCH_BOX(&spanet::radial_filter_backward));
}
