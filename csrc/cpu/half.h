// The 16-bit formats in memory, as bit patterns.
#pragma once

#include <cstdint>

namespace spanet {

struct Bf16 {
  uint16_t bits;
};
// bf16 that the processor itself rounds to (AVX512_BF16).
struct NativeBf16 : Bf16 {};
struct Half {
  uint16_t bits;
};

}  // namespace spanet
