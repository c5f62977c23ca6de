// radial_filter, its gradient and mode_coefficients on the CPU, for the instruction set this file is compiled for (simd.h).
//
//   Z[a,b] = sum_ij phi[a,i] X[i,j] psi[b,j]         P = G o Z
//   Y[i,j] = base X[i,j] + sum_ab phi[a,i] P[a,b] psi[b,j]
//
// mode_coefficients is the first line alone.
// Both sums run over one axis at a time, always by the same two steps, with vectors along another axis:
//   reduce   V[a,l] = sum_i phi[a,i] X[i,l]           expand   Y[i,l] = base_l X[i,l] + sum_a phi[a,i] T[a,l]
// A cosine is even under i -> n - i and a sine odd, so a pair of rows enters as its sum and its difference:
// half the multiply-adds, and the additions run on ports of their own.
//
// Cuts: columns (NCHW): l is a column, the reduced axis the rows; along columns, up to one vector of modes is summed
//         by dot products, more by a small GEMM. Columns that are not adjacent are first copied, a plane at a time.
//         Radii 1 and 2 over planes of a few vectors stay in registers, two planes in a vector if their rows fit in half of it
//         (disc.h); up to 24 x 24 pixels radii 0 and 1 take a plane as one run of them (flat.h). Rows of y are brought together in the cache
//         where they are not whole vectors, and written by whole ones.
//       lanes (channels_last), gathered (NCHW, transposed on the way in and out): l is a channel; reduce along columns, then along rows,
//         expand in reverse. Threads share the rows of an image that leaves the cache or has too few channels for them. The modes of
//         radius 1 are constant along an axis: over small planes x is summed along both, without a product.
// Every output is owned by one thread and the order of its sum is fixed: bit-equal for any number of threads.
// Memory: x is read once from memory and once more from the cache, y is written once, past the cache if `stream` (columns).

#include "cpu/radial_filter_kernel.h"

#include "cpu/radial_filter_columns.h"
#include "cpu/radial_filter_lanes.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

template <class T, class IO>
void filter(const Work<T>& work, const Modes<T>& m, Planes<const IO> x, Planes<IO> y, const Profile<T>& p, const Beside<T, IO>& beside,
            int64_t begin, int64_t end) {
  if (work.cut == Cut::lanes) filter_lanes<Lanes::here>(work, m, x, y, p, beside, begin, end);
  else if (work.cut == Cut::gathered) filter_lanes<Lanes::apart>(work, m, x, y, p, beside, begin, end);
  else filter_columns(m, x, y, p, work.channels, work.stream, begin, end);
}

template <class T, class IO>
void mode_coefficients(const Work<T>& work, const Modes<T>& m, Planes<const IO> x, T* out, int64_t begin, int64_t end) {
  if (work.cut == Cut::lanes) mode_coefficients_lanes<Lanes::here>(work, m, x, out, begin, end);
  else if (work.cut == Cut::gathered) mode_coefficients_lanes<Lanes::apart>(work, m, x, out, begin, end);
  else mode_coefficients_columns(m, x, out, work.channels, begin, end);
}

template <class T, class IO>
void backward(Cut cut, const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t blocks,
              int64_t channels, int64_t chunk, int64_t begin, int64_t end) {
  if (cut == Cut::lanes) backward_lanes<Lanes::here>(m, grad, x, sums, images, blocks, channels, chunk, begin, end);
  else if (cut == Cut::gathered) backward_lanes<Lanes::apart>(m, grad, x, sums, images, blocks, channels, chunk, begin, end);
  else backward_columns(m, grad, x, sums, images, channels, begin, end);
}

template <class T, class IO>
constexpr RadialFilterKernels<T, IO> kernels{filter<T, IO>, mode_coefficients<T, IO>, mode_rows<T, IO>, backward<T, IO>, lanes_of<T>};

}  // namespace

SPANET_DEFINE_KERNELS(radial_filter_kernels, RadialFilterKernels, SPANET_NATIVE_KERNELS)

}  // namespace SIMD_NAME
}  // namespace spanet
