// radial_filter, radial_filter_backward and mode_coefficients on the CPU: the way the work is cut, and the registration.
// The arithmetic is in radial_filter_kernel.cpp, compiled once per instruction set; of wide discs in spectrum.cpp.

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/mode_table.h"
#include "cpu/operators.h"
#include "cpu/remembered.h"
#include "cpu/spectrum.h"
#include "modes.h"

namespace spanet {

void* thread_scratch(int64_t bytes) {
  thread_local std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < bytes + 64) memory = std::vector<char>(bytes + 64);
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
}

namespace {

// Outputs of this size do not fit the caches that the next operator reads from: they are streamed past them. Not so fresh ones:
// the system has just zeroed their pages in the cache.
constexpr int64_t stream_bytes = int64_t{12} << 20;
// What is read a second time is in the second-level cache, most of it, if there is not more.
constexpr int64_t cached_bytes = int64_t{2} << 20;
// Planes of so few pixels are summed along their axes in the first-level cache, with less rounding than in an FFT.
constexpr int64_t axes_pixels = 1536;
// Planes beyond this would leave the second-level cache if they were staged for streaming.
constexpr int64_t staged_bytes = int64_t{512} << 10;

constexpr Compiled<RadialFilterKernels> compiled = SPANET_COMPILED(radial_filter_kernels);

// Work for a thread to be worth its start: this many elements.
constexpr int64_t grain = 32768;

// Channels of a chunk: adjacent elements are read at the speed of memory, others are not; of planes that lie apart few stay in the cache.
int64_t chunk_size(Cut cut, int64_t channels, int64_t lanes) { return (cut == Cut::lanes ? 4 : channels < 64 ? 1 : 2) * lanes; }

// Whether planes in NCHW are brought side by side: to transpose them costs less than short rows do, and less than longer ones from so many
// functions along a row on. What stays in registers (disc.h, flat.h) is faster still; fp16 does not (runs.h). The same for any number of images,
// which are to give the same bits.
bool are_gathered(const Tensor& x, int64_t radius_squared) {
  const int64_t h = x.size(2), w = x.size(3), disc = radius_squared == 1 ? 3 : radius_squared == 4 ? 5 : 0;
  const ScalarType dtype = x.scalar_type();
  const bool flat = radius_squared == 0 && h * w <= flat_pixels && cpu_capability() >= Capability::avx512;
  const bool stays = flat || (disc && std::min(h, w) >= disc);
  if (stays && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16)) return false;
  const bool pays = w <= (dtype == ScalarType::Half ? 16 : 10) || (w <= 64 && 3 * axis_functions(w, radius_squared) > w + 6);
  return pays && x.stride(3) == 1 && x.size(1) >= 32;
}

Cut cut_of(const Tensor& x, int64_t radius_squared) {
  if (is_channels_last(x) || (x.stride(1) == 1 && x.size(2) * x.size(3) == 1)) return Cut::lanes;
  return are_gathered(x, radius_squared) ? Cut::gathered : Cut::columns;
}

// The work on the planes of x, cut into units of so many elements.
template <class T> struct Plan : Work<T> {
  int64_t units, elements;
  bool passes = false;  // over one image after the other

  Plan(const Tensor& x, const Modes<T>& m, Cut cut, int64_t lanes) : Work<T>{cut, x.size(1), 1, false} {
    const int64_t plane = x.size(2) * x.size(3), image_bytes = x.size(1) * plane * x.element_size(), bytes = x.size(0) * image_bytes;
    units = x.size(0) * x.size(1);
    elements = plane;
    if (cut != Cut::columns) {
      this->chunk = chunk_size(cut, x.size(1), lanes);
      units = x.size(0) * chunks();
      elements *= this->chunk;
      uint32_t threads;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
      this->axes = plane <= axes_pixels && m.on_axes();  // for any number of images and threads, which are to give the same bits
      // chunks leave the second-level cache before their rows are read again, or are too few to go round among the threads
      const bool few = units % threads != 0 && units < 4 * threads && x.size(1) * plane >= 4 * grain;
      passes = !this->axes && (few || image_bytes / chunks() > cached_bytes);
    } else {
      this->stream = bytes >= stream_bytes && bytes < fresh_bytes && plane * x.element_size() <= staged_bytes;
    }
  }
  int64_t chunks() const { return chunks_of(this->channels, this->chunk); }

  // Calls run(work, image, begin, end) for units of all images from this one on.
  template <class F> void over(const Tensor& x, const Modes<T>& m, bool sums_up, bool writes, F run) const {
    if (!passes) return parallel(grain, units, elements, [&](int64_t begin, int64_t end) { run(*this, int64_t{0}, begin, end); });
    const int64_t lanes = std::max(this->channels, this->chunk);
    const Tensor sums = empty(std::array{m.rows.n * m.columns.count() * lanes}, accumulator_dtype(x));
    Work<T> work = *this;
    work.sums = static_cast<T*>(sums.data_ptr());
    for (int64_t image = 0; image < x.size(0); ++image)
      for (const Pass pass : {reduce_pass, mix_pass, expand_pass}) {
        if ((pass == reduce_pass && !sums_up) || (pass == expand_pass && !writes)) continue;
        work.pass = pass;
        const int64_t rows = pass == mix_pass ? 1 : m.rows.n;
        parallel(grain, chunks() * rows, elements / rows, [&](int64_t begin, int64_t end) { run(work, image, begin, end); });
      }
  }
};

