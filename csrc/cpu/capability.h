// Which of the compiled instruction sets this process uses: the best for the processor, or the one named by
// SPANET_KERNELS_CPU (plain, avx2, avx512, avx512_bf16, amx) where the processor has it.
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace spanet {

// avx512_bf16 and amx: the kernels for avx512, and for products in bf16 vdpbf16ps or tiles
enum class Capability { plain, avx2, avx512, avx512_bf16, amx };

inline const char* name(Capability capability) {
  constexpr const char* names[] = {"plain", "avx2", "avx512", "avx512_bf16", "amx"};
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

// Whether the processor rounds to bf16 and multiplies pairs of bf16 (AVX512_BF16).
inline bool cpu_has_bf16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

inline bool cpu_is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

inline Capability cpu_capability() {
  Capability has = Capability::plain, best = has;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) has = Capability::avx2;
  if (has == Capability::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    has = Capability::avx512;
  if (has == Capability::avx512 && cpu_has_bf16()) {
    const bool tiles = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
    has = tiles ? Capability::amx : Capability::avx512_bf16;
  }
  // vdpbf16ps multiplies twice as much as an fp32 instruction; Intel's processors start a quarter as many of it (measured)
  best = has == Capability::avx512_bf16 && cpu_is_intel() ? Capability::avx512 : has;
#endif
  const char* wanted = std::getenv("SPANET_KERNELS_CPU");
  for (Capability lower : {Capability::plain, Capability::avx2, Capability::avx512, Capability::avx512_bf16})
    if (wanted && lower <= has && std::strcmp(wanted, name(lower)) == 0) return lower;
  return best;
}

}  // namespace spanet
