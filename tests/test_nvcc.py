"""The CUDA kernels compiled for every architecture of the package: no spills, no stack, 16-byte copies in the machine code."""

import itertools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SOURCES = ("radial_filter", "mode_coefficients", "axial_conv")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:, used \d+ barriers)?(?:, (?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def tool(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(name, path=f"{home}/bin") if home else shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:  # Triton's wheel carries the disassembler
        triton = pytest.importorskip("triton", reason=f"no {name}, nor Triton's")
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        found = str(bundled) if bundled.exists() else None
    return found


def demangled(name: str) -> str:
    """filter_kernel<float, 4, 2> from _ZN6spanet13filter_kernelIfLi4ELi2EEEv..., without a tool."""
    kernel = re.search(r"spanet\d+([a-z_]+_kernel)(?:I(.*?)EEv)?", name)
    assert kernel, name
    names = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16", "Lb0": "false", "Lb1": "true"}
    arguments = re.findall(r"Li(\d+)E|(Lb[01]|6__half|13__nv_bfloat16|[fd])", (kernel[2] or "") + "E")
    return f"{kernel[1]}<{', '.join(number or names[name] for number, name in arguments)}>" if arguments else kernel[1]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """Folder of SOURCE.sm_*.cubin, and what the assembler reported for each architecture."""
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists() and "CUDA_HOME" not in os.environ:
        pytest.skip("no nvcc on this machine: registers and spills of the CUDA kernels are not checked")
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("nvcc")
    include = Path(torch.__file__).parent / "include"

    def compile_for(job: tuple[int, str]) -> str:
        architecture, source = job
        command = [tool("nvcc"), "-cubin", f"-arch=sm_{architecture}", "-O3", "-std=c++20", "-Xptxas", "-v", "-DUSE_CUDA"]
        command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", f"-I{include}", f"-I{ROOT / 'csrc'}"]
        command += ["-o", folder / f"{source}.sm_{architecture}.cubin", ROOT / "csrc" / "cuda" / f"{source}.cu"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stderr

    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(compile_for, itertools.product(ARCHITECTURES, SOURCES)))
    return folder, {
        architecture: "".join(reports[k * len(SOURCES) : (k + 1) * len(SOURCES)]) for k, architecture in enumerate(ARCHITECTURES)
    }


def test_no_spills(compiled: tuple[Path, dict[int, str]]) -> None:
    registers: dict[str, list[str]] = {}
    spilling = []
    for architecture, report in compiled[1].items():
        kernels = [match.groupdict() for match in KERNEL.finditer(report)]
        assert len(kernels) == report.count("Compiling entry function") > 0
        for kernel in kernels:
            name = demangled(kernel["name"])
            registers.setdefault(name, []).append(kernel["registers"] + (f"+{kernel['shared']}B" if kernel["shared"] else ""))
            if any(kernel[kind] != "0" for kind in ("stack", "stores", "loads")):
                amounts = ", ".join(f"{kernel[kind]} B {kind}" for kind in ("stack", "stores", "loads"))
                spilling.append(f"{name} on sm_{architecture}: {amounts}")
    print(f"\n{'registers (+ static shared memory)':46}" + "".join(f"{f'sm_{architecture}':>10}" for architecture in ARCHITECTURES))
    for name, counts in sorted(registers.items()):
        print(f"{name:46}" + "".join(f"{count:>10}" for count in counts))
    assert not spilling, "\n".join(spilling)


def test_sixteen_byte_copies(compiled: tuple[Path, dict[int, str]]) -> None:
    disassembler = tool("cuobjdump")
    if disassembler is None:
        pytest.skip("no cuobjdump on this machine: the width of the copies is not checked")
    functions = []
    for source in SOURCES:
        command = [disassembler, "-sass", compiled[0] / f"{source}.sm_90.cubin"]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        functions += re.split(r"\n\s*Function : ", code)[1:]
    tiled = [
        function
        for function in functions
        if re.search(r"(filter|axial_conv|axial_conv_backward)_kernel", function.split(maxsplit=1)[0])
    ]
    assert tiled
    for function in tiled:
        name = demangled(function.split(maxsplit=1)[0])
        assert re.search(r"LDGSTS\.E\.BYPASS\S*128", function), f"{name} reads without 16-byte asynchronous copies"
        assert re.search(r"STG\.E\S*128", function), f"{name} writes without 16-byte stores"
        assert not re.search(r"\b(LDL|STL)\b", function), f"{name} uses local memory"
