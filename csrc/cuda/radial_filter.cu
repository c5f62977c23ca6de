// Operators radial_filter and radial_filter_backward on NVIDIA GPUs: tensors in, launches out (see radial_filter.cuh).
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "radial_filter_plan.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace spanet;

constexpr int64_t kMaxExtent = 1 << 30;

// The shim of libtorch_cuda, looked up where torch has loaded it: this library links against the CPU half of torch alone, so that
// it builds with any torch.
void* current_stream(int32_t device) {
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<decltype(&aoti_torch_get_current_cuda_stream)>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get != nullptr, "radial_filter: libtorch_cuda.so is not loaded, or it has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

struct Call {  // device, stream and workspaces of one call
  torch::stable::accelerator::DeviceGuard guard;
  Tensor like;
  void* stream;
  std::vector<Tensor> workspaces;
  int shared_limit = 0;

  explicit Call(const Tensor& x) : guard(x.get_device_index()), like(x), stream(current_stream(x.get_device_index())) {
    const cudaError_t error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device_index());
    STD_TORCH_CHECK(error == cudaSuccess, "radial_filter: cannot read the shared memory limit of the device: ", cudaGetErrorString(error));
  }

  auto allocator() {
    return [this](int64_t bytes) {
      workspaces.push_back(torch::stable::new_empty(like, {bytes}, ScalarType::Byte));
      return workspaces.back().mutable_data_ptr();
    };
  }
};

Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "radial_filter: x must have 4 dimensions, got ", x.dim());
  for (int k = 0; k < 4; ++k) STD_TORCH_CHECK(x.size(k) <= kMaxExtent, "radial_filter: x must have extents up to ", kMaxExtent, ", got ", x.size(k));
  return {x.size(0), x.size(1), x.size(2), x.size(3), !x.is_contiguous() && x.stride(1) == 1};
}

View view_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), Move::kElements}; }

bool is_16_bit(ScalarType type) { return type == ScalarType::Half || type == ScalarType::BFloat16; }

template <typename Run>
void dispatch(ScalarType type, Run run) {
  switch (type) {
    case ScalarType::Double: return run(double{});
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(__half{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "radial_filter: x must be float64, float32, float16 or bfloat16");
  }
}

Tensor radial_filter_cuda(const Tensor& x, const Tensor& base, const Tensor& gain, int64_t radius_squared) {
  const Shape shape = shape_of(x);
  const ScalarType type = x.scalar_type(), wide = type == ScalarType::Double ? type : ScalarType::Float;
  STD_TORCH_CHECK(base.dim() == 1 && base.size(0) == shape.channels && base.scalar_type() == wide, "radial_filter: base does not match x");
  STD_TORCH_CHECK(gain.dim() == 2 && gain.size(1) == shape.channels && gain.scalar_type() == wide, "radial_filter: gain does not match x");
  const auto format = shape.channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA, x.get_device_index());
  const auto empty = [&](ScalarType dtype) { return torch::stable::empty(x.sizes(), dtype, std::nullopt, device, std::nullopt, format); };
  Tensor y = empty(type);
  if (x.numel() == 0) return y;
  // 16 bits beyond four frequencies are added up block by block, so in fp32
  if (is_16_bit(type) && integer_root(spectrum_limit(shape, radius_squared)) > 4) {
    Tensor wide_x = empty(wide);
    torch::stable::copy_(wide_x, x);
    torch::stable::copy_(y, radial_filter_cuda(wide_x, base, gain, radius_squared));
    return y;
  }
  Call call(x);
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    const Profile<Wide<T>> profile{static_cast<const Wide<T>*>(base.data_ptr()), static_cast<const Wide<T>*>(gain.data_ptr()), base.stride(0),
                                   gain.stride(0), gain.stride(1)};
    run_filter<T>(shape, view_of(x), view_of(y), profile, radius_squared, call.shared_limit, call.allocator(), call.stream);
  });
  return y;
}

std::tuple<Tensor, Tensor> radial_filter_backward_cuda(const Tensor& grad, const Tensor& x, int64_t radius_squared) {
  const Shape shape = shape_of(x);
  const ScalarType type = x.scalar_type(), wide = type == ScalarType::Double ? type : ScalarType::Float;
  STD_TORCH_CHECK(grad.dim() == 4 && grad.scalar_type() == type, "radial_filter_backward: grad does not match x");
  for (int k = 0; k < 4; ++k) STD_TORCH_CHECK(grad.size(k) == x.size(k), "radial_filter_backward: grad does not match x");
  const auto shells = shell_table(radius_squared);
  const int64_t count = 1 + *std::max_element(shells.begin(), shells.end());
  Tensor base_grad = torch::stable::new_zeros(x, {shape.channels}, wide), gain_grad = torch::stable::new_zeros(x, {count, shape.channels}, wide);
  if (x.numel() == 0) return {base_grad, gain_grad};
  Call call(x);
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    run_backward<T>(shape, view_of(grad), view_of(x), static_cast<Wide<T>*>(base_grad.data_ptr()), static_cast<Wide<T>*>(gain_grad.data_ptr()),
                    radius_squared, call.shared_limit, call.allocator(), call.stream);
  });
  return {base_grad, gain_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CUDA, m) {
  m.impl("radial_filter", TORCH_BOX(&radial_filter_cuda));
  m.impl("radial_filter_backward", TORCH_BOX(&radial_filter_backward_cuda));
}
