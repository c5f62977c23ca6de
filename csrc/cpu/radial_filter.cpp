// radial_filter and radial_filter_backward on the CPU: the mode tables, the way the work is cut, and the registration.
// The arithmetic is in radial_filter_kernel.cpp, compiled once per instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

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

// Outputs of this size and more do not fit the caches that the next operator reads from: they are streamed past them.
constexpr int64_t stream_bytes = int64_t{8} << 20;
// Planes beyond this would leave the second-level cache if they were staged for streaming.
constexpr int64_t staged_bytes = int64_t{512} << 10;

template <class T> struct AxisTable {
  std::vector<T> table, functions, transposed;
  Axis<T> axis;

  AxisTable(int64_t n, int64_t radius_squared) {
    const int64_t count = axis_functions(n, radius_squared), nc = count / 2 + 1, ns = count - nc, padded = (count + 15) / 16 * 16;
    functions.resize(count * n);
    transposed.resize(padded * n);
    table.resize((n / 2 + 1) * count);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t f = k < nc ? k : k - nc + 1;
      for (int64_t i = 0; i < n; ++i) {
        const double angle = 2 * std::numbers::pi / n * (f * i % n);
        const T value = static_cast<T>(k < nc ? std::cos(angle) : std::sin(angle));
        functions[k * n + i] = transposed[i * padded + k] = value;
        if (i <= n / 2) table[i * count + k] = value;
      }
    }
    axis = {n, nc, ns, table.data(), functions.data(), transposed.data(), padded};
  }
};

template <class T> struct ModeTable {
  AxisTable<T> rows, columns;
  std::vector<int32_t> shell;
  std::vector<double> scale;
  Modes<T> modes;

  ModeTable(int64_t h, int64_t w, int64_t radius_squared) : rows(h, radius_squared), columns(w, radius_squared) {
    const std::vector<int32_t> shell_of = shell_table(radius_squared);
    const auto frequency = [](const Axis<T>& axis, int64_t k) { return k < axis.nc ? k : k - axis.nc + 1; };
    for (int64_t a = 0; a < rows.axis.count(); ++a)
      for (int64_t b = 0; b < columns.axis.count(); ++b) {
        const int64_t u = frequency(rows.axis, a), v = frequency(columns.axis, b), squared = u * u + v * v;
        scale.push_back((u == 0 || 2 * u == h ? 1.0 : 2.0) * (v == 0 || 2 * v == w ? 1.0 : 2.0) / static_cast<double>(h * w));
        shell.push_back(squared <= radius_squared ? shell_of[squared] : -1);
      }
    int64_t shells = 0;
    for (int32_t index : shell_of) shells += index >= 0;
    modes = {rows.axis, columns.axis, shell.data(), scale.data(), shells};
  }
};

template <class T> std::shared_ptr<const ModeTable<T>> mode_table(int64_t h, int64_t w, int64_t radius_squared) {
  using Key = std::tuple<int64_t, int64_t, int64_t>;
  static std::mutex mutex;
  static std::map<Key, std::shared_ptr<const ModeTable<T>>> tables;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<const ModeTable<T>>& table = tables[Key{h, w, radius_squared}];
  if (!table) {
    const auto made = std::make_shared<const ModeTable<T>>(h, w, radius_squared);
    if (tables.size() > 256) tables.clear();
    return tables[Key{h, w, radius_squared}] = made;
  }
  return table;
}

template <class K> const K& pick(const K& plain, const K& avx2, const K& avx512) {
  static const Capability capability = cpu_capability();
  return capability == Capability::avx512 ? avx512 : capability == Capability::avx2 ? avx2 : plain;
}

#if defined(__x86_64__)
#define SPANET_PICK(KERNEL) pick(plain::KERNEL, avx2::KERNEL, avx512::KERNEL)
#else
#define SPANET_PICK(KERNEL) plain::KERNEL
#endif

