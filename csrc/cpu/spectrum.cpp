// The filter by real FFTs, which are PyTorch's: rows are transformed, their columns that reach into the disc brought side by side and
// transformed, too; all others pass with the gain of what is outside. A few planes at a time, whose copies stay in the cache.
// What is done between the transforms is in spectrum_kernel.cpp, compiled once per instruction set.

#include "cpu/spectrum.h"

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/remembered.h"
#include "cpu/spectrum_kernel.h"
#include "modes.h"

namespace spanet {
namespace {

constexpr Compiled<SpectrumKernels> compiled = SPANET_COMPILED(spectrum_kernels);

// Work for a thread to be worth its start: this many elements.
constexpr int64_t grain = 32768;

// So many bytes of planes are transformed at a time: with their spectra they stay in the second-level caches and the last one's share.
constexpr int64_t part_bytes = int64_t{9} << 18;

struct BinsTable {
  std::vector<int32_t> shell;
  Bins bins;

  BinsTable(int64_t h, int64_t w, int64_t radius_squared) {
    const int64_t columns = std::min(integer_root(radius_squared), w / 2) + 1;
    const std::vector<int32_t> shell_of = shell_table(radius_squared);
    const int32_t shells = *std::max_element(shell_of.begin(), shell_of.end()) + 1;
    for (int64_t v = 0; v < columns; ++v)
      for (int64_t i = 0; i < h; ++i) {
        const int64_t u = std::min(i, h - i), squared = u * u + v * v;
        shell.push_back(squared <= radius_squared ? shell_of[squared] : shells);
      }
    bins = {h, w, columns, shells, shell.data()};
  }
};

// Size of parts of about one size, of at most `most`, but at least 1, out of count.
int64_t even(int64_t count, int64_t most) {
  const int64_t parts = (count + std::max<int64_t>(most, 1) - 1) / std::max<int64_t>(most, 1);
  return (count + parts - 1) / parts;
}

// An operator of PyTorch's whose first argument it takes over.
template <class... A> Tensor call(const char* name, Tensor of, const A&... arguments) {
  namespace stable = torch::stable::detail;
  std::array<StableIValue, sizeof...(A) + 1> stack{stable::from(of.release()), stable::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return Tensor(stable::to<AtenTensorHandle>(stack[0]));
}

const std::vector<int64_t> last_axis{3};
constexpr int64_t not_scaled = 0;

// (images, channels, H, W) real to (images, channels, H, W / 2 + 1) complex.
Tensor transform_rows(Tensor planes) { return call("aten::_fft_r2c", std::move(planes), last_axis, not_scaled, true); }
// (images, channels, columns, H) of them, along the columns, which are adjacent: along strided axes of 500 and more elements MKL's complex
// transforms write beyond their memory (torch 2.14.1).
Tensor transform_columns(Tensor turned, bool forward) { return call("aten::_fft_c2c", std::move(turned), last_axis, not_scaled, forward); }
// The way back from transform_rows.
Tensor rows_of(Tensor spectra, int64_t w) { return call("aten::_fft_c2r", std::move(spectra), last_axis, not_scaled, w); }

// How many channels of x are read and written as vectors; fewer are faster one by one.
int64_t group_of(const Tensor& x) {
  return x.size(1) >= 8 && x.stride(1) == 1 && x.stride(3) != 1 && x.stride(2) == x.size(3) * x.stride(3) ? 16 : 1;
}

// The work on parts of x in T, IO.
template <class T, class IO> struct Spectra {
  const SpectrumKernels<T, IO>& kernel;
  const Bins& bins;

  int64_t pixels() const { return bins.h * bins.w; }

  // Calls f(first image, first channel, part) for all of x.
  template <class F> void over_parts(const Tensor& x, F f) const {
    const int64_t planes = part_bytes / (pixels() * static_cast<int64_t>(sizeof(T)));
    const int64_t images = even(x.size(0), planes / x.size(1)), channels = even(x.size(1), planes);
    for (int64_t c = 0; c < x.size(1); c += channels)
      for (int64_t image = 0; image < x.size(0); image += images)
        f(image, c, Part{std::min(images, x.size(0) - image), std::min(channels, x.size(1) - c), bins.h, bins.w});
  }

  // Planes of x: where they lie if they lie as they are wanted.
  Tensor planes_of(const Tensor& x, int64_t image, int64_t c, Part part) const {
    const std::array sizes{part.images, part.channels, bins.h, bins.w};
    const IO* from = static_cast<const IO*>(x.data_ptr()) + image * x.stride(0) + c * x.stride(1);
    if (std::is_same_v<T, IO> && x.is_contiguous())
      return over(const_cast<IO*>(from), sizes, std::array{part.channels * pixels(), pixels(), bins.w, int64_t{1}}, x.scalar_type());
    Tensor planes = empty(sizes, accumulator_dtype(x));
    part.group = group_of(x);
    parallel(grain, part.images * part.groups(), part.group * pixels(), [&](int64_t begin, int64_t end) {
      kernel.read(part, {from, x.stride(0), x.stride(1), x.stride(2), x.stride(3)}, static_cast<T*>(planes.data_ptr()), begin, end);
    });
    return planes;
  }

  void write(const Tensor& planes, const Tensor& y, int64_t image, int64_t c, Part part) const {
    const Planes<IO> all = spanet::planes<IO>(y, image);
    part.group = group_of(y);
    parallel(grain, part.images * part.groups(), part.group * pixels(), [&](int64_t begin, int64_t end) {
      kernel.write(part, static_cast<const T*>(planes.data_ptr()), {all.data + c * all.c, all.b, all.c, all.h, all.w}, begin, end);
    });
  }

  // (images, channels, columns, H): of transformed rows, those columns transformed that reach into the disc.
  Tensor columns_of(const Tensor& rows, const Part& part) const {
    const int64_t plane = bins.columns * bins.h;
    const std::array sizes{part.images, part.channels, bins.columns, bins.h}, strides{part.channels * plane, plane, bins.h, int64_t{1}};
    AtenTensorHandle handle;
    const int32_t dtype = sizeof(T) == 4 ? aoti_torch_dtype_complex64() : aoti_torch_dtype_complex128();
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(4, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
    Tensor turned(handle);
    parallel(grain, part.planes(), pixels(), [&](int64_t begin, int64_t end) {
      kernel.turn(bins, static_cast<const T*>(rows.data_ptr()), static_cast<T*>(turned.data_ptr()), begin, end);
    });
    return transform_columns(std::move(turned), true);
  }
};

// Calls f(spectra) for the operator on x.
template <class F> void for_spectra(const char* op, const Tensor& x, int64_t radius_squared, F f) {
  const auto table = remembered<BinsTable>(x.size(2), x.size(3), radius_squared);
  for_dtype(op, compiled, x.scalar_type(), x.size(2) * x.size(3), [&]<class T, class IO>(const SpectrumKernels<T, IO>& kernel) {
    f(Spectra<T, IO>{kernel, table->bins});
  });
}

// What to multiply the bins of every shell with, and after the last one all others: (C, S + 1), or (1, S + 1) for channels that are alike;
// then, for each of these channels, columns that are not transformed. What the transforms scale by is taken back here.
template <class T> struct Factors {
  std::vector<T> of_shell, rest;
  int64_t stride;  // of rest: 0 or 1

  Factors(const Bins& bins, const Tensor& base, const Tensor& gain) {
    const bool alike = base.stride(0) == 0 && (gain.stride(1) == 0 || bins.shells == 0);
    stride = alike ? 0 : 1;
    const auto at = [](const Tensor& t, int64_t offset) { return static_cast<double>(static_cast<const T*>(t.data_ptr())[offset]); };
    const double rows = static_cast<double>(bins.w), all = rows * static_cast<double>(bins.h);
    for (int64_t c = 0; c < (alike ? 1 : base.size(0)); ++c) {
      const double outside = at(base, c * base.stride(0));
      for (int64_t s = 0; s < bins.shells; ++s)
        of_shell.push_back(static_cast<T>((outside + at(gain, s * gain.stride(0) + c * gain.stride(1))) / all));
      of_shell.push_back(static_cast<T>(outside / all));
      rest.push_back(static_cast<T>(outside / rows));
    }
  }
};

// Whether n has no prime factor beyond 13.
bool is_smooth(int64_t n) {
  for (int64_t p : {2, 3, 5, 7, 11, 13})
    while (n % p == 0) n /= p;
  return n == 1;
}

}  // namespace

bool fft_pays(const Tensor& x, int64_t radius_squared, bool gradients) {
  const int64_t channels = x.size(1), h = x.size(2), w = x.size(3);
  if (h * w < 1024 || (channels >= 32 && h <= 64 && w <= 64)) return false;
  const double rows = static_cast<double>(axis_functions(h, radius_squared)), columns = static_cast<double>(axis_functions(w, radius_squared));
  if (rows <= 9 && columns <= 9) return false;
  double work = rows + 2 * rows * columns / static_cast<double>(h);  // multiply-adds per pixel
  if (channels < 16 && is_channels_last(x)) work *= 16.0 / static_cast<double>(channels);  // channels that do not fill a vector
  if (gradients) work *= 1.5;
  // Where the curves of cost against radius cross, measured on an EPYC and, with an earlier code, on a Xeon, both with AVX-512: MKL's FFTs
  // are slower on other processors than Intel's. An FFT takes three times as long where a size has a prime factor beyond 13.
  static const bool intel = cpu_is_intel();
  return work > (is_smooth(h) && is_smooth(w) ? (intel ? 120 : 160) : (intel ? 300 : 600));
}

Tensor filter_by_fft(const Tensor& x, const Tensor& base, const Tensor& gain, int64_t radius_squared) {
  std::optional<Tensor> y;
  for_spectra("radial_filter", x, radius_squared, [&]<class T, class IO>(const Spectra<T, IO>& spectra) {
    const Bins& bins = spectra.bins;
    check_profile(x, base, gain, bins.shells);
    const Factors<T> factors(bins, base, gain);
    spectra.over_parts(x, [&](int64_t image, int64_t c, const Part& part) {
      Tensor rows = transform_rows(spectra.planes_of(x, image, c, part));
      Tensor turned = spectra.columns_of(rows, part);
      const int64_t stride = factors.stride * (bins.shells + 1), columns = bins.columns * bins.h;
      parallel(grain, part.channels, part.images * columns, [&](int64_t begin, int64_t end) {
        spectra.kernel.scale(bins, part, factors.of_shell.data() + c * stride, stride, static_cast<T*>(turned.data_ptr()), begin, end);
      });
      turned = transform_columns(std::move(turned), false);
      parallel(grain, part.planes(), spectra.pixels(), [&](int64_t begin, int64_t end) {
        spectra.kernel.turn_back(bins, part, static_cast<const T*>(turned.data_ptr()), factors.rest.data() + c * factors.stride,
                                 factors.stride, static_cast<T*>(rows.data_ptr()), begin, end);
      });
      Tensor planes = rows_of(std::move(rows), bins.w);
      if (part.planes() == x.size(0) * x.size(1) && std::is_same_v<T, IO> && !is_channels_last(x)) {
        y.emplace(std::move(planes));
        return;
      }
      if (!y) y.emplace(empty_in_layout_of(x));
      spectra.write(planes, *y, image, c, part);
    });
  });
  return std::move(*y);
}

void profile_gradients_by_fft(const Tensor& grad, const Tensor& x, int64_t radius_squared, const Tensor& base_grad, const Tensor& gain_grad) {
  for_spectra("radial_filter_backward", x, radius_squared, [&]<class T, class IO>(const Spectra<T, IO>& spectra) {
    const Bins& bins = spectra.bins;
    const int64_t channels = x.size(1);
    std::vector<double> of_shell(channels * bins.shells), total(channels);
    spectra.over_parts(x, [&](int64_t image, int64_t c, const Part& part) {
      const auto start = [](const Tensor& t) { return static_cast<const T*>(t.data_ptr()); };
      const auto columns = [&](const Tensor& planes) { return spectra.columns_of(transform_rows(planes.shared()), part); };
      const Tensor p = spectra.planes_of(grad, image, c, part), q = spectra.planes_of(x, image, c, part);
      const Tensor a = columns(p), b = columns(q);
      parallel(grain, part.channels, part.images * spectra.pixels(), [&](int64_t begin, int64_t end) {
        spectra.kernel.products(bins, part, start(a), start(b), start(p), start(q), of_shell.data() + c * bins.shells, total.data() + c, begin,
                                end);
      });
    });
    T *to_base = static_cast<T*>(base_grad.data_ptr()), *to_gain = static_cast<T*>(gain_grad.data_ptr());
    for (int64_t c = 0; c < channels; ++c) {
      to_base[c] = static_cast<T>(total[c]);
      for (int64_t s = 0; s < bins.shells; ++s)
        to_gain[s * channels + c] = static_cast<T>(of_shell[c * bins.shells + s] / static_cast<double>(spectra.pixels()));
    }
  });
}

}  // namespace spanet
