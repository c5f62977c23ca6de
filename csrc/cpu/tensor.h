// Tensors as the host functions of this folder see them, and how PyTorch calls those functions.
// torch::stable::Tensor would count references and ask PyTorch for every size: half of the time of a call on a small tensor.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>

namespace spanet {

using torch::headeronly::ScalarType;

// Owns a handle; sizes and strides are read where they lie.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &dim_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle_, &sizes_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides_));
  }
  Tensor(Tensor&& other) noexcept
      : handle_(other.release()), dim_(other.dim_), sizes_(other.sizes_), strides_(other.strides_) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    dim_ = other.dim_, sizes_ = other.sizes_, strides_ = other.strides_;
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  // The same tensor once more.
  Tensor shared() const {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &handle));
    return Tensor(handle);
  }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t k) const { return sizes_[within(k)]; }
  int64_t stride(int64_t k) const { return strides_[within(k)]; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t k = 0; k < dim_; ++k) count *= sizes_[k];
    return count;
  }
  bool is_contiguous() const {
    bool contiguous;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_, &contiguous));
    return contiguous;
  }
  void* data_ptr() const {
    void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_, &data));
    return data;
  }
  // Undefined for a dtype that no kernel takes.
  ScalarType scalar_type() const {
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &dtype));
    if (dtype == aoti_torch_dtype_float32()) return ScalarType::Float;
    if (dtype == aoti_torch_dtype_bfloat16()) return ScalarType::BFloat16;
    if (dtype == aoti_torch_dtype_float16()) return ScalarType::Half;
    return dtype == aoti_torch_dtype_float64() ? ScalarType::Double : ScalarType::Undefined;
  }
  int64_t element_size() const {
    const ScalarType type = scalar_type();
    return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  }

 private:
  int64_t within(int64_t k) const {
    STD_TORCH_CHECK(k < dim_, "spanet_kernels: a tensor must have at least ", k + 1, " dimensions, got ", dim_);
    return k;
  }

  AtenTensorHandle handle_;
  int64_t dim_, *sizes_, *strides_;
};

// What is there, or nullptr.
inline const Tensor* pointer_to(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

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

// What PyTorch calls a dtype.
inline int32_t code_of(ScalarType type) {
  STD_TORCH_CHECK(type != ScalarType::Undefined, "spanet_kernels: tensors must be float64, float32, float16 or bfloat16");
  return type == ScalarType::Float      ? aoti_torch_dtype_float32()
         : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
         : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                                        : aoti_torch_dtype_float64();
}

// A new tensor, straight from the allocator, without the dispatcher.
template <size_t N> Tensor empty(const std::array<int64_t, N>& sizes, const std::array<int64_t, N>& strides, ScalarType type) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(N, sizes.data(), strides.data(), code_of(type), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor t(handle);
  const int64_t bytes = t.numel() * t.element_size();
  if (bytes >= fresh_bytes) expect_large_pages(t.data_ptr(), bytes);
  return t;
}

template <size_t N> Tensor empty(const std::array<int64_t, N>& sizes, ScalarType type) {
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (size_t k = N; k-- > 0; stride *= sizes[k]) strides[k] = stride;
  return empty(sizes, strides, type);
}

// A tensor of memory that stays the caller's.
template <size_t N> Tensor over(void* data, const std::array<int64_t, N>& sizes, const std::array<int64_t, N>& strides, ScalarType type) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(data, N, sizes.data(), strides.data(), 0, code_of(type),
                                                                   aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class A> A unboxed(StableIValue value) {
  namespace stable = torch::stable::detail;
  if constexpr (std::is_same_v<A, Tensor>) {
    return Tensor(stable::to<AtenTensorHandle>(value));
  } else if constexpr (std::is_same_v<A, std::optional<Tensor>>) {
    const auto handle = stable::to<std::optional<AtenTensorHandle>>(value);
    return handle ? std::make_optional<Tensor>(*handle) : std::nullopt;
  } else {
    return stable::to<A>(value);
  }
}

// The function as PyTorch calls it: boxed<&f>.
template <auto function> struct Boxed;
template <class... A, class R, R (*function)(A...)> struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t, uint64_t) {
    [&]<size_t... I>(std::index_sequence<I...>) {
      const std::tuple<std::remove_cvref_t<A>...> arguments{unboxed<std::remove_cvref_t<A>>(stack[I])...};
      const auto box = [](Tensor& result) { return torch::stable::detail::from(result.release()); };
      if constexpr (std::is_void_v<R>) {
        std::apply(function, arguments);
      } else if constexpr (std::is_same_v<R, Tensor>) {
        Tensor result = std::apply(function, arguments);
        stack[0] = box(result);
      } else {
        R results = std::apply(function, arguments);
        std::apply([&](auto&... result) { size_t k = 0; ((stack[k++] = box(result)), ...); }, results);
      }
    }(std::index_sequence_for<A...>{});
  }
};
template <auto function> constexpr auto boxed = &Boxed<function>::call;

}  // namespace spanet
