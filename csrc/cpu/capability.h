// Which of the compiled instruction sets this process uses: the best the processor has, or the one named by
// SPANET_KERNELS_CPU (plain, avx2, avx512) where the processor has it.
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace spanet {

enum class Capability { plain, avx2, avx512 };

inline const char* name(Capability capability) {
  return capability == Capability::avx512 ? "avx512" : capability == Capability::avx2 ? "avx2" : "plain";
}

inline Capability cpu_capability() {
  Capability best = Capability::plain;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = Capability::avx2;
  if (best == Capability::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Capability::avx512;
#endif
  const char* wanted = std::getenv("SPANET_KERNELS_CPU");
  for (Capability lower : {Capability::plain, Capability::avx2})
    if (wanted && lower < best && std::strcmp(wanted, name(lower)) == 0) return lower;
  return best;
}

// Whether the processor multiplies bf16 numbers and adds them up in fp32 (AVX512_BF16).
inline bool cpu_has_bf16_dot() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return cpu_capability() == Capability::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace spanet
