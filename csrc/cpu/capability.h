// Which of the compiled instruction sets this process uses: the best the processor has, or the one named by
// SPANET_KERNELS_CPU (plain, avx2, avx512, amx) where the processor has it.
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace spanet {

// amx: the kernels for avx512, and tiles for products in bf16
enum class Capability { plain, avx2, avx512, amx };

inline const char* name(Capability capability) {
  constexpr const char* names[] = {"plain", "avx2", "avx512", "amx"};
  return names[static_cast<int>(capability)];
}

// Whether the system lets this process use the tile registers: it saves them for those that ask, with every thread they start.
inline bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

inline Capability cpu_capability() {
  Capability best = Capability::plain;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = Capability::avx2;
  if (best == Capability::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Capability::avx512;
  if (best == Capability::avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
      __builtin_cpu_supports("amx-bf16") && may_use_tiles())
    best = Capability::amx;
#endif
  const char* wanted = std::getenv("SPANET_KERNELS_CPU");
  for (Capability lower : {Capability::plain, Capability::avx2, Capability::avx512})
    if (wanted && lower < best && std::strcmp(wanted, name(lower)) == 0) return lower;
  return best;
}

// Whether the processor multiplies bf16 numbers and adds them up in fp32 (AVX512_BF16).
inline bool cpu_has_bf16_dot() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return cpu_capability() >= Capability::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace spanet
