"""CUDA kernels on the host: compiled with the address and undefined-behaviour sanitizers, run on one case at a time.

cuda_on_host/shim.h runs a block as one fiber per thread; every case runs in both orders of threads and must give the
same bits. The error rule: at most 1.25 times (max) and 1.0 times (rms) the error of the reference in the same dtype.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
ELEMENTS = {torch.float64: "double", torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16"}
DTYPES = list(ELEMENTS)
H200_SHARED = 227 << 10
FLAGS = [
    "-std=c++20",
    "-Og",  # compiles in two thirds of the time of -O1, and cases run as fast
    "-g1",  # lines, all that a report shows
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]


def compile_programs(name: str, folder: Path) -> Path:
    """Compile cuda_on_host/NAME.cpp into folder, one program per dtype."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no host compiler: {compiler} not found")
    source = ROOT / "tests" / "cuda_on_host" / f"{name}.cpp"

    def compile_for(dtype: torch.dtype) -> None:
        element = f"-DELEMENT={ELEMENTS[dtype]}"
        subprocess.run(
            [compiler, *FLAGS, element, f"-I{ROOT / 'csrc'}", f"-I{source.parent}", "-o", folder / str(dtype), source], check=True
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_for, ELEMENTS))
    return folder


def run_case(programs: Path, folder: Path, dtype: torch.dtype, header: list[int], *inputs: Tensor) -> bytearray:
    """The bytes of the results of one case; header is what the program reads before the inputs."""
    (folder / "case").write_bytes(struct.pack(f"<{len(header)}q", *header) + b"".join(map(packed, inputs)))
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([programs / str(dtype), folder / "case", folder / "result"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return bytearray((folder / "result").read_bytes())


def packed(t: Tensor) -> bytes:
    """Element size and the whole storage with offset and strides, padded to four dimensions."""
    storage = torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    data = storage.contiguous().view(torch.uint8).numpy().tobytes() if storage.numel() else b""
    return struct.pack("<7q", t.element_size(), storage.numel(), t.storage_offset(), *t.stride(), *[0] * (4 - t.dim())) + data


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Random with a mean, which is a mode of the disc."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.7).to(dtype)


def check(actual: Tensor, same_dtype: Tensor, exact: Tensor, units: float = 1) -> None:
    """1.25 x max and 1.0 x rms of the same-dtype error, and so many units of the largest value's last place (rms: a quarter)."""
    assert actual.shape == exact.shape
    assert not actual.isnan().any(), "elements were not written"
    if exact.numel() == 0:
        return
    error, yardstick = (actual.double() - exact).abs(), (same_dtype.double() - exact).abs()
    unit = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    if actual.dtype == torch.float64:  # the judge itself computes in fp64
        units = 16
    assert error.max() <= 1.25 * yardstick.max() + units * unit, (
        f"max error {error.max():.3e}, reference {yardstick.max():.3e}, unit {unit:.3e}"
    )
    rms, allowed = error.square().mean().sqrt(), yardstick.square().mean().sqrt()
    assert rms <= allowed + units / 4 * unit, f"rms error {rms:.3e}, reference {allowed:.3e}, unit {unit:.3e}"


def arrange(x: Tensor, layout: str) -> Tensor:
    """x with the strides that the layout names."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # every second row and a column less of a larger tensor
        larger = x.new_full((x.shape[0], x.shape[1] + 2, 2 * x.shape[2], x.shape[3] + 1), 3)
        view = larger[:, 1:-1, ::2, 1:]
        view.copy_(x)
        return view
    if layout == "channel_slice":  # some channels of a wider channels_last tensor
        larger = x.new_full((x.shape[0], x.shape[1] + 16, *x.shape[2:]), 3).contiguous(memory_format=torch.channels_last)
        view = larger[:, 8:-8]
        view.copy_(x)
        return view
    if layout == "odd":  # an odd storage offset
        view = x.new_full((x.numel() + 1,), 3)[1:].view(x.shape)
        view.copy_(x)
        return view
    if layout == "expanded":
        return x[:1, :, :, :1].expand(x.shape)
    return x.contiguous()
