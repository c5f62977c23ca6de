"""Builds the compiled parts; everything else about the package stands in pyproject.toml.

    _cpu.so      operators on the CPU             LibTorch stable ABI, any torch >= 2.10
    _cuda.so     operators on NVIDIA GPUs         the same; optional
    _native      facts about them and the CPU     pybind11, no torch header

SPANET_KERNELS_CUDA   auto (default: if nvcc is there, go on without it if it fails), 1 (must build), 0 (never)
TORCH_CUDA_ARCH_LIST  GPU architectures, such as "9.0" or "8.0;9.0;12.0+PTX"; default 8.0;9.0+PTX
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")
SIMD = {"plain": "-DSIMD_BYTES=16"}  # each is one compilation of the CPU kernels; the best one is chosen when they are loaded
if X86:
    SIMD["plain"] += " -O1"  # for processors of more than ten years, not worth the time
    SIMD["avx2"] = "-DSIMD_BYTES=32 -mavx2 -mfma -mf16c"
    # GCC takes the intrinsics' own undefined registers for uninitialised variables
    avx512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    SIMD["avx512"] = f"-DSIMD_BYTES=64 {avx512} -Wno-uninitialized -Wno-maybe-uninitialized"
# What GCC's -O3 inlines beyond -O2 costs the gradients of axial_conv 18 % and every file time to compile; the filter's wide radii need it.
O2 = "-O2 -fvect-cost-model=dynamic -fpeel-loops -funswitch-loops -fsplit-loops"
CPU_KERNELS = {
    "radial_filter": "-O3",
    "spectrum": O2,
    "axial_conv": O2,
    "pointwise_pair": O2,
    "outer_sum": O2,
    "gelu": O2,
    "branch_norm": O2,
}
CUDA_KERNELS = ("radial_filter", "mode_coefficients", "axial_conv")
ARCHITECTURES = "8.0;9.0+PTX"  # 8.6 and 8.9 run the code for 8.0, the driver compiles the PTX for 10.x, 12.x and later ones


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def wanted_nvcc() -> str | None:
    """nvcc, or None where the CUDA kernels are to be left out."""
    wanted, compiler = os.environ.get("SPANET_KERNELS_CUDA", "auto"), nvcc()
    if wanted not in ("auto", "0", "1"):
        raise ValueError(f"SPANET_KERNELS_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "1" and compiler is None:
        raise RuntimeError("SPANET_KERNELS_CUDA=1 but no nvcc was found: set CUDA_HOME or PATH")
    if wanted == "0" or compiler is None:
        print("spanet_kernels: CUDA kernels left out:", "SPANET_KERNELS_CUDA=0" if wanted == "0" else "no nvcc found")
        return None
    return compiler


def gencode(architectures: str) -> str:
    """Machine code for each, assembled from the PTX of the lowest: no kernel asks for more, and the compiler runs once."""
    items = architectures.replace(",", ";").replace(" ", ";").split(";")
    numbers = [item.removesuffix("+PTX").replace(".", "") for item in items]
    lowest = f"compute_{min(numbers, key=lambda number: int(number.rstrip('af')))}"
    code = [f"sm_{number}" for number in numbers] + [lowest] * any(item.endswith("+PTX") for item in items)
    return f"'-gencode=arch={lowest},code=[{','.join(code)}]'"


def pybind11_include(torch_folder: Path) -> str:
    """pybind11's headers, or the copy that torch carries on machines where nothing can be installed."""
    try:
        import pybind11
    except ImportError:
        return str(torch_folder / "include")
    return pybind11.get_include()


def rule(name: str, compile_command: str) -> str:
    return f"rule {name}\n  command = {compile_command} -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"