// Calls f(kernels) with the kernels for the dtype.
template <class F> void for_dtype(ScalarType dtype, F f) {
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

int64_t chunks_of(int64_t channels, int64_t chunk) { return channels < chunk ? 1 : channels / chunk; }

Tensor radial_filter(const Tensor& x, const Tensor& base, const Tensor& gain, int64_t radius_squared) {
  using torch::headeronly::MemoryFormat;
  const bool channels_last = !x.is_contiguous() && x.stride(1) == 1;
  Tensor y = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (x.numel() == 0) return y;
  const int64_t images = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  for_dtype(x.scalar_type(), [&]<class T, class IO>(const Kernels<T, IO>& kernel) {
    const auto table = mode_table<T>(h, w, radius_squared);
    STD_TORCH_CHECK(base.scalar_type() == gain.scalar_type() && base.element_size() == sizeof(T) && base.numel() == channels &&
                        gain.numel() == table->modes.shells * channels,
                    "radial_filter: base must have shape (C,) and gain (S, C), in the dtype of the accumulators");
    const Profile<T> profile{static_cast<const T*>(base.data_ptr()), static_cast<const T*>(gain.data_ptr()), base.stride(0), gain.stride(0),
                             gain.stride(1)};
    const int64_t bytes = h * w * static_cast<int64_t>(sizeof(IO)), lanes = kernel.lanes;
    const bool large = y.numel() * static_cast<int64_t>(sizeof(IO)) >= stream_bytes;
    Cut cut = Cut::packed;
    int64_t chunk = lanes, units = images * channels, elements = h * w;
    bool stream = false;
    if (channels_last && channels >= lanes) {
      cut = Cut::lanes;
      chunk = lanes_chunk(lanes, bytes);
      stream = large && channels % lanes == 0 && reinterpret_cast<uintptr_t>(y.data_ptr()) % 64 == 0;
    } else if (!channels_last && w >= lanes) {
      cut = Cut::columns;
      stream = large && bytes <= staged_bytes;
    }
    if (cut != Cut::columns) {
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
  for_dtype(x.scalar_type(), [&]<class T, class IO>(const Kernels<T, IO>& kernel) {
    const auto table = mode_table<T>(h, w, radius_squared);
    const Modes<T>& modes = table->modes;
    const int64_t count = modes.rows.count() * modes.columns.count(), lanes = kernel.lanes;
    std::vector<double> sums((count + 1) * channels);
    Cut cut = Cut::packed;
    int64_t chunk = lanes, units = channels, elements = images * h * w;
    if (grad.stride(1) == 1 && x.stride(1) == 1 && channels >= lanes) {
      cut = Cut::lanes;
      chunk = lanes_chunk(lanes, h * w * 2 * static_cast<int64_t>(sizeof(IO)));
    } else if (w >= lanes) {
      cut = Cut::columns;
    }
    if (cut != Cut::columns) {
      units = chunks_of(channels, chunk);
      elements *= chunk;
    }
    parallel(units, elements, [&](int64_t begin, int64_t end) {
      kernel.backward(cut, modes, planes<const IO>(grad), planes<const IO>(x), sums.data(), images, channels, chunk, begin, end);
    });
    T* to_base = static_cast<T*>(base_grad.data_ptr());
    T* to_gain = static_cast<T*>(gain_grad.data_ptr());
    std::vector<double> of_shell(shells * channels);
    for (int64_t k = 0; k < count; ++k)
      for (int64_t c = 0; c < channels && modes.shell[k] >= 0; ++c) {
        of_shell[modes.shell[k] * channels + c] += modes.scale[k] * sums[k * channels + c];
      }
    for (int64_t i = 0; i < shells * channels; ++i) to_gain[i] = static_cast<T>(of_shell[i]);
    for (int64_t c = 0; c < channels; ++c) to_base[c] = static_cast<T>(sums[count * channels + c]);
  });
  return {base_grad, gain_grad};
}

}  // namespace
}  // namespace spanet

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CPU, m) {
  m.impl("radial_filter", TORCH_BOX(&spanet::radial_filter));
  m.impl("radial_filter_backward", TORCH_BOX(&spanet::radial_filter_backward));
}
