// What the host functions of this folder share: the choice of kernels, threads, and tensors in and out.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <vector>

#include "cpu/capability.h"
#include "cpu/radial_filter_kernel.h"

namespace spanet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels of an operator for every instruction set; all the same where there is one.
template <template <class, class> class Kernels> struct Compiled {
  const KernelSet<Kernels>&plain, &avx2, &avx512;
};

#if defined(__x86_64__)
#define SPANET_COMPILED(NAME) {plain::NAME, avx2::NAME, avx512::NAME}
#else
#define SPANET_COMPILED(NAME) {plain::NAME, plain::NAME, plain::NAME}
#endif

// The kernels of the best instruction set; the one with vectors half as long if half a vector holds all lanes, but not for
// 16-bit elements, of which AVX2 cannot load a part of a vector.
template <template <class, class> class Kernels, class T, class IO>
const Kernels<T, IO>& pick(const Compiled<Kernels>& compiled, Kernels<T, IO> KernelSet<Kernels>::*dtype, int64_t lanes) {
  static const Capability capability = cpu_capability();
  const Kernels<T, IO>& avx2 = compiled.avx2.*dtype;
  if (capability == Capability::avx512 && (lanes > avx2.lanes || sizeof(IO) == 2)) return compiled.avx512.*dtype;
  return capability == Capability::plain ? compiled.plain.*dtype : avx2;
}

// Calls f(kernels) with the kernels for the dtype and so many adjacent elements to work on.
template <template <class, class> class Kernels, class F>
void for_dtype(const char* op, const Compiled<Kernels>& compiled, ScalarType dtype, int64_t lanes, F f) {
  using Set = KernelSet<Kernels>;
  static const bool has_native = cpu_has_bf16_dot();
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
  torch::stable::parallel_for(0, units, (grain + elements - 1) / elements, f);
}

template <class IO> Planes<IO> planes(const Tensor& t) {
  return {static_cast<IO*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline bool is_channels_last(const Tensor& x) { return !x.is_contiguous() && x.stride(1) == 1; }

// Of parameters, coefficients and gradients of parameters.
inline ScalarType accumulator_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_grad(const char* op, const Tensor& grad, const Tensor& x) {
  bool same = grad.dim() == 4 && grad.scalar_type() == x.scalar_type();
  for (int k = 0; same && k < 4; ++k) same = grad.size(k) == x.size(k);
  STD_TORCH_CHECK(same, op, ": grad must have the shape and dtype of x");
}

// Outputs of this size malloc maps afresh for every call (with glibc).
constexpr int64_t fresh_bytes = int64_t{32} << 20;

// Memory that is not there yet comes in pages of 2 MiB where the system gives them on request: one fault in place of 512.
inline void expect_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = 4096, first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// A new tensor, straight from the allocator: `torch::stable::empty` goes through the dispatcher, which costs as much again.
inline Tensor empty(std::array<int64_t, 4> sizes, int32_t dtype, bool channels_last = false) {
  const auto [b, c, h, w] = sizes;
  const std::array<int64_t, 4> contiguous{c * h * w, h * w, w, 1}, last{h * w * c, 1, w * c, c};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), (channels_last ? last : contiguous).data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor t(handle);
  const int64_t bytes = b * c * h * w * t.element_size();
  if (bytes >= fresh_bytes) expect_large_pages(t.data_ptr(), bytes);
  return t;
}

inline Tensor empty_in_layout_of(const Tensor& x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty({x.size(0), x.size(1), x.size(2), x.size(3)}, dtype, is_channels_last(x));
}

// For a_h x a_w coefficients of every plane of x.
inline Tensor empty_coefficients(const Tensor& x, int64_t a_h, int64_t a_w) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  return empty({x.size(0), x.size(1), a_h, a_w}, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

// For the gradient of a parameter.
inline Tensor zeros(const Tensor& x, const std::vector<int64_t>& sizes) {
  Tensor t = torch::stable::empty(sizes, accumulator_dtype(x), std::nullopt, x.device());
  return torch::stable::zero_(t);
}

}  // namespace spanet
