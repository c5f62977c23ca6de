"""Builds the compiled parts; everything else about the package stands in pyproject.toml.

    _cpu.so      operators on the CPU         LibTorch stable ABI, any torch >= 2.10
    _cuda.so     operators on NVIDIA GPUs     the same; optional
    _native      build_info, cpu_capability   pybind11, no torch header

SPANET_KERNELS_CUDA   auto (default: if nvcc is there, go on without it if it fails), 1 (must build), 0 (never)
TORCH_CUDA_ARCH_LIST  GPU architectures, such as "9.0" or "8.0;9.0+PTX"; default 8.0;9.0;10.0;12.0+PTX
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"  # 8.6 and 8.9 run the code for 8.0


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def gencode(architectures: str) -> list[str]:
    flags = []
    for item in architectures.replace(",", ";").replace(" ", ";").split(";"):
        number = item.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if item.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class Build(build_ext):
    """Compiles with g++ and nvcc through ninja; nothing is probed but the presence of nvcc."""

    def ninja(self, name: str, output: Path, rules: str, objects: dict[str, str]) -> None:
        folder = (ROOT / self.build_temp / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        lines = [rules]
        outputs = []
        for source, rule in objects.items():
            outputs.append(f"{Path(source).stem}.{rule}.o")
            lines.append(f"build {outputs[-1]}: {rule} {ROOT.resolve() / 'csrc' / source}")
        lines.append(f"build {output.resolve()}: link {' '.join(outputs)}\n")
        (folder / "build.ninja").write_text("\n".join(lines))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        output = Path(self.get_ext_fullpath(ext.name))
        library = output.with_name(f"{ext.name.rpartition('.')[2]}.so")
        include = Path(torch.__file__).parent / "include"
        link = f"-L{Path(torch.__file__).parent / 'lib'} -ltorch_cpu"
        stable = f"-DTORCH_TARGET_VERSION=0x020a000000000000 -DTORCH_STABLE_ONLY -I{include} -I{ROOT.resolve() / 'csrc'}"
        compiler = os.environ.get("CXX", "g++")
        flags = "-O3 -std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter -Wno-psabi"
        cxx = f"rule cxx\n  command = {compiler} {flags} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\nflags = "
        if ext.name.endswith("_cpu"):
            rules = f"{cxx}{stable}\nrule link\n  command = {compiler} -shared $in -o $out {link}\n"
            self.ninja("cpu", library, rules, {s: "cxx" for s in ext.sources})
        elif ext.name.endswith("_native"):
            info = f'-DBUILD_TORCH=\\"{torch.__version__}\\" -I{pybind11.get_include()} -I{sysconfig.get_path("include")}'
            rules = f"{cxx}{info} -I{ROOT.resolve() / 'csrc'}\nrule link\n  command = {compiler} -shared $in -o $out\n"
            self.ninja("native", output, rules, {s: "cxx" for s in ext.sources})
        else:
            self.build_cuda(ext, library, stable, link)

    def build_cuda(self, ext: Extension, library: Path, stable: str, link: str) -> None:
        wanted, compiler = os.environ.get("SPANET_KERNELS_CUDA", "auto"), nvcc()
        if wanted not in ("auto", "0", "1"):
            raise ValueError(f"SPANET_KERNELS_CUDA must be auto, 0 or 1, got {wanted!r}")
        if wanted == "0" or (wanted == "auto" and compiler is None):
            print("spanet_kernels: CUDA kernels left out:", "SPANET_KERNELS_CUDA=0" if wanted == "0" else "no nvcc found")
            return
        if compiler is None:
            raise RuntimeError("SPANET_KERNELS_CUDA=1 but no nvcc was found: set CUDA_HOME or PATH")
        architectures = " ".join(gencode(os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)))
        flags = f"-O3 -std=c++20 -Xcompiler -fPIC,-fvisibility=hidden --threads 0 -DUSE_CUDA {architectures} {stable}"
        rules = (
            f"rule nvcc\n  command = {compiler} {flags} -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
            f"rule link\n  command = {compiler} -shared $in -o $out {link}\n"
        )
        try:
            self.ninja("cuda", library, rules, {s: "nvcc" for s in ext.sources})
        except subprocess.CalledProcessError:
            if wanted == "1":
                raise
            print("spanet_kernels: CUDA kernels left out: nvcc failed, see above; SPANET_KERNELS_CUDA=1 makes this an error")


setup(
    ext_modules=[
        Extension("spanet_kernels._cpu", ["library.cpp", "cpu/radial_filter.cpp"]),
        Extension("spanet_kernels._native", ["native.cpp"]),
        Extension("spanet_kernels._cuda", ["cuda/radial_filter.cu"], optional=True),
    ],
    cmdclass={"build_ext": Build},
)
