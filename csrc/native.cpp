// What the compiled parts say of themselves. pybind11 and no torch header: it loads beside any torch.
#include <pybind11/pybind11.h>

#include "cpu/capability.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts about the compiled parts of spanet_kernels.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = BUILD_TORCH;
        info["compiler"] = __VERSION__;
        info["stable_abi"] = "2.10";
        return info;
      },
      "torch whose headers were compiled against, compiler, and the oldest torch whose stable ABI is used.");
  m.def(
      "cpu_capability", [] { return spanet::name(spanet::cpu_capability()); },
      "Instruction set in use by the CPU kernels: plain, avx2, avx512, avx512_bf16 or amx.");
  m.def("cpu_is_intel", [] { return spanet::cpu_is_intel(); }, "Whether the processor is one of Intel's.");
}
