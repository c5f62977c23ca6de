// outer_sum on the CPU: checks, the way the work is cut, and the registration.
// The arithmetic is in outer_sum_kernel.cpp, compiled once per instruction set.

#include "cpu/outer_sum_kernel.h"

#include "cpu/dispatch.h"

namespace spanet {
namespace {

// Work for a thread to be worth its start: this many products.
constexpr int64_t grain = int64_t{1} << 18;

Tensor outer_sum(const Tensor& left, const Tensor& right) {
  for (const Tensor* rows : {&left, &right})
    STD_TORCH_CHECK(rows->dim() == 2 && (rows->stride(1) == 1 || rows->size(1) == 1) && rows->scalar_type() == ScalarType::Float,
                    "outer_sum: left and right must be float32 of shape (N, D) and (N, C), with adjacent columns");
  STD_TORCH_CHECK(left.size(0) == right.size(0), "outer_sum: left and right must have as many rows, got ", left.size(0), " and ",
                  right.size(0));
  const int64_t rows = left.size(0), d = left.size(1), c = right.size(1);
  Tensor out = empty(std::array{d, c}, ScalarType::Float);
  if (rows == 0) std::memset(out.data_ptr(), 0, out.numel() * out.element_size());
  if (rows == 0 || out.numel() == 0) return out;
  const OuterSumKernels& kernel = SPANET_BEST(outer_sum_kernels);
  const OuterSum op{rows, d, c, left.stride(0), right.stride(0), static_cast<const float*>(left.data_ptr()),
                    static_cast<const float*>(right.data_ptr()), static_cast<float*>(out.data_ptr())};
  const int64_t blocks = (d + kernel.block - 1) / kernel.block, vectors = (c + kernel.lanes - 1) / kernel.lanes;
  // the longer side is shared out: a thread copies all of the other one
  if (d >= c)
    parallel(grain, blocks, rows * kernel.block * c, [&](int64_t begin, int64_t end) { kernel.run(op, begin, end, 0, vectors); });
  else
    parallel(grain, vectors, rows * kernel.lanes * d, [&](int64_t begin, int64_t end) { kernel.run(op, 0, blocks, begin, end); });
  return out;
}

}  // namespace
}  // namespace spanet

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CPU, m) {
  m.impl("outer_sum", spanet::boxed<&spanet::outer_sum>);
}