class Build(build_ext):
    """Compiles with the C++ compiler and nvcc, everything in one run of ninja; nothing is probed but the presence of nvcc."""

    def get_ext_filename(self, fullname: str) -> str:
        """The operator libraries serve every Python: no version in their names."""
        return super().get_ext_filename(fullname) if fullname.endswith("_native") else f"{fullname.replace('.', '/')}.so"

    def build_extensions(self) -> None:
        import torch

        torch_folder, csrc = Path(torch.__file__).parent, ROOT.resolve() / "csrc"
        stable = f"-DTORCH_TARGET_VERSION=0x020a000000000000 -DTORCH_STABLE_ONLY -isystem {torch_folder / 'include'}"
        torch_library = f"-L{torch_folder / 'lib'} -ltorch_cpu"
        compiler, cuda_compiler = os.environ.get("CXX", "g++"), wanted_nvcc()
        cxx = f"{compiler} -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -Wextra -Wno-psabi -I{csrc}"
        python = f"-isystem {pybind11_include(torch_folder)} -isystem {sysconfig.get_path('include')}"
        lines = [
            "rule link\n  command = $linker -shared $in -o $out $libraries\n",
            rule("cxx", f"{cxx} {O2} {stable}"),
            rule("native", f"{cxx} -O1 {python} -DBUILD_TORCH='\"{torch.__version__}\"'"),
            *(
                rule(f"{simd}_{op}", f"{cxx} {level} -DSIMD_NAME={simd} {flags}")
                for op, level in CPU_KERNELS.items()
                for simd, flags in SIMD.items()
            ),
        ]

        def library(name: str, linker: str, libraries: str, objects: list[tuple[str, str]]) -> str:
            """The file that objects, pairs of source and rule, are linked into."""
            output = Path(self.get_ext_fullpath(f"spanet_kernels.{name}")).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            built = [(f"{source}.{rule}.o", rule, csrc / source) for source, rule in objects]
            lines.extend(f"build {target}: {rule} {source}" for target, rule, source in built)
            inputs = " ".join(target for target, _, _ in built)
            lines.append(f"build {output}: link {inputs}\n  linker = {linker}\n  libraries = {libraries}\n")
            return str(output)

        # ninja starts in the order of its file: what takes longest comes first
        cuda = []
        if cuda_compiler:
            # -O1 is for the host; kernels are optimised by default
            flags = "-O1 -std=c++20 -Xcompiler -fPIC,-fvisibility=hidden --threads 0 -DUSE_CUDA"
            architectures = gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
            lines.append(rule("nvcc", f"{cuda_compiler} {flags} {architectures} {stable} -I{csrc}"))
            objects = [(f"cuda/{op}.cu", "nvcc") for op in CUDA_KERNELS] + [(f"cuda/{op}.cpp", "nvcc") for op in CUDA_KERNELS]
            cuda = [library("_cuda", cuda_compiler, torch_library, objects)]
        objects = [(f"cpu/{op}_kernel.cpp", f"{simd}_{op}") for op in CPU_KERNELS for simd in reversed(SIMD)]
        objects += [("library.cpp", "cxx"), ("cpu/mixer_branch.cpp", "cxx"), *((f"cpu/{op}.cpp", "cxx") for op in CPU_KERNELS)]
        cpu = [library("_native", compiler, "", [("native.cpp", "native")]), library("_cpu", compiler, torch_library, objects)]

        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(lines))
        ninja = [sys.executable, "-m", "ninja", "-C", str(folder), "-k", "0"]
        if subprocess.run([*ninja, *cuda, *cpu]).returncode == 0:
            return
        if not cuda or os.environ.get("SPANET_KERNELS_CUDA") == "1":
            raise RuntimeError("the build failed, see above")
        subprocess.run([*ninja, *cpu], check=True)
        print("spanet_kernels: CUDA kernels left out: nvcc failed, see above; SPANET_KERNELS_CUDA=1 makes this an error")


def extension(name: str) -> Extension:
    return Extension(f"spanet_kernels.{name}", [], optional=name == "_cuda")


setup(ext_modules=[extension("_cpu"), extension("_native"), extension("_cuda")], cmdclass={"build_ext": Build})
