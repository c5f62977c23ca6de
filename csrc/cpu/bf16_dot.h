// Products of pairs of bf16 by AVX512_BF16. Its instructions stand as such: files that have AVX-512 are compiled for processors without them,
// too. Denormals are zeros to them. Included once by a file that is compiled per instruction set, like simd.h.
#pragma once

#include "cpu/simd.h"

#if SIMD_BYTES == 64
namespace spanet {
namespace SIMD_NAME {
namespace {

// sum + the products of both halves of every lane.
SIMD_INLINE Vec<float> dot_pairs(Vec<float> sum, Vec<float> a, Vec<float> b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// Rounded to bf16, the first in the lower half of every lane.
SIMD_INLINE Vec<float> join_pairs(Vec<float> first, Vec<float> second) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  Halves halves, zipped;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(first), "v"(second));
  for (int i = 0; i < 32; ++i) zipped[i] = uint16_t(i / 2 + i % 2 * 16);
  return (Vec<float>)__builtin_shuffle(halves, zipped);
}

}  // namespace
}  // namespace SIMD_NAME
}  // namespace spanet
#endif
