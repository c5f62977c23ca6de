// outer_sum on the CPU: checks, the way the work is cut, and the registration.
// The arithmetic is in outer_sum_kernel.cpp, compiled once per instruction set.

#include "cpu/outer_sum_kernel.h"

#include "cpu/dispatch.h"
#include "cpu/operators.h"

namespace spanet {
namespace {

// Work for a thread to be worth its start: this many products.
constexpr int64_t grain = int64_t{1} << 18;

const OuterSumKernels& kernels() { return SPANET_BEST(outer_sum_kernels); }

void check_side(const Tensor& data, const Tensor* factor) {
  const auto fits = [&](const Tensor& rows) {
    return rows.dim() == 2 && (rows.stride(1) == 1 || rows.size(1) == 1) && rows.scalar_type() == data.scalar_type();
  };
  const ScalarType type = data.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::BFloat16) && fits(data),
                  "outer_sum: left and right must be float32 or bfloat16 of shape (N, D) and (N, C), with adjacent columns");
  STD_TORCH_CHECK(!factor || (fits(*factor) && factor->size(0) == data.size(0) && factor->size(1) == data.size(1)),
                  "outer_sum: a factor must have the shape and dtype of its side, with adjacent columns");
}

std::tuple<Tensor, Tensor> outer_sum(const Tensor& left, const std::optional<Tensor>& left_factor, const Tensor& right,
                                     const std::optional<Tensor>& right_factor, bool gelu) {
  STD_TORCH_CHECK(left.dim() == 2 && right.dim() == 2, "outer_sum: left and right must have shape (N, D) and (N, C)");
  std::tuple<Tensor, Tensor> result{empty(std::array{left.size(1), right.size(1)}, ScalarType::Float),
                                    empty(std::array{left.size(1)}, ScalarType::Float)};
  outer_sum_into(std::get<0>(result), &std::get<1>(result), {&left, pointer_to(left_factor)}, {&right, pointer_to(right_factor), gelu}, false);
  return result;
}

}  // namespace

void outer_sum_into(const Tensor& out, const Tensor* sums, const OuterOperand& left, const OuterOperand& right, bool add) {
  check_side(*left.data, left.factor);
  check_side(*right.data, right.factor);
  const int64_t rows = left.data->size(0), d = left.data->size(1), c = right.data->size(1);
  STD_TORCH_CHECK(rows == right.data->size(0) && left.data->scalar_type() == right.data->scalar_type(),
                  "outer_sum: left and right must have as many rows and one dtype, got ", rows, " and ", right.data->size(0), " rows");
  STD_TORCH_CHECK((right.factor != nullptr) + right.gelu + (right.scale != nullptr) <= 1,
                  "outer_sum: right has a GELU or a factor or a scale");
  if (rows == 0 && !add)
    for (const Tensor* zero : {&out, sums})
      if (zero) std::memset(zero->data_ptr(), 0, zero->numel() * zero->element_size());
  if (rows == 0 || d == 0) return;
  const auto run = [&]<class IO>(OuterSumRun<IO> kernel) {
    const auto side = [](const OuterOperand& of) {
      const auto data = [](const Tensor* t) { return t ? static_cast<const IO*>(t->data_ptr()) : nullptr; };
      const float* scale = of.scale ? static_cast<const float*>(of.scale->data_ptr()) : nullptr;
      const int64_t factor_stride = of.factor ? of.factor->stride(0) : 0;
      return OuterSide<IO>{of.data->size(1), of.data->stride(0), factor_stride, data(of.data), data(of.factor), of.gelu, scale};
    };
    const OuterSum<IO> op{rows, side(left), side(right), static_cast<float*>(out.data_ptr()),
                          sums ? static_cast<float*>(sums->data_ptr()) : nullptr, add};
    OuterSum<IO> without_sums = op;
    without_sums.sums = nullptr;
    const int64_t lanes = kernels().lanes, panels = (d + lanes - 1) / lanes, vectors = (c + lanes - 1) / lanes;
    // the longer side is shared out: a thread copies all of the other one
    if (d >= c)
      parallel(grain, panels, rows * lanes * (c + 1), [&](int64_t begin, int64_t end) { kernel(op, begin, end, 0, vectors); });
    else
      parallel(grain, vectors, rows * lanes * d,
               [&](int64_t begin, int64_t end) { kernel(begin ? without_sums : op, 0, panels, begin, end); });
  };
  static const bool by_dot = cpu_capability() >= Capability::avx512_bf16;
  if (left.data->scalar_type() == ScalarType::Float) run(kernels().f32);
  else run(by_dot ? kernels().bf16_dot : kernels().bf16);
}

}  // namespace spanet

STABLE_TORCH_LIBRARY_IMPL(spanet_kernels, CPU, m) {
  m.impl("outer_sum", spanet::boxed<&spanet::outer_sum>);
}