// How many adjacent elements a kernel sees.
int64_t adjacent(const Tensor& x, Cut cut, int64_t radius_squared) {
  const int64_t h = x.size(2), w = x.size(3);
  return cut != Cut::columns ? x.size(1) : axis_functions(h, radius_squared) * axis_functions(w, radius_squared) <= 25 ? h * w : w;
}

// Calls f(kernels, modes, plan) for the operator on x.
template <class F> void for_planes(const char* op, const Tensor& x, int64_t radius_squared, Extent extent, F f) {
  const Cut cut = cut_of(x, radius_squared);
  const int64_t lanes = adjacent(x, cut, radius_squared);
  for_dtype(op, compiled, x.scalar_type(), lanes, [&]<class T, class IO>(const RadialFilterKernels<T, IO>& kernel) {
    const auto table = remembered<ModeTable<T>>(x.size(2), x.size(3), radius_squared, extent, kernel.lanes);
    f(kernel, table->modes, Plan<T>(x, table->modes, cut, kernel.lanes));
  });
}

Tensor radial_filter(const Tensor& x, const Tensor& base, const Tensor& gain, int64_t radius_squared) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(2) > 0 && x.size(3) > 0, "radial_filter: x must have shape (B, C, H, W), H and W at least 1");
  if (x.numel() > 0 && fft_pays(x, radius_squared, false)) return filter_by_fft(x, base, gain, radius_squared);
  Tensor y = empty_in_layout_of(x);
  radial_filter_into(y, x, base, gain, radius_squared);
  return y;
}

Tensor mode_coefficients(const Tensor& x, int64_t radius_squared) {
  const auto functions = [&](int64_t n) { return radius_squared < 0 ? 0 : axis_functions(n, radius_squared); };
  const int64_t channels = x.size(1);
  Tensor coefficients = empty_coefficients(x, functions(x.size(2)), functions(x.size(3)));
  if (coefficients.numel() == 0) return coefficients;
  for_planes("mode_coefficients", x, radius_squared, Extent::square,
             [&]<class T, class IO>(const RadialFilterKernels<T, IO>& kernel, const Modes<T>& modes, const Plan<T>& plan) {
    T* out = static_cast<T*>(coefficients.data_ptr());
    plan.over(x, modes, true, false, [&](const Work<T>& work, int64_t image, int64_t begin, int64_t end) {
      kernel.mode_coefficients(work, modes, planes<const IO>(x, image), out + image * channels * modes.inside, begin, end);
    });
  });
  return coefficients;
}

}  // namespace

std::tuple<Tensor, Tensor> radial_filter_backward(const Tensor& grad, const Tensor& x, int64_t radius_squared) {
  const int64_t images = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t shells = shell_count(radius_squared);
  Tensor base_grad = zeros(x, {channels}), gain_grad = zeros(x, {shells, channels});
  if (x.numel() == 0) return {std::move(base_grad), std::move(gain_grad)};
  check_like("radial_filter_backward", "grad", grad, x);
  if (fft_pays(x, radius_squared, true)) {
    profile_gradients_by_fft(grad, x, radius_squared, base_grad, gain_grad);
    return {std::move(base_grad), std::move(gain_grad)};
  }
  const bool channels_last = grad.stride(1) == 1 && x.stride(1) == 1 && channels > 1;
  const bool gathered = are_gathered(grad, radius_squared) && are_gathered(x, radius_squared);
  const Cut cut = channels_last ? Cut::lanes : gathered ? Cut::gathered : Cut::columns;
  const int64_t lanes = adjacent(x, cut, radius_squared);
  for_dtype("radial_filter_backward", compiled, x.scalar_type(), lanes, [&]<class T, class IO>(const RadialFilterKernels<T, IO>& kernel) {
    const auto table = remembered<ModeTable<T>>(h, w, radius_squared, Extent::disc, kernel.lanes);
    const Modes<T>& modes = table->modes;
    int64_t chunk = 1, blocks = 1, units = channels, elements = images * h * w;
    if (cut != Cut::columns) {
      constexpr int64_t enough_units = 16;
      chunk = chunk_size(cut, channels, kernel.lanes);
      units = chunks_of(channels, chunk);
      blocks = std::min(images, (enough_units + units - 1) / units);
      units *= blocks;
      elements = elements * chunk / blocks;
    }
    const int64_t block = (modes.inside + 1) * channels;
    std::vector<double> sums(blocks * block);
    parallel(grain, units, elements, [&](int64_t begin, int64_t end) {
      kernel.backward(cut, modes, planes<const IO>(grad), planes<const IO>(x), sums.data(), images, blocks, channels, chunk, begin, end);
    });
    for (int64_t b = 1; b < blocks; ++b)
      for (int64_t i = 0; i < block; ++i) sums[i] += sums[b * block + i];
    T* to_base = static_cast<T*>(base_grad.data_ptr());
    T* to_gain = static_cast<T*>(gain_grad.data_ptr());
    std::vector<double> of_shell(shells * channels);
    for (int64_t k = 0; k < modes.inside; ++k)
      for (int64_t c = 0; c < channels; ++c) of_shell[modes.mode[k].index * channels + c] += modes.mode[k].scale * sums[k * channels + c];
    for (int64_t i = 0; i < shells * channels; ++i) to_gain[i] = static_cast<T>(of_shell[i]);
    for (int64_t c = 0; c < channels; ++c) to_base[c] = static_cast<T>(sums[modes.inside * channels + c]);
  });
  return {std::move(base_grad), std::move(gain_grad)};
}

