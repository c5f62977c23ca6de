// One vector type for every instruction set: SIMD_BYTES wide, spelled in GCC/Clang vector extensions.
//
// The file that includes this is compiled once per instruction set, each time with its own SIMD_NAME
// (a namespace) and SIMD_BYTES (64 with AVX-512, 32 with AVX2, 16 plain: SSE2, NEON or whatever the
// compiler makes of it). No standard container or algorithm may be used there: a shared inline
// function compiled for AVX-512 could be the copy that the linker keeps for all.
//
// T is the type of accumulators, float or double; IO is the type in memory: T itself, or Bf16 or Half
// (bit patterns) for float. load and store convert; both round to nearest even and keep NaN.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/half.h"

namespace spanet {
namespace SIMD_NAME {

template <class T> struct Simd;
template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(SIMD_BYTES)));
  typedef uint32_t U __attribute__((vector_size(SIMD_BYTES)));
  typedef uint16_t U16 __attribute__((vector_size(SIMD_BYTES / 2)));
  typedef int32_t I __attribute__((vector_size(SIMD_BYTES)));
};
template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(SIMD_BYTES)));
  typedef int64_t I __attribute__((vector_size(SIMD_BYTES)));
};
template <class T> using Vec = typename Simd<T>::V;
template <class T> using LaneIndex = typename Simd<T>::I;
template <class T> constexpr int64_t lanes_of = SIMD_BYTES / sizeof(T);

#define SIMD_INLINE static inline __attribute__((always_inline))
#define SIMD_MEMBER inline __attribute__((always_inline))

