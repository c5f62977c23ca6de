"""Every Triton kernel compiled ahead of time, without a GPU, at the launches of the launchers: no spills, shared memory that fits."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")


class Case(NamedTuple):
    file: str
    target: str
    dtype: str
    channels: int
    height: int
    width: int
    radius_squared: int
    channels_last: bool


class Row(NamedTuple):
    """Resources of one compiled kernel; spill is in bytes of stack per thread (NVIDIA) or in vector registers (AMD)."""

    case: Case
    kernel: str
    registers: int
    shared: int
    spill: int


SHAPES = ((56, 56), (14, 14), (7, 7), (200, 334))
DTYPES = ("float32", "bfloat16", "float64", "float16")
OTHERS = ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx90a", "gfx942")
# sm_90 gets the shapes and layouts at the published radii (16 bits at the larger one, of which the smaller one is a part),
# every other target a plane on chip and a streamed one at a large radius
CASES = [
    Case("radial_filter", "sm_90", dtype, 64, *shape, radius_squared, last)
    for (dtype, radius_squared), shape, last in product((("float32", 1), ("bfloat16", 4)), SHAPES, (False, True))
    if not (last and shape == (200, 334))  # the same launch as 56 x 56
] + [
    Case("radial_filter", target, DTYPES[(i + j) % 4], 64, *shape, 64, last)
    for i, target in enumerate(OTHERS)
    for j, (shape, last) in enumerate((((14, 14), True) if i % 2 else ((56, 56), False), ((200, 334), i % 4 > 1)))
]
CASES += [
    Case("spectral_gate", "sm_90", "bfloat16", 64, 56, 56, 4, False),
    Case("spectral_gate", "sm_90", "bfloat16", 512, 7, 7, 1, True),
    Case("spectral_gate", "sm_90", "float16", 320, 14, 14, 1, False),
    *(
        Case("spectral_gate", t, DTYPES[1 + i % 2 * 2], 128, 28, 28, 9, i % 4 < 2) for i, t in enumerate(("sm_90", *OTHERS))
    ),  # the largest tiles
]
CASES += [
    Case(file, target, DTYPES[(i + 1) % 2], 320, 14, 14, 0, i % 2 == 0)
    for i, target in enumerate(("sm_90", *OTHERS))
    for file in ("image_norm", "gelu", "pointwise_pair")
]
CASES += [  # a pair of products in one launch
    Case("pointwise_pair", target, DTYPES[1 + i % 2 * 2], 64 << i % 2, 14, 14, 0, True)
    for i, target in enumerate(("sm_90", "sm_90", *OTHERS))
]
# bytes that a program may use
SHARED = dict(sm_80=166912, sm_86=101376, sm_89=101376, sm_90=232448, sm_100=232448, sm_120=101376, gfx90a=65536, gfx942=65536)


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def compile_case(case: Case) -> list[Row]:
    """Run the launchers of a file on CPU tensors with recorders for kernels, then compile what they would have launched."""
    from triton.runtime.jit import JITFunction

    module, tiles = (importlib.import_module(f"spanet_kernels.triton_kernels.{name}") for name in (case.file, "tiles"))
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    with pytest.MonkeyPatch.context() as patch:
        others = (importlib.import_module(f"spanet_kernels.triton_kernels.{name}") for name in ("column_sums", "image_moments"))
        for place in (module, *others):
            for name, kernel in list(vars(place).items()):
                if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                    patch.setattr(place, name, Recorder(kernel, launches))
        if hasattr(module, "AMD"):
            patch.setattr(module, "AMD", case.target.startswith("gfx"))
            patch.setattr(tiles, "architecture", lambda: case.target)
            tiles._measured.cache_clear()
            module.plan.cache_clear()
            getattr(module, "pair_plan", module.plan).cache_clear()
        run_launchers(module, case)
    return [Row(case, kernel.__name__, *resources(case.target, kernel, args, kwargs)) for kernel, args, kwargs in launches]


def run_launchers(module: Any, case: Case) -> None:
    """Call every operator of the file."""
    from spanet_kernels import modes

    dtype, channels, squared = getattr(torch, case.dtype), case.channels, case.radius_squared
    x = torch.empty((2, channels, case.height, case.width), dtype=dtype)
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    profile = torch.ones((len(modes.shells(squared)), channels), dtype=modes.profile_dtype(dtype))
    if case.file == "radial_filter":
        module.radial_filter(x, profile[0], profile, squared)
        module.radial_filter_backward(x, x, squared)
    elif case.file == "image_norm":
        moments = module.image_norm(x, profile[0], profile[0], 1e-5)[1]
        module.image_norm_backward(x, x, moments, profile[0])
    elif case.file == "pointwise_pair":
        half = x.to(dtype if x.element_size() == 2 else torch.float16, memory_format=torch.channels_last)
        weights = (
            half.new_empty(4 * channels, channels),
            half.new_empty(4 * channels),
            half.new_empty(channels, 4 * channels),
            half.new_empty(channels),
        )
        moments = importlib.import_module("spanet_kernels.triton_kernels.image_moments").image_moments(half, 1e-5)
        module.pointwise_pair(torch.empty_like(half), half, moments, weights[3], weights[3], None, half, weights[3], *weights)
    elif case.file == "gelu":
        rows = torch.empty((40, channels), dtype=dtype)
        module.gelu(rows, None if case.channels_last else profile[0], rows.clone())
        module.gelu(rows, None, None)
    else:
        zhat = profile.new_empty(*x.shape[:2], *(modes.functions(n, squared) for n in x.shape[2:]))
        weight = torch.empty((channels, channels), dtype=dtype)
        module.spectral_gate(x, zhat, weight, weight[0], profile[0], profile, squared)
        module.spectral_gate_backward(x, x, zhat, weight, weight[0], profile[0], profile, squared, True)


def resources(target: str, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int, int]:
    """Registers, shared memory and spills of a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {name: kwargs[name] for name in kwargs if name in kernel.arg_names}
    for i, (name, value) in enumerate(values.items()):
        if isinstance(value, torch.Tensor):
            signature[name] = (
                "*"
                + {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64", "int64": "i64"}[
                    str(value.dtype).removeprefix("torch.")
                ]
            )
        elif i >= len(args) or value == 1 or value is None:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if signature[name].startswith("*") or (signature[name] == "i32" and value % 16 == 0):
            attributes[i,] = [["tt.divisibility", 16]]
    where = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm") else GPUTarget("hip", target, 64)
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=where, options=options)
    if target.startswith("sm"):
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        path = os.path.join(os.environ["TRITON_CACHE_DIR"], f"{os.getpid()}.cubin")
        with open(path, "wb") as file:
            file.write(compiled.asm["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
        registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
    else:
        usage = compiled.asm["amdgcn"]
        registers, stack = re.search(r"\.vgpr_count:\s+(\d+)", usage), re.search(r"\.vgpr_spill_count:\s+(\d+)", usage)
    if registers is None or stack is None:
        raise AssertionError(usage)
    return int(registers[1]), compiled.metadata.shared, int(stack[1])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.delenv("TRITON_INTERPRET", raising=False)
        # fresh processes: Triton reads its environment when it is imported
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            return [row for rows in pool.map(compile_case, CASES) for row in rows]


def table(rows: list[Row]) -> str:
    lines = [f"{'target':8}{'dtype':10}{'plane':>9} {'r^2':>4} {'layout':14}{'kernel':26}{'registers':>9} {'shared':>7} {'spill':>6}"]
    for case, kernel, registers, shared, spill in dict.fromkeys(rows):
        layout = "channels_last" if case.channels_last else "contiguous"
        plane = f"{case.height}x{case.width}"
        lines.append(
            f"{case.target:8}{case.dtype:10}{plane:>9} {case.radius_squared:4} {layout:14}{kernel:26}{registers:9} {shared:7} {spill:6}"
        )
    return "\n".join(lines)


def test_no_kernel_spills(rows: list[Row]) -> None:
    print(table(rows))
    spilling = [row for row in rows if row.spill]
    assert not spilling, "\n" + table(spilling)


def test_shared_memory_fits(rows: list[Row]) -> None:
    assert not [row for row in rows if row.shared > SHARED[row.case.target]]


def test_every_kernel_met_every_target(rows: list[Row]) -> None:
    assert {(row.case.target, row.kernel) for row in rows} == set(product(("sm_90", *OTHERS), {row.kernel for row in rows}))
    assert len({row.kernel for row in rows}) == 21
