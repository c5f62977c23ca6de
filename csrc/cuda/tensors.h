// Tensors, devices and streams of torch, for the operators in this folder.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "operators.h"

namespace spanet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxExtent = 1 << 30;

// The shim of libtorch_cuda, looked up where torch has loaded it: this library links against the CPU half of torch alone, so that
// it builds with any torch.
inline void* current_stream(const char* op, int32_t device) {
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<decltype(&aoti_torch_get_current_cuda_stream)>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get != nullptr, op, ": libtorch_cuda.so is not loaded, or it has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

struct Call : Device {  // device, stream and workspaces of one call
  torch::stable::accelerator::DeviceGuard guard;
  Tensor like;
  std::vector<Tensor> workspaces;

  Call(const char* op, const Tensor& x) : guard(x.get_device_index()), like(x) {
    stream = current_stream(op, x.get_device_index());
    const cudaError_t error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device_index());
    STD_TORCH_CHECK(error == cudaSuccess, op, ": cannot read the shared memory limit of the device: ", cudaGetErrorString(error));
  }

  void* allocate(int64_t bytes) override {
    workspaces.push_back(torch::stable::new_empty(like, {bytes}, ScalarType::Byte));
    return workspaces.back().mutable_data_ptr();
  }
};

inline Shape shape_of(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": x must have 4 dimensions, got ", x.dim());
  for (int k = 0; k < 4; ++k) STD_TORCH_CHECK(x.size(k) <= kMaxExtent, op, ": x must have extents up to ", kMaxExtent, ", got ", x.size(k));
  return {x.size(0), x.size(1), x.size(2), x.size(3), !x.is_contiguous() && x.stride(1) == 1};
}

inline View view_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), Move::kElements}; }

inline ScalarType wide_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

// A new tensor like x in the layout that operators give their results.
inline Tensor result_like(const Tensor& x, const Shape& shape, ScalarType type) {
  const auto format = shape.channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA, x.get_device_index());
  return torch::stable::empty(x.sizes(), type, std::nullopt, device, std::nullopt, format);
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  bool same = t.dim() == 4 && t.scalar_type() == x.scalar_type();
  for (int k = 0; same && k < 4; ++k) same = t.size(k) == x.size(k);
  STD_TORCH_CHECK(same, op, ": ", name, " does not match x");
}

inline bool is_16_bit(ScalarType type) { return type == ScalarType::Half || type == ScalarType::BFloat16; }

template <typename Run>
void dispatch(const char* op, ScalarType type, Run run) {
  switch (type) {
    case ScalarType::Double: return run(double{});
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(__half{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, op, ": x must be float64, float32, float16 or bfloat16");
  }
}

}  // namespace spanet