template <class V> SIMD_INLINE V load_raw(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

SIMD_INLINE float widen(float h) { return h; }
SIMD_INLINE double widen(double h) { return h; }
SIMD_INLINE float widen(Bf16 h) {
  const uint32_t bits = uint32_t{h.bits} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
SIMD_INLINE float widen(Half h) {
  // the exponent moves from bias 15 to 127 by one exact product; all ones stays all ones
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = uint32_t(h.bits & 0x7fff) << 13;
  float magnitude;
  std::memcpy(&magnitude, &rest, 4);
  magnitude *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &magnitude, 4);
  bits |= sign | (rest >= 0x0f800000 ? 0x7f800000 : 0);
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

SIMD_INLINE void narrow(float f, float* p) { *p = f; }
SIMD_INLINE void narrow(double f, double* p) { *p = f; }
SIMD_INLINE void narrow(float f, Bf16* p) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  p->bits = f != f ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
SIMD_INLINE void narrow(float f, Half* p) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest >= 0x477ff000) {  // rounds beyond the largest half: Inf, or NaN kept
    p->bits = uint16_t(sign | (rest > 0x7f800000 ? 0x7e00 : 0x7c00));
  } else if (rest < 0x38800000) {  // subnormal: adding 1/2 leaves the bits wanted at the bottom of the sum
    float magnitude;
    std::memcpy(&magnitude, &rest, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    p->bits = uint16_t(sign | (bits - 0x3f000000));
  } else {
    p->bits = uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
  }
}

template <class IO> constexpr bool is_bf16 = std::is_base_of_v<Bf16, IO>;

#if SIMD_BYTES == 64
// Half word l / 2 for the upper half of lane l / 2: a table, which no loop fills where it is used.
struct UpperHalves {
  alignas(64) uint16_t of[32];
  constexpr UpperHalves() : of() {
    for (int l = 0; l < 32; ++l) of[l] = uint16_t(l / 2);
  }
};
static constexpr UpperHalves upper_halves;
#endif

template <class T, class IO> SIMD_INLINE Vec<T> load(const IO* p) {
  if constexpr (std::is_same_v<IO, T>) {
    return load_raw<Vec<T>>(p);
  } else if constexpr (is_bf16<IO>) {
#if SIMD_BYTES == 64
    // each half word goes to the upper half of a lane, by one permutation
    const __m512i halves = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    return (Vec<T>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, load_raw<__m512i>(upper_halves.of), halves);
#elif SIMD_BYTES == 32
    return (Vec<T>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    using S = Simd<float>;
    const S::U wide = __builtin_convertvector(load_raw<S::U16>(p), S::U) << 16;
    return (Vec<T>)wide;
#endif
  } else {
#if SIMD_BYTES == 64
    return (Vec<T>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif SIMD_BYTES == 32
    return (Vec<T>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Vec<T> v;
    for (int64_t l = 0; l < lanes_of<T>; ++l) v[l] = widen(p[l]);
    return v;
#endif
  }
}

#if SIMD_BYTES == 32
// All ones in the first n elements of 4 or 8 bytes.
template <int bytes> SIMD_INLINE __m256i first_elements(int64_t n) {
  alignas(64) static constexpr int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256((const __m256i*)(ones + 8 - n * (bytes / 4)));
}
#endif

#if SIMD_BYTES == 32
// n <= 8 half words and zeros, from accesses of eight, four and two bytes that overlap; and the way back. Put together in registers: a
// load of what several stores have just written waits for all of them.
SIMD_INLINE __m128i first_halves(const uint16_t* p, int64_t n) {
  if (n >= 4) {
    const uint64_t last = load_raw<uint64_t>(p + n - 4);
    return _mm_set_epi64x(n == 4 ? 0 : last >> (8 - n) * 16, load_raw<uint64_t>(p));
  }
  const uint64_t two = n >= 2 ? load_raw<uint32_t>(p) : 0;
  return _mm_set_epi64x(0, n & 1 ? two | uint64_t{p[n - 1]} << (n - 1) * 16 : two);
}
SIMD_INLINE void store_first_halves(uint16_t* p, __m128i halves, int64_t n) {
  const uint64_t low = _mm_cvtsi128_si64(halves);
  if (n >= 4) {
    const uint64_t high = _mm_extract_epi64(halves, 1);
    const uint64_t last = n == 4 ? low : n == 8 ? high : low >> (n - 4) * 16 | high << (8 - n) * 16;
    std::memcpy(p, &low, 8);
    std::memcpy(p + n - 4, &last, 8);
    return;
  }
  if (n >= 2) std::memcpy(p, &low, 4);
  if (n & 1) p[n - 1] = uint16_t(low >> (n - 1) * 16);
}
#endif

// The first n lanes from memory, zeros in the others; nothing beyond them is touched.
template <class T, class IO> SIMD_INLINE Vec<T> load_part(const IO* p, int64_t n) {
#if SIMD_BYTES == 64
  if constexpr (sizeof(IO) == 8) return (Vec<T>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
  else if constexpr (sizeof(IO) == 4) return (Vec<T>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  const __m256i part = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
  return load<T>((const IO*)&part);
#else
#if SIMD_BYTES == 32
  if constexpr (sizeof(IO) == 8) return (Vec<T>)_mm256_maskload_pd(p, first_elements<8>(n));
  else if constexpr (sizeof(IO) == 4) return (Vec<T>)_mm256_maskload_ps(p, first_elements<4>(n));
  else {
    const __m128i part = first_halves((const uint16_t*)p, n);
    return load<T>((const IO*)&part);
  }
#endif
  IO part[lanes_of<T>] = {};
  for (int64_t l = 0; l < n; ++l) part[l] = p[l];
  return load<T>(static_cast<const IO*>(part));
#endif
}

// x, or the bound if x is beyond it; NaN stays NaN.
SIMD_INLINE Vec<float> at_most(Vec<float> x, float bound) {
  const Vec<float> all = Vec<float>{} + bound;
#if SIMD_BYTES == 64
  return (Vec<float>)_mm512_min_ps((__m512)all, (__m512)x);
#elif SIMD_BYTES == 32
  return (Vec<float>)_mm256_min_ps((__m256)all, (__m256)x);
#else
  return x > all ? all : x;
#endif
}
SIMD_INLINE Vec<float> at_least(Vec<float> x, float bound) {
  const Vec<float> all = Vec<float>{} + bound;
#if SIMD_BYTES == 64
  return (Vec<float>)_mm512_max_ps((__m512)all, (__m512)x);
#elif SIMD_BYTES == 32
  return (Vec<float>)_mm256_max_ps((__m256)all, (__m256)x);
#else
  return x < all ? all : x;
#endif
}

// fp32 rounded to nearest even in its upper half, to bf16; a NaN that arithmetic made is quiet, and cut off it stays one.
SIMD_INLINE Simd<float>::U bf16_bits(Vec<float> v) {
  using U = Simd<float>::U;
  const U bits = (U)v, up = (bits >> 16 & 1) + 0x7fff;
  return bits + (up & (U)(v == v));
}

#if SIMD_BYTES == 64
// The rounding instructions of AVX512_BF16 take denormals for zeros: where there are some, they do not serve.
SIMD_INLINE bool has_denormals(Vec<float> v) { return __builtin_expect(_mm512_fpclass_ps_mask((__m512)v, 0x20), 0); }
#endif

// The bit pattern of v as IO, ready to be stored.
template <class IO, class T> SIMD_INLINE auto narrow(Vec<T> v) {
  if constexpr (std::is_same_v<IO, T>) {
    return v;
  } else if constexpr (is_bf16<IO>) {
    [[maybe_unused]] Simd<float>::U16 halves;
#if SIMD_BYTES == 64
    if (std::is_same_v<IO, NativeBf16> && !has_denormals(v)) {
      asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(v));
      return halves;
    }
#endif
#if SIMD_BYTES == 32
    const __m256i bits = (__m256i)(bf16_bits(v) >> 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
#else
    halves = __builtin_convertvector(bf16_bits(v) >> 16, Simd<float>::U16);
    return halves;
#endif
  } else {
#if SIMD_BYTES == 64
    return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif SIMD_BYTES == 32
    return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    Simd<float>::U16 halves;
    for (int64_t l = 0; l < lanes_of<T>; ++l) {
      Half half;
      narrow(v[l], &half);
      halves[l] = half.bits;
    }
    return halves;
#endif
  }
}

template <class T, class IO> SIMD_INLINE void store(IO* p, Vec<T> v) {
  const auto bits = narrow<IO, T>(v);
  std::memcpy(p, &bits, sizeof bits);
}

// The first n lanes to memory; nothing beyond them is touched.
template <class T, class IO> SIMD_INLINE void store_part(IO* p, Vec<T> v, int64_t n) {
#if SIMD_BYTES == 64
  if constexpr (sizeof(IO) == 8) _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
  else if constexpr (sizeof(IO) == 4) _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  else _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)narrow<IO, T>(v));
#else
#if SIMD_BYTES == 32
  if constexpr (sizeof(IO) == 8) return _mm256_maskstore_pd(p, first_elements<8>(n), (__m256d)v);
  else if constexpr (sizeof(IO) == 4) return _mm256_maskstore_ps(p, first_elements<4>(n), (__m256)v);
  else return store_first_halves((uint16_t*)p, (__m128i)narrow<IO, T>(v), n);
#endif
  IO part[lanes_of<T>];
  store<T>(part, v);
  for (int64_t l = 0; l < n; ++l) p[l] = part[l];
#endif
}

// Whether a vector is long enough to have a plane in either half.
constexpr bool pairs_planes = SIMD_BYTES == 64;

#if SIMD_BYTES == 64
// A vector whose lower half is load_part(p, n) and its upper half load_part(q, n), and the way back.
template <class T, class IO> SIMD_INLINE Vec<T> load_halves(const IO* p, const IO* q, int64_t n) {
  constexpr int64_t half = lanes_of<T> / 2;
  const uint32_t low = (1u << n) - 1, high = low << half;
  if constexpr (sizeof(IO) == 8)
    return (Vec<T>)_mm512_mask_loadu_pd(_mm512_maskz_loadu_pd(__mmask8(low), p), __mmask8(high), q - half);
  else if constexpr (sizeof(IO) == 4)
    return (Vec<T>)_mm512_mask_loadu_ps(_mm512_maskz_loadu_ps(__mmask16(low), p), __mmask16(high), q - half);
  const __m256i both = _mm256_mask_loadu_epi16(_mm256_maskz_loadu_epi16(__mmask16(low), p), __mmask16(high), q - half);
  return load<T>((const IO*)&both);
}
template <class T, class IO> SIMD_INLINE void store_halves(IO* p, IO* q, Vec<T> v, int64_t n) {
  constexpr int64_t half = lanes_of<T> / 2;
  const uint32_t low = (1u << n) - 1, high = low << half;
  if constexpr (sizeof(IO) == 8) {
    _mm512_mask_storeu_pd(p, __mmask8(low), (__m512d)v);
    _mm512_mask_storeu_pd(q - half, __mmask8(high), (__m512d)v);
  } else if constexpr (sizeof(IO) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16(low), (__m512)v);
    _mm512_mask_storeu_ps(q - half, __mmask16(high), (__m512)v);
  } else {
    const __m256i bits = (__m256i)narrow<IO, T>(v);
    _mm256_mask_storeu_epi16(p, __mmask16(low), bits);
    _mm256_mask_storeu_epi16(q - half, __mmask16(high), bits);
  }
}
#endif

// One vector whose lane PARTS k + p is the sum of part p of the lanes of v[k].
template <class T, int PARTS = 1> SIMD_INLINE Vec<T> sum_lanes(Vec<T>* v) {
  constexpr int64_t vl = lanes_of<T>;
  LaneIndex<T> even, odd;
  for (int64_t l = 0; l < vl; ++l) {
    even[l] = 2 * l;
    odd[l] = 2 * l + 1;
  }
#pragma GCC unroll 4
  for (int64_t left = vl / PARTS / 2; left > 0; left /= 2)
#pragma GCC unroll 8
    for (int64_t k = 0; k < left; ++k)
      v[k] = __builtin_shuffle(v[2 * k], v[2 * k + 1], even) + __builtin_shuffle(v[2 * k], v[2 * k + 1], odd);
  return v[0];
}

// v[i] lane l becomes v[l] lane i, by instructions that keep within 16 bytes or move these: others cost more.
template <class T, int S = 1> SIMD_INLINE void transpose(Vec<T>* v) {
  constexpr int64_t vl = lanes_of<T>, inner = 16 / sizeof(T);
  if constexpr (S < vl) {
    LaneIndex<T> low, high;
    for (int64_t l = 0; l < vl; ++l) {
      if (S < inner) {  // blocks of S in turn, of the halves of 16 bytes
        const int64_t at = l % inner;
        low[l] = l - at + at / (2 * S) * S + at % S + at / S % 2 * vl;
        high[l] = low[l] + inner / 2;
      } else {  // of 16 bytes the even ones and the odd ones
        low[l] = l % (vl / 2) / inner * 2 * inner + l % inner + l / (vl / 2) * vl;
        high[l] = low[l] + inner;
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < vl; ++i)
      if ((i & S) == 0) {
        const Vec<T> a = v[i], b = v[i + S];
        v[i] = __builtin_shuffle(a, b, low);
        v[i + S] = __builtin_shuffle(a, b, high);
      }
    transpose<T, 2 * S>(v);
  } else if constexpr (inner == 4) {  // what changed places within 16 bytes did so in the order 0, 2, 1, 3
#pragma GCC unroll 4
    for (int64_t i = 0; i < vl; i += 4) {
      const Vec<T> one = v[i + 1];
      v[i + 1] = v[i + 2];
      v[i + 2] = one;
    }
  }
}

// The vectors that fill SIMD_BYTES of memory.
template <class T, class IO> constexpr int64_t vectors_of_line = SIMD_BYTES / sizeof(IO) / lanes_of<T>;

// A vector to memory, which is aligned if it goes past the caches, as it does if `stream`.
template <class V> SIMD_INLINE void store_whole(void* to, V v, [[maybe_unused]] bool stream) {
#if SIMD_BYTES == 64
  if (stream) return _mm512_stream_si512((__m512i*)to, (__m512i)v);
#elif SIMD_BYTES == 32
  if (stream) return _mm256_stream_si256((__m256i*)to, (__m256i)v);
#endif
  std::memcpy(to, &v, sizeof v);
}

// Narrows so many vectors at `from` to a whole, aligned vector in memory, past the caches if `stream`.
template <class T, class IO> SIMD_INLINE void store_line(const T* from, IO* to, bool stream) {
  typedef uint8_t Bytes __attribute__((vector_size(SIMD_BYTES)));
  Bytes line{};
#if SIMD_BYTES == 64
  bool done = false;
  if constexpr (std::is_same_v<IO, NativeBf16>) {
    const Vec<T> low = load<T>(from), high = load<T>(from + lanes_of<T>);
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(line) : "v"(low), "v"(high));
    // what has an exponent was no denormal: one test of the result where there is no zero
    const bool zeros = _mm512_testn_epi16_mask((__m512i)line, _mm512_set1_epi16(0x7f80)) != 0;
    done = !__builtin_expect(zeros, 0) || (!has_denormals(low) && !has_denormals(high));
  }
  if (!done)
#endif
  {
    const auto bits = narrow<IO, T>(load<T>(from));
    if constexpr (sizeof bits == sizeof line) {
      line = (Bytes)bits;
    } else {  // put together in registers: a load of what two stores have just written waits for both
      const auto more = narrow<IO, T>(load<T>(from + lanes_of<T>));
#if SIMD_BYTES == 64
      line = (Bytes)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)bits), (__m256i)more, 1);
#elif SIMD_BYTES == 32
      line = (Bytes)_mm256_set_m128i((__m128i)more, (__m128i)bits);
#else
      std::memcpy(&line, &bits, sizeof bits);
      std::memcpy((char*)&line + sizeof bits, &more, sizeof more);
#endif
    }
  }
  store_whole(to, line, stream);
}

SIMD_INLINE void fence_streaming() {
#if SIMD_BYTES >= 32
  _mm_sfence();
#endif
}

}  // namespace SIMD_NAME
}  // namespace spanet
