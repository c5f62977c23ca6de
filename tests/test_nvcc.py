"""The CUDA kernels in every architecture of the library, and as drivers compile its PTX: no stack, no local memory, 16-byte copies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

import spanet_kernels

LIBRARY = Path(spanet_kernels.__file__).parent / "_cuda.so"
Resources = dict[str, dict[str, dict[str, int]]]  # of each architecture the kernels, of each kernel REG, STACK, SHARED, LOCAL and others


def tool(name: str) -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(name, path=f"{home}/bin") if home else shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:  # Triton's wheel carries it
        triton = pytest.importorskip("triton", reason=f"no {name}, nor Triton's: the machine code of the CUDA kernels is not checked")
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if not bundled.exists():
            pytest.skip(f"no {name}, and none in Triton: the machine code of the CUDA kernels is not checked")
        found = str(bundled)
    return found


def dump(*options: str) -> str:
    """What cuobjdump says of the library."""
    if not LIBRARY.exists():
        pytest.skip("_cuda.so was not built: the machine code of the CUDA kernels is not checked")
    return subprocess.run([tool("cuobjdump"), *options, LIBRARY], capture_output=True, text=True, check=True).stdout


def demangled(name: str) -> str:
    """filter_kernel<float, 4, 2> from _ZN6spanet13filter_kernelIfLi4ELi2EEEv..., without a tool."""
    kernel = re.search(r"spanet\d+([a-z_]+_kernel)(?:I(.*?)EEv)?", name)
    assert kernel, name
    names = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16", "Lb0": "false", "Lb1": "true"}
    arguments = re.findall(r"Li(\d+)E|(Lb[01]|6__half|13__nv_bfloat16|[fd])", (kernel[2] or "") + "E")
    return f"{kernel[1]}<{', '.join(number or names[name] for number, name in arguments)}>" if arguments else kernel[1]


def parsed(usage: str) -> Resources:
    found: Resources = {}
    for part in re.split(r"\narch = ", usage)[1:]:
        kernels = re.findall(r"Function (\w+):\s*(REG:.*)", part)
        if kernels:  # none in a part that holds PTX
            of_architecture = found.setdefault(part.split(maxsplit=1)[0], {})
            of_architecture |= {demangled(name): {k: int(n) for k, n in re.findall(r"(\w+):(\d+)", line)} for name, line in kernels}
    return found


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> Resources:
    found = parsed(dump("--dump-resource-usage"))
    missing = [architecture for architecture in ("sm_100", "sm_120") if architecture not in found]
    folder = tmp_path_factory.mktemp("ptx")
    subprocess.run([tool("cuobjdump"), "-xptx", "all", LIBRARY], cwd=folder, capture_output=True, check=True)

    def assemble(case: tuple[str, Path]) -> Resources:
        architecture, source = case
        cubin = source.with_suffix(f".{architecture}.cubin")
        subprocess.run([tool("ptxas"), f"-arch={architecture}", source, "-o", cubin], check=True)
        usage = subprocess.run([tool("cuobjdump"), "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
        return parsed(f"\narch = {architecture}\n{usage}")

    with ThreadPoolExecutor(2) as pool:
        for kernels in pool.map(assemble, product(missing, folder.glob("*.ptx"))):
            for architecture, amounts in kernels.items():
                found.setdefault(architecture, {}).update(amounts)
    return found


def test_no_stack_and_no_local_memory(resources: Resources) -> None:
    """A kernel that spills has a stack frame."""
    assert {frozenset(kernels) for kernels in resources.values()} == {frozenset(resources["sm_100"])}, "an architecture lacks kernels"
    print("\nregisters (+ static shared memory, of which 1024 bytes are the system's from sm_90 on)")
    print(f"{'':46}" + "".join(f"{architecture:>10}" for architecture in resources))
    for name in sorted(set().union(*resources.values())):
        amounts = [kernels[name] for kernels in resources.values()]
        cells = [f"{of['REG']}+{of['SHARED']}B" if of["SHARED"] else f"{of['REG']}" for of in amounts]
        print(f"{name:46}" + "".join(f"{cell:>10}" for cell in cells))
    wrong = [
        f"{name} on {architecture}: {amounts[kind]} B {kind}"
        for architecture, kernels in resources.items()
        for name, amounts in kernels.items()
        for kind in ("STACK", "LOCAL")
        if amounts[kind]
    ]
    assert not wrong, "\n".join(wrong)


def test_sixteen_byte_copies(resources: Resources) -> None:
    architecture = "sm_90" if "sm_90" in resources else next(iter(resources))
    functions = re.split(r"\n\s*Function : ", dump("-sass", "-arch", architecture))[1:]
    tiled = [
        function for function in functions if re.search(r"(filter|axial_conv|axial_conv_backward)_kernel", function.split(maxsplit=1)[0])
    ]
    assert tiled
    for function in tiled:
        name = demangled(function.split(maxsplit=1)[0])
        assert re.search(r"LDGSTS\.E\.BYPASS\S*128", function), f"{name} reads without 16-byte asynchronous copies"
        assert re.search(r"STG\.E\S*128", function), f"{name} writes without 16-byte stores"
        assert not re.search(r"\b(LDL|STL)\b", function), f"{name} uses local memory"
