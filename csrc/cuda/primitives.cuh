// What the kernels need from CUDA beyond the language; tests/cuda_on_host/shim.h gives the same names to a host compiler.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace spanet {

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(double x, double& out) { out = x; }
__device__ inline void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// Two elements in a word.
__device__ inline void widen_pair(uint32_t word, const __nv_bfloat16*, float* out) {
  out[0] = __uint_as_float(word << 16);
  out[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ inline void widen_pair(uint32_t word, const __half*, float* out) {
  const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
  out[0] = pair.x;
  out[1] = pair.y;
}
__device__ inline uint32_t narrow_pair(const float* in, const __nv_bfloat16*) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t narrow_pair(const float* in, const __half*) {
  const __half2 pair = __floats2half2_rn(in[0], in[1]);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline void cos_sin_pi(float x, float* cosine, float* sine) { sincospif(x, sine, cosine); }
__device__ inline void cos_sin_pi(double x, double* cosine, double* sine) { sincospi(x, sine, cosine); }

// The compiler keeps the register, and nothing that it has derived from its value before.
__device__ inline void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }
__device__ inline void keep(int& value) { asm volatile("" : "+r"(value)); }
__device__ inline void keep(char*& value) { asm volatile("" : "+l"(value)); }
__device__ inline void keep(float& value) { asm volatile("" : "+f"(value)); }
__device__ inline void keep(__half& value) { asm volatile("" : "+h"(*reinterpret_cast<uint16_t*>(&value))); }
__device__ inline void keep(__nv_bfloat16& value) { asm volatile("" : "+h"(*reinterpret_cast<uint16_t*>(&value))); }

__device__ inline void sync_warp() { __syncwarp(); }
template <typename W> __device__ W exchange(W value, int lane_mask) { return __shfl_xor_sync(0xffffffffu, value, lane_mask); }

// 16 bytes, both addresses aligned.
__device__ inline void copy_word(void* to, const void* from) { *static_cast<uint4*>(to) = *static_cast<const uint4*>(from); }

__device__ inline void copy_word_async(void* to_shared, const void* from_global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from_global) : "memory");
}
__device__ inline void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Copies in groups: those started since the last commit; waits for all but the last N groups.
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ void copies_wait_but() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, void* stream, Arguments... arguments) {
  constexpr int kWithoutAsking = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kWithoutAsking) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string("spanet_kernels: CUDA launch failed: ") + cudaGetErrorString(error));
}

}  // namespace spanet
