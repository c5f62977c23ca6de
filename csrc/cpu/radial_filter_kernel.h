// What the host function hands to the kernels of one instruction set; see radial_filter_kernel.cpp.
#pragma once

#include "cpu/half.h"

namespace spanet {

// Elements rounded up to whole cache lines, whatever their size.
inline int64_t line_up(int64_t elements) { return (elements + 15) / 16 * 16; }

// One axis of length n: its nc cosines (f = 0, 1, ...) first, then its ns sines (f = 1, 2, ...).
// The functions are not normalised, their largest value is 1: the constant is exact and costs no product.
// table has one row of nc + ns values for each of i = 0, the pairs (i, n - i) with 0 < i < n/2, and n/2 if n is even.
template <class T> struct Axis {
  int64_t n, nc, ns;
  const T* table;
  // the functions laid out in slots (tiles.h): of lanes that stand there twice, `once` keeps the first
  const T* functions;   // (nc + ns, width)
  const T* once;        // (nc + ns, width)
  const T* transposed;  // once^T, (width, padded), zeros beyond nc + ns
  int64_t width, padded;
  int64_t count() const { return nc + ns; }
  int64_t pairs() const { return (n - 1) / 2; }
};

struct Mode {
  int32_t row, column;
  int32_t index;              // of its shell in the profile, or its own among the coefficients
  int32_t row_at, column_at;  // the same in rows of columns.width elements
  double scale;               // 1 / squared norm, or 1 / norm
};

template <class T> struct Modes {
  Axis<T> rows, columns;
  const Mode* mode;  // those inside the disc, or all, by rows
  const T* scales;   // theirs
  int64_t inside, shells;
  // of the discs of radius 0 and 1 on planes of up to flat_pixels, else nullptr: (vectors of pixels, modes but the constant, lanes)
  const T* flat;
  // Whether every mode is constant along an axis, as those of radius 1 are, and those of both are there.
  bool on_axes() const { return rows.ns > 0 && columns.ns > 0 && inside == rows.count() + columns.count() - 1; }
};

// Up to this many pixels the discs of radius 0 and 1 are cheaper by tables of a whole plane, with vectors of 16 (measured).
constexpr int64_t flat_pixels = 576;

// Up to this many modes are cheaper as dot products along the columns than as a matrix product.
constexpr int64_t few_modes = 16;

template <class IO> struct Planes {  // (B, C, H, W) with strides in elements
  IO* data;
  int64_t b, c, h, w;
};

template <class T> struct Profile {
  const T* base;
  const T* gain;
  int64_t base_stride, gain_shell, gain_channel;
};

// How the work is cut: by columns, one plane after the other, or by lanes, chunks of channels of one image side by side, as they lie or
// gathered.
enum class Cut { columns, lanes, gathered };

// What is done of a cut. The three steps of lanes can be passes over one image, whose rows the threads share in the first and the last.
enum Pass { reduce_pass = 1, mix_pass = 2, expand_pass = 4, all_passes = 7 };

// Chunks that the channels are cut into; the last one takes the rest, so that none is shorter than `chunk` unless all are.
inline int64_t chunks_of(int64_t channels, int64_t chunk) { return channels < chunk ? 1 : channels / chunk; }

// Its units are planes (columns), image x chunk (lanes, gathered), or in a pass over one image chunks (mix_pass) or row x chunk.
template <class T> struct Work {
  Cut cut;
  int64_t channels, chunk;
  bool stream;         // columns: y is written past the caches
  Pass pass = all_passes;
  T* sums = nullptr;   // in a pass: (H, A_W, lanes) of one chunk after the other
  bool axes = false;   // lanes, gathered, not in passes: every mode is constant along an axis; sums along rows and columns hold them all
};

// What stands beside x, or nullptr: two maps like it, whose product is added to its filter; where x = W^T c the modes of c,
// (B, inside, C), not normalised, and W (C, C), which save the sums over x; and where to write what the filter adds of each mode, in lanes,
// (B, inside, C).
template <class T, class IO> struct Beside {
  const IO *a = nullptr, *b = nullptr;
  const T* modes = nullptr;
  const IO* weight = nullptr;
  T* added = nullptr;
};

template <class T, class IO> struct RadialFilterKernels {
  // forward over units [begin, end) of the work, of fp32 and bf16 in lanes with what stands beside x; y may be x
  void (*filter)(const Work<T>&, const Modes<T>&, Planes<const IO> x, Planes<IO> y, const Profile<T>&, const Beside<T, IO>&, int64_t begin,
                 int64_t end);
  // over the same units; out is (B, C, inside)
  void (*mode_coefficients)(const Work<T>&, const Modes<T>&, Planes<const IO> x, T* out, int64_t begin, int64_t end);
  // the same of x, or x o factor, in lanes, not normalised, and times the gains if there is a profile; out is (B, inside, C)
  void (*mode_rows)(const Work<T>&, const Modes<T>&, Planes<const IO> x, const IO* factor, const Profile<T>*, T* out, int64_t begin,
                    int64_t end);
  // gradient of the profile over units [begin, end): channels over all images (columns), or block of images x chunk (else);
  // sums is (blocks, inside + 1, C), zeros before: the products of every mode, not normalised, then <grad, x>
  void (*backward)(Cut, const Modes<T>&, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t blocks,
                   int64_t channels, int64_t chunk, int64_t begin, int64_t end);
  int64_t lanes;  // 0: there are none
};

// Working memory of the calling thread, kept from call to call; aligned to 64 bytes, contents undefined.
void* thread_scratch(int64_t bytes);

// The kernels of an operator for one instruction set.
template <template <class, class> class Kernels> struct KernelSet {
  Kernels<float, float> f32;
  Kernels<float, Bf16> bf16;
  Kernels<float, Half> f16;
  Kernels<double, double> f64;
  Kernels<float, NativeBf16> native_bf16{};  // of AVX-512 alone, and not of every operator
};

// Declares the sets that the compilations of the operator's kernels define.
#define SPANET_DECLARE_KERNELS(NAME, KERNELS)                 \
  namespace plain { extern const KernelSet<KERNELS> NAME; }  \
  namespace avx2 { extern const KernelSet<KERNELS> NAME; }   \
  namespace avx512 { extern const KernelSet<KERNELS> NAME; }

// Defines the set of one compilation: the `kernels` of its file, and those for NativeBf16 if they are given.
#define SPANET_DEFINE_KERNELS(NAME, KERNELS, ...)                                                                     \
  extern const KernelSet<KERNELS> NAME{kernels<float, float>, kernels<float, Bf16>, kernels<float, Half>,           \
                                       kernels<double, double>, __VA_ARGS__};
#if SIMD_BYTES == 64
#define SPANET_NATIVE_KERNELS kernels<float, NativeBf16>
#else
#define SPANET_NATIVE_KERNELS
#endif

SPANET_DECLARE_KERNELS(radial_filter_kernels, RadialFilterKernels)

}  // namespace spanet
