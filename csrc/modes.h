// The separable mode plan shared by the CPU and CUDA kernels (derivation: spanet_kernels/modes.py).
//
// Along an axis of length n the functions a = 0, 1, 2, ... are  1, cos 1, sin 1, cos 2, sin 2, ...
// of frequency f(a) = (a + 1) / 2; those with f^2 <= radius_squared count. For even n the last
// one, f = n/2, has a cosine only, so there are never more than n.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#if defined(__CUDACC__)
#define MODES_FN __host__ __device__ inline
#else
#define MODES_FN inline
#endif

namespace spanet {

inline int64_t integer_root(int64_t square) {
  int64_t root = static_cast<int64_t>(std::sqrt(static_cast<double>(square)));
  while (root * root > square) --root;
  while ((root + 1) * (root + 1) <= square) ++root;
  return root;
}

// A: number of functions of an axis.
inline int64_t axis_functions(int64_t n, int64_t radius_squared) {
  const int64_t all = 2 * integer_root(radius_squared) + 1;
  return all < n ? all : n;
}

// shell_of[d2] for d2 in [0, radius_squared]: index of the shell with that squared distance, -1 if there is none.
inline std::vector<int32_t> shell_table(int64_t radius_squared) {
  std::vector<int32_t> table(radius_squared + 1, -1);
  const int64_t top = integer_root(radius_squared);
  for (int64_t u = 0; u <= top; ++u)
    for (int64_t v = u; u * u + v * v <= radius_squared; ++v) table[u * u + v * v] = 0;
  int32_t count = 0;
  for (int32_t& shell : table)
    if (shell == 0) shell = count++;
  return table;
}

// S: how many shells there are.
inline int64_t shell_count(int64_t radius_squared) {
  int64_t count = 0;
  for (int32_t shell : shell_table(radius_squared)) count += shell >= 0;
  return count;
}

}  // namespace spanet
