// What the host functions of this folder share: the choice of kernels, threads, and tensors in and out.
#pragma once

#include "cpu/capability.h"
#include "cpu/radial_filter_kernel.h"
#include "cpu/tensor.h"

namespace spanet {

// The kernels of an operator for every instruction set; all the same where there is one.
template <template <class, class> class Kernels> struct Compiled {
  const KernelSet<Kernels>&plain, &avx2, &avx512;
};

#if defined(__x86_64__)
#define SPANET_COMPILED(NAME) {plain::NAME, avx2::NAME, avx512::NAME}
#define SPANET_BEST(NAME) best(plain::NAME, avx2::NAME, avx512::NAME)
#else
#define SPANET_COMPILED(NAME) {plain::NAME, plain::NAME, plain::NAME}
#define SPANET_BEST(NAME) plain::NAME
#endif

// The kernels of the best instruction set; the one with vectors half as long if half a vector holds all lanes, but not for
// 16-bit elements, of which AVX2 cannot load a part of a vector.
template <template <class, class> class Kernels, class T, class IO>
const Kernels<T, IO>& pick(const Compiled<Kernels>& compiled, Kernels<T, IO> KernelSet<Kernels>::*dtype, int64_t lanes) {
  static const Capability capability = cpu_capability();
  const Kernels<T, IO>& avx2 = compiled.avx2.*dtype;
  if (capability >= Capability::avx512 && (lanes > avx2.lanes || sizeof(IO) == 2)) return compiled.avx512.*dtype;
  return capability == Capability::plain ? compiled.plain.*dtype : avx2;
}

// Those of the best instruction set, of kernels that have none for every dtype.
template <class Kernels> const Kernels& best(const Kernels& plain, const Kernels& avx2, const Kernels& avx512) {
  static const Capability capability = cpu_capability();
  return capability >= Capability::avx512 ? avx512 : capability == Capability::avx2 ? avx2 : plain;
}

// Calls f(kernels) with the kernels for the dtype and so many adjacent elements to work on.
template <template <class, class> class Kernels, class F>
void for_dtype(const char* op, const Compiled<Kernels>& compiled, ScalarType dtype, int64_t lanes, F f) {
  using Set = KernelSet<Kernels>;
  static const bool has_native = cpu_capability() >= Capability::avx512 && cpu_has_bf16();
  const auto& native = (has_native ? compiled.avx512 : compiled.plain).native_bf16;
  if (dtype == ScalarType::Float) f(pick(compiled, &Set::f32, lanes));
  else if (dtype == ScalarType::BFloat16 && native.lanes) f(native);
  else if (dtype == ScalarType::BFloat16) f(pick(compiled, &Set::bf16, lanes));
  else if (dtype == ScalarType::Half) f(pick(compiled, &Set::f16, lanes));
  else if (dtype == ScalarType::Double) f(pick(compiled, &Set::f64, lanes));
  else STD_TORCH_CHECK(false, op, ": x must be float64, float32, float16 or bfloat16");
}

// Calls f(begin, end) for ranges of units of so many elements; a thread gets `grain` elements at least.
template <class F> void parallel(int64_t grain, int64_t units, int64_t elements, const F& f) {
  if (units * elements <= grain) return f(int64_t{0}, units);
  const auto range = [](int64_t begin, int64_t end, void* f) { (*static_cast<const F*>(f))(begin, end); };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, units, (grain + elements - 1) / elements, range, const_cast<F*>(&f)));
}

// Those of an image and the ones behind it.
template <class IO> Planes<IO> planes(const Tensor& t, int64_t image = 0) {
  return {static_cast<IO*>(t.data_ptr()) + image * t.stride(0), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline bool is_channels_last(const Tensor& x) { return !x.is_contiguous() && x.stride(1) == 1; }

// Whether the elements stand one after the other, in the given layout; what stride an axis of length 1 has is of no account.
inline bool is_dense(const Tensor& x, bool channels_last) {
  if (!channels_last) return x.is_contiguous();
  int64_t stride = 1;
  for (int axis : {1, 3, 2, 0}) {
    if (x.size(axis) != 1 && x.stride(axis) != stride) return false;
    stride *= x.size(axis);
  }
  return true;
}

// As image_moments returns them for x.
inline void check_moments(const char* op, const Tensor& moments, const Tensor& x) {
  STD_TORCH_CHECK(moments.dim() == 2 && moments.size(0) == x.size(0) && moments.size(1) == 2 && moments.is_contiguous() &&
                      moments.scalar_type() == ScalarType::Float,
                  op, ": moments must be contiguous float32 of shape (B, 2)");
}

// Of parameters, coefficients and gradients of parameters.
inline ScalarType accumulator_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_like(const char* op, const char* name, const Tensor& given, const Tensor& x) {
  bool same = given.dim() == 4 && given.scalar_type() == x.scalar_type();
  for (int k = 0; same && k < 4; ++k) same = given.size(k) == x.size(k);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape and dtype of x");
}

// base and gain as radial_filter takes them for x.
inline void check_profile(const Tensor& x, const Tensor& base, const Tensor& gain, int64_t shells) {
  const int64_t channels = x.size(1);
  const bool shapes = base.dim() == 1 && base.size(0) == channels && gain.dim() == 2 && gain.size(0) == shells && gain.size(1) == channels;
  const ScalarType wide = accumulator_dtype(x);
  STD_TORCH_CHECK(shapes && base.scalar_type() == wide && gain.scalar_type() == wide,
                  "radial_filter: base must have shape (C,) and gain (S, C), in the dtype of the accumulators");
}

// So many images of the shape and dtype of those of x, channels_last.
inline Tensor empty_channels_last(const Tensor& x, int64_t images) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  return empty(std::array{images, c, h, w}, std::array{h * w * c, int64_t{1}, w * c, c}, x.scalar_type());
}

inline Tensor empty_in_layout_of(const Tensor& x) {
  if (is_channels_last(x)) return empty_channels_last(x, x.size(0));
  return empty(std::array{x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
}

// For a_h x a_w coefficients of every plane of x.
inline Tensor empty_coefficients(const Tensor& x, int64_t a_h, int64_t a_w) {
  return empty(std::array{x.size(0), x.size(1), a_h, a_w}, accumulator_dtype(x));
}

// For the gradient of a parameter of x.
template <size_t N> Tensor zeros(const Tensor& x, const int64_t (&sizes)[N]) {
  Tensor t = empty(std::to_array(sizes), accumulator_dtype(x));
  std::memset(t.data_ptr(), 0, t.numel() * t.element_size());
  return t;
}

}  // namespace spanet
