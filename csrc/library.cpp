// Every operator of the package: one line each, its meaning in spanet_kernels/reference.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(spanet_kernels, m) {
  m.def("radial_filter(Tensor x, Tensor base, Tensor gain, int radius_squared) -> Tensor");
  m.def("radial_filter_backward(Tensor grad, Tensor x, int radius_squared) -> (Tensor, Tensor)");
}
