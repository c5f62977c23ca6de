// The 16-bit formats in memory, as bit patterns.
#pragma once

#include <cstdint>

namespace spanet {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace spanet
