"""Builds the compiled parts; everything else about the package stands in pyproject.toml.

    _cpu.so      operators on the CPU         LibTorch stable ABI, any torch >= 2.10
    _cuda.so     operators on NVIDIA GPUs     the same; optional
    _native      build_info, cpu_capability   pybind11, no torch header

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
    SIMD["avx2"] = "-DSIMD_BYTES=32 -mavx2 -mfma -mf16c"
    # GCC takes the intrinsics' own undefined registers for uninitialised variables
    avx512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    SIMD["avx512"] = f"-DSIMD_BYTES=64 {avx512} -Wno-uninitialized -Wno-maybe-uninitialized"
CPU_KERNELS = ("radial_filter", "axial_conv", "pointwise_pair", "gelu")
CUDA_KERNELS = ("radial_filter", "mode_coefficients", "axial_conv")
ARCHITECTURES = "8.0;9.0+PTX"  # 8.6 and 8.9 run the code for 8.0, the driver compiles the PTX for 10.x, 12.x and later ones


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


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


def link_rule(command: str) -> str:
    return f"rule link\n  command = {command} -shared $in -o $out $libraries\n"


class Build(build_ext):
    """Compiles with the C++ compiler and nvcc through ninja; nothing is probed but the presence of nvcc."""

    def ninja(self, name: str, output: Path, rules: list[str], objects: list[tuple[str, str]], libraries: str = "") -> None:
        """Compile (source, rule) pairs and link them into output."""
        folder = (ROOT / self.build_temp / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        built = [(f"{Path(source).stem}.{rule}.o", rule, (ROOT / "csrc" / source).resolve()) for source, rule in objects]
        lines = [*rules, *(f"build {target}: {rule} {source}" for target, rule, source in built)]
        lines.append(f"build {output.resolve()}: link {' '.join(target for target, _, _ in built)}\n  libraries = {libraries}\n")
        (folder / "build.ninja").write_text("\n".join(lines))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)

    def get_ext_filename(self, fullname: str) -> str:
        """The operator libraries serve every Python: no version in their names."""
        return super().get_ext_filename(fullname) if fullname.endswith("_native") else f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        import torch

        path = Path(self.get_ext_fullpath(ext.name))
        name = ext.name.rpartition(".")[2]
        torch_folder = Path(torch.__file__).parent
        csrc = f"-I{(ROOT / 'csrc').resolve()}"
        stable = f"-DTORCH_TARGET_VERSION=0x020a000000000000 -DTORCH_STABLE_ONLY -isystem {torch_folder / 'include'} {csrc}"
        libraries = f"-L{torch_folder / 'lib'} -ltorch_cpu"
        compiler = os.environ.get("CXX", "g++")
        cxx = f"{compiler} -O3 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -Wextra -Wno-psabi"
        if name == "_cpu":
            rules = [link_rule(compiler), rule("cxx", f"{cxx} {stable}")]
            rules += [rule(simd, f"{cxx} {csrc} -DSIMD_NAME={simd} {flags}") for simd, flags in SIMD.items()]
            objects = [("library.cpp", "cxx"), *((f"cpu/{op}.cpp", "cxx") for op in CPU_KERNELS)]
            objects += [(f"cpu/{op}_kernel.cpp", simd) for op in CPU_KERNELS for simd in SIMD]
            self.ninja(name, path, rules, objects, libraries)
        elif name == "_native":
            include = f"-isystem {pybind11_include(torch_folder)} -isystem {sysconfig.get_path('include')}"
            build = f"-DBUILD_TORCH='\"{torch.__version__}\"' {include}"
            self.ninja(name, path, [link_rule(compiler), rule("cxx", f"{cxx} {build} {csrc}")], [("native.cpp", "cxx")])
        else:
            self.build_cuda(path, stable, libraries)

    def build_cuda(self, output: Path, stable: str, libraries: str) -> None:
        wanted, compiler = os.environ.get("SPANET_KERNELS_CUDA", "auto"), nvcc()
        if wanted not in ("auto", "0", "1"):
            raise ValueError(f"SPANET_KERNELS_CUDA must be auto, 0 or 1, got {wanted!r}")
        if wanted == "0" or (wanted == "auto" and compiler is None):
            print("spanet_kernels: CUDA kernels left out:", "SPANET_KERNELS_CUDA=0" if wanted == "0" else "no nvcc found")
            return
        if compiler is None:
            raise RuntimeError("SPANET_KERNELS_CUDA=1 but no nvcc was found: set CUDA_HOME or PATH")
        architectures = gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
        flags = f"-O1 -std=c++20 -Xcompiler -fPIC,-fvisibility=hidden --threads 0 -DUSE_CUDA {architectures}"
        # -O1 is for the host; kernels are optimised by default
        try:
            rules = [link_rule(compiler), rule("nvcc", f"{compiler} {flags} {stable}")]
            self.ninja("_cuda", output, rules, [(f"cuda/{op}.cu", "nvcc") for op in CUDA_KERNELS], libraries)
        except subprocess.CalledProcessError:
            if wanted == "1":
                raise
            print("spanet_kernels: CUDA kernels left out: nvcc failed, see above; SPANET_KERNELS_CUDA=1 makes this an error")


def extension(name: str) -> Extension:
    return Extension(f"spanet_kernels.{name}", [], optional=name == "_cuda")


setup(ext_modules=[extension("_cpu"), extension("_native"), extension("_cuda")], cmdclass={"build_ext": Build})
