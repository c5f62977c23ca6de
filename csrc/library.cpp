// Every operator of the package: one line each, its meaning in spanet_kernels/reference.py.
#include <torch/csrc/stable/library.h>

#include <cstdlib>

namespace {

// glibc gives freed memory back to the system, and takes it anew page by page, until the program has freed one large block: from then on it
// keeps twice the size of that. One of nearly 32 MiB, the largest that counts, of which no page is touched: else the tensors of every
// block of a network would be mapped anew. Where the environment or the program set the thresholds this changes nothing.
[[maybe_unused]] const bool memory_is_kept = [] {
  void* block = std::malloc((size_t{32} << 20) - (size_t{64} << 10));
  asm volatile("" : "+r"(block));
  std::free(block);
  return true;
}();

}  // namespace

STABLE_TORCH_LIBRARY(spanet_kernels, m) {
  m.def("radial_filter(Tensor x, Tensor base, Tensor gain, int radius_squared) -> Tensor");
  m.def("radial_filter_backward(Tensor grad, Tensor x, int radius_squared) -> (Tensor, Tensor)");
  m.def("mode_coefficients(Tensor x, int radius_squared) -> Tensor");
  m.def(
      "axial_conv(Tensor x, Tensor row_weight, Tensor row_bias, Tensor column_weight, Tensor column_bias, int radius_squared)"
      " -> (Tensor, Tensor)");
  m.def(
      "axial_conv_backward(Tensor grad, Tensor x, Tensor row_weight, Tensor row_bias, Tensor column_weight)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "spectral_gate(Tensor z, Tensor? coefficients, Tensor weight, Tensor bias, Tensor base, Tensor gain, int radius_squared)"
      " -> Tensor");
  m.def(
      "spectral_gate_backward(Tensor grad, Tensor z, Tensor? coefficients, Tensor weight, Tensor bias, Tensor base, Tensor gain,"
      " int radius_squared, bool profile_learns) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "spectral_mixer(Tensor x, Tensor in_weight, Tensor in_bias, Tensor row_weight, Tensor row_bias, Tensor column_weight,"
      " Tensor column_bias, Tensor weight, Tensor bias, Tensor base, Tensor gain, Tensor out_weight, Tensor out_bias,"
      " int radius_squared, bool keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "spectral_mixer_backward(Tensor grad, Tensor x, Tensor t, Tensor z, Tensor coefficients, Tensor in_weight, Tensor row_weight,"
      " Tensor row_bias, Tensor column_weight, Tensor column_bias, Tensor weight, Tensor bias, Tensor base, Tensor gain,"
      " Tensor out_weight, int radius_squared, bool profile_learns) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mixer_branch(Tensor(a!) y, Tensor(b!)? t, Tensor(c!)? context, Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? residual,"
      " Tensor? residual_scale, Tensor in_weight, Tensor in_bias, Tensor row_weight, Tensor row_bias, Tensor column_weight,"
      " Tensor column_bias, Tensor weight, Tensor bias, Tensor base, Tensor gain, Tensor out_weight, Tensor out_bias,"
      " int radius_squared) -> Tensor");
  m.def(
      "mixer_branch_backward(Tensor(a!) x_grad, Tensor grad, Tensor x, Tensor t, Tensor context, Tensor added, Tensor in_weight, Tensor row_weight,"
      " Tensor row_bias, Tensor column_weight, Tensor column_bias, Tensor weight, Tensor bias, Tensor base, Tensor gain, Tensor out_weight,"
      " int radius_squared, bool profile_learns) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gelu(Tensor x, Tensor? bias, Tensor(a!)? grad) -> (Tensor, Tensor)");
  m.def("outer_sum(Tensor left, Tensor? left_factor, Tensor right, Tensor? right_factor, bool gelu) -> (Tensor, Tensor)");
  m.def("column_sums(Tensor x) -> Tensor");
  m.def("image_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)");
  m.def("image_norm_backward(Tensor grad, Tensor x, Tensor moments, Tensor weight) -> (Tensor, Tensor, Tensor)");
  m.def("branch_norm(Tensor(a!) n, Tensor x, Tensor moments, Tensor weight, Tensor bias) -> ()");
  m.def(
      "branch_norm_backward(Tensor(a!) x_grad, Tensor n_grad, Tensor x, Tensor moments, Tensor weight, Tensor? sum_grad, Tensor? scale)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("branch_sum(Tensor(a!) y, Tensor f, Tensor x, Tensor? scale) -> ()");
  m.def("image_moments(Tensor x, float eps) -> Tensor");
  m.def(
      "pointwise_pair(Tensor(a!) y, Tensor x, Tensor? moments, Tensor? norm_weight, Tensor? norm_bias, Tensor? factor, Tensor? residual,"
      " Tensor? residual_scale, Tensor? weight_in, Tensor? bias_in, Tensor weight_out, Tensor? bias_out, Tensor(b!)? before=None)"
      " -> ()");
  m.def(
      "pointwise_mlp_backward(Tensor(a!) x_grad, Tensor(b!) h_grad, Tensor grad, Tensor h, Tensor weight_in, Tensor weight_out) -> ()");
}