namespace {

template <class T> Profile<T> profile_of(const Tensor& base, const Tensor& gain) {
  return {static_cast<const T*>(base.data_ptr()), static_cast<const T*>(gain.data_ptr()), base.stride(0), gain.stride(0), gain.stride(1)};
}

template <class IO> const IO* data_of(const Tensor* t) { return t ? static_cast<const IO*>(t->data_ptr()) : nullptr; }

}  // namespace

void radial_filter_into(const Tensor& y, const Tensor& x, const Tensor& base, const Tensor& gain, int64_t radius_squared,
                        const BesideFilter& of) {
  if (x.numel() == 0) return check_profile(x, base, gain, shell_count(radius_squared));
  for_planes("radial_filter", x, radius_squared, Extent::disc,
             [&]<class T, class IO>(const RadialFilterKernels<T, IO>& kernel, const Modes<T>& modes, const Plan<T>& plan) {
    check_profile(x, base, gain, modes.shells);
    const Profile<T> profile = profile_of<T>(base, gain);
    plan.over(x, modes, !of.modes, true, [&](const Work<T>& work, int64_t image, int64_t begin, int64_t end) {
      const int64_t at = image * x.stride(0);
      Beside<T, IO> beside;
      if (of.a) beside.a = data_of<IO>(of.a) + at, beside.b = data_of<IO>(of.b) + at;
      if (of.modes) beside.modes = data_of<T>(of.modes) + image * modes.inside * x.size(1), beside.weight = data_of<IO>(of.weight);
      if (of.added) beside.added = static_cast<T*>(of.added->data_ptr()) + image * modes.inside * x.size(1);
      kernel.filter(work, modes, planes<const IO>(x, image), planes<IO>(y, image), profile, beside, begin, end);
    });
  });
}

int64_t mode_count(const Tensor& x, int64_t radius_squared) {
  return remembered<ModeTable<float>>(x.size(2), x.size(3), radius_squared, Extent::disc, int64_t{1})->modes.inside;
}

void mode_rows_into(const Tensor& rows, const Tensor& x, const Tensor* factor, const Tensor* base, const Tensor* gain, int64_t radius_squared) {
  const int64_t channels = x.size(1);
  for_planes("mode_rows", x, radius_squared, Extent::disc,
             [&]<class T, class IO>(const RadialFilterKernels<T, IO>& kernel, const Modes<T>& modes, const Plan<T>& plan) {
    T* out = static_cast<T*>(rows.data_ptr());
    const Profile<T> profile = base ? profile_of<T>(*base, *gain) : Profile<T>{};
    plan.over(x, modes, true, false, [&](const Work<T>& work, int64_t image, int64_t begin, int64_t end) {
      const IO* of = factor ? data_of<IO>(factor) + image * x.stride(0) : nullptr;
      kernel.mode_rows(work, modes, planes<const IO>(x, image), of, base ? &profile : nullptr, out + image * modes.inside * channels, begin, end);
    });
  });
}

}  // namespace spanet

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CPU, m) {
  m.impl("radial_filter", spanet::boxed<&spanet::radial_filter>);
  m.impl("mode_coefficients", spanet::boxed<&spanet::mode_coefficients>);
  m.impl("radial_filter_backward", spanet::boxed<&spanet::radial_filter_backward>);
}
