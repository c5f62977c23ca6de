// Working memory of a thread, and runs of elements on their way from memory to T and back.
// Included once by a file that is compiled per instruction set, like simd.h.
#pragma once

#include "cpu/tiles.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

// Parts of the thread's working memory, handed out one after the other, each on a cache line of its own.
template <class T> struct Scratch {
  explicit Scratch(int64_t elements) : next(static_cast<T*>(thread_scratch(elements * sizeof(T)))) {}
  T* take(int64_t elements) {
    T* part = next;
    next += line_up(elements);
    return part;
  }
  T* zeros(int64_t elements) {
    T* part = take(elements);
    for (int64_t i = 0; i < line_up(elements); ++i) part[i] = T(0);
    return part;
  }
  T* next;
};

// What the filter's kernels read elements as. bf16 is bf16 whichever way it is rounded; what is rare, fp16 and with plain vectors every
// 16-bit element, is widened on the way in and narrowed on the way out, so that no kernel is compiled for it.
template <class T, class IO> struct ReadAs {
  using Type = T;
};
#if SIMD_BYTES >= 32
template <> struct ReadAs<float, Bf16> {
  using Type = Bf16;
};
template <> struct ReadAs<float, NativeBf16> {
  using Type = Bf16;
};
#endif
template <class T, class IO> using Read = typename ReadAs<T, IO>::Type;
template <class T, class IO> constexpr bool widened = sizeof(Read<T, IO>) != sizeof(IO);

template <class T, class IO> Planes<const Read<T, IO>> as_read(Planes<const IO> p) { return {p.data, p.b, p.c, p.h, p.w}; }

// n elements of memory to T.
template <class T, class IO> void read_run(const IO* from, int64_t n, T* to) {
  for_lanes<T, 4>(n, [&](auto nv, int64_t l, int64_t last) {
    const Step<nv(), T> step{last, false};
    UNROLL
    for (int v = 0; v < step.vectors; ++v) step.write(to + l + step.at(v), step.read(from + l + step.at(v)), 0);
  });
}

// n elements of scratch, which has room for a vector more, to memory in whole aligned vectors, past the caches if `stream`.
template <class T, class IO> void write_run(const T* from, IO* to, int64_t n, bool stream) {
  constexpr int64_t vl = lanes_of<T>, line = vl * vectors_of_line<T, IO>;
  const auto write_part = [&](int64_t i, int64_t end) {
    for (; i < end; i += vl) store_part<T>(to + i, load<T>(from + i), end - i < vl ? end - i : vl);
  };
  const int64_t ahead = (SIMD_BYTES - reinterpret_cast<uintptr_t>(to) % SIMD_BYTES) % SIMD_BYTES / sizeof(IO);
  int64_t i = ahead < n ? ahead : n;
  write_part(0, i);
  for (; i + line <= n; i += line) store_line<T>(from + i, to + i, stream);
  write_part(i, n);
}

// f(first element, elements, first lane) for squares of a vector by a vector that cover n elements of each of `lanes` planes; the last of
// several is moved back to end with them.
template <class T, class F> SIMD_INLINE void over_squares(int64_t n, int64_t lanes, F f) {
  constexpr int64_t vl = lanes_of<T>;
  for (int64_t i = 0; i < n; i += vl)
    for (int64_t l = 0; l < lanes; l += vl)
      f(n < vl || i + vl <= n ? i : n - vl, n < vl ? n : vl, l + vl <= lanes ? l : lanes - vl);
}

// n elements of each of `lanes` planes, a vector of them at least and `apart` elements from one to the next, to T side by side.
template <class T, class IO> void gather_lanes(const IO* from, int64_t apart, int64_t lanes, int64_t n, T* to) {
  constexpr int64_t vl = lanes_of<T>;
  over_squares<T>(n, lanes, [&](int64_t first, int64_t elements, int64_t l) {
    Vec<T> square[vl];
    _Pragma("GCC unroll 16")
    for (int64_t k = 0; k < vl; ++k) {
      const IO* plane = from + (l + k) * apart + first;
      square[k] = elements == vl ? load<T>(plane) : load_part<T>(plane, elements);
    }
    transpose<T>(square);
    for (int64_t k = 0; k < elements; ++k) store<T>(to + (first + k) * lanes + l, square[k]);
  });
}

// The way back.
template <class T, class IO> void scatter_lanes(const T* from, int64_t lanes, int64_t n, IO* to, int64_t apart) {
  constexpr int64_t vl = lanes_of<T>;
  over_squares<T>(n, lanes, [&](int64_t first, int64_t elements, int64_t l) {
    Vec<T> square[vl];
    _Pragma("GCC unroll 16")
    for (int64_t k = 0; k < vl; ++k) square[k] = k < elements ? load<T>(from + (first + k) * lanes + l) : Vec<T>{};
    transpose<T>(square);
    for (int64_t k = 0; k < vl; ++k) {
      IO* plane = to + (l + k) * apart + first;
      if (elements == vl) store<T>(plane, square[k]);
      else store_part<T>(plane, square[k], elements);
    }
  });
}

// total[l] += sum over h x w places of <a, b>, lane by lane; partial sums in T, totals in fp64.
template <class T, class X>
void add_dots(const X* a, int64_t a_h, int64_t a_w, const X* b, int64_t b_h, int64_t b_w, int64_t h, int64_t w, int64_t lanes, T* partial,
              double* total) {
  for_lanes<T, 2>(lanes, [&](auto nv, int64_t l, int64_t last) {
    const Step<nv(), T> step{last, false};
    Vec<T> sum[step.vectors] = {};
    for (int64_t i = 0; i < h; ++i)
      for (int64_t j = 0; j < w; ++j)
        UNROLL
        for (int v = 0; v < step.vectors; ++v) {
          const int64_t at = l + step.at(v);
          sum[v] += step.read(a + i * a_h + j * a_w + at) * step.read(b + i * b_h + j * b_w + at);
        }
    UNROLL
    for (int v = 0; v < step.vectors; ++v) step.write(partial + l + step.at(v), sum[v], 0);
  });
  for (int64_t l = 0; l < lanes; ++l) total[l] += partial[l];
}

}  // namespace
}  // namespace SIMD_NAME
}  // namespace spanet
