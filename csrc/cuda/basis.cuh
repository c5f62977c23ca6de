// The Fourier basis in shared memory, computed by the block that uses it: no table is copied to the device, so that a call
// can be captured in a graph. Functions come in blocks of FB frequencies: slot 0 is the constant (in block 0 only), slots
// 2 f + 1 and 2 f + 2 are cosine and sine of frequency block FB + f + 1.
#pragma once

#include "tile.cuh"

namespace spanet {

template <int FB> constexpr int kFunctions = 2 * FB + 1;               // DC slot, then cos and sin of FB frequencies
template <int FB> constexpr int kRow = (kFunctions<FB> + 3) / 4 * 4;   // row of Z in shared memory, whole vectors

// table[i] = cos, sin of frequencies block FB + 1 .. block FB + FB at position first + i of an axis of length n.
template <int FB, typename W>
__device__ void fill_table(Pack<W, 2 * FB>* table, int first, int count, int n, int block) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    // frequency x position modulo n in integers: the angle is exact for any length
    unsigned turn = block == 0 ? 0 : static_cast<unsigned>(static_cast<int64_t>(block * FB) * (first + i) % n);
#pragma unroll
    for (int f = 0; f < FB; ++f) {
      turn += first + i;
      if (turn >= static_cast<unsigned>(n)) turn -= n;
      const int nearest = 2 * turn > static_cast<unsigned>(n) ? static_cast<int>(turn) - n : static_cast<int>(turn);  // |angle| <= pi rounds best
      cos_sin_pi(static_cast<W>(2 * nearest) / static_cast<W>(n), &table[i].v[2 * f], &table[i].v[2 * f + 1]);
    }
  }
}

__device__ inline int slot_frequency(int block, int frequencies, int slot) { return slot == 0 ? 0 : block * frequencies + (slot + 1) / 2; }

}  // namespace spanet
