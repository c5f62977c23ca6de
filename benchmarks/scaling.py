"""Cost against one axis at a time: size, radius, channels, batch, threads; and training on several processes.

A row is a curve; its competitors are its points, timed in the same rounds. The report fits the exponents.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spanet_kernels import SPAM, axial_conv, modes, radial_filter, reference, spectral_gate
from spanet_kernels.testing import make_input, make_profile

from .models import BOUNDS
from .peers import Mixer
from .record import ROOT, Others
from .section import DTYPES, LAYOUTS, Options
from .timing import clock_for, interleave

Shape = tuple[int, int, int, int]
Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]  # what is timed, and what judges it in fp64

# axis to its values, the problem at a value, and the exponent of the cost that memory traffic or arithmetic alone would have
AXES: dict[str, tuple[tuple[int, ...], Callable[[int], tuple[Shape, float]], float]] = {
    "pixels": ((7, 14, 28, 56, 112, 224, 512), lambda n: ((1, 64, n, n), 2), 1),
    "radius": ((0, 1, 2, 4, 8, 16, 40), lambda n: ((4, 64, 56, 56), n), 1),
    "channels": ((16, 32, 64, 128, 256, 512), lambda n: ((4, n, 28, 28), 2), 1),
    "batch": ((1, 2, 4, 8, 16, 32, 64), lambda n: ((n, 64, 28, 28), 2), 1),
    "threads": ((1, 2, 4, 8, 16, 32, 64), lambda n: ((8, 64, 56, 56), 2), -1),
}


def filter_pair(x: Tensor, radius: float) -> Pair:
    base, gain = make_profile(x.shape[1], radius, x.dtype, device=str(x.device))
    exact = (x.double(), base.double(), gain.double(), modes.squared_radius(radius))
    return lambda: radial_filter(x, base, gain, radius), lambda: reference.radial_filter(*exact)


def conv_pair(x: Tensor, radius: float) -> Pair:
    layer = SPAM(x.shape[1]).to(x.device, x.dtype).requires_grad_(False)
    row, column = layer.conv
    parts = (row.weight, row.bias, column.weight, column.bias)
    exact = copy.deepcopy(layer.conv).double()
    return lambda: axial_conv(x, *parts)[0], lambda: exact(x.double())


def gate_pair(x: Tensor, radius: float) -> Pair:
    base, gain = make_profile(x.shape[1], radius, x.dtype, device=str(x.device))
    weight, bias = make_input((1, 1, x.shape[1], x.shape[1]), x.dtype, device=str(x.device))[0, 0] / x.shape[1], x.new_ones(x.shape[1])
    exact = tuple(part.double() for part in (weight, bias, base, gain))
    squared = modes.squared_radius(radius)
    return (
        lambda: spectral_gate(x, weight, bias, base, gain, radius),
        lambda: reference.spectral_gate(x.double(), x.new_empty(0), *exact, squared),
    )


def layer_pair(x: Tensor, radius: float) -> Pair:
    layer = SPAM(x.shape[1], radius=radius).to(x.device, x.dtype).requires_grad_(False)
    published = Mixer(x.shape[1], radius).to(x.device)
    published.load_state_dict(layer.state_dict())
    return lambda: layer(x), lambda: published.double()(x.double())


PAIRS = {"radial_filter": filter_pair, "axial_conv": conv_pair, "spectral_gate": gate_pair, "SPAM": layer_pair}


@dataclass(frozen=True)
class Row:
    """One curve."""

    function: str
    axis: str
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        return f"{self.function} against {self.axis}, {self.dtype} {self.layout}"


def rows(options: Options) -> list[Row]:
    """Quick: the first dtype and layout; the other operators along the axes that matter to them."""
    axes = [axis for axis in AXES if axis != "threads" or options.device.type == "cpu"]
    return [
        Row(function, axis, dtype, layout)
        for dtype in (options.dtypes if options.full else options.dtypes[:1])
        for layout in (options.layouts if options.full else options.layouts[-1:])
        for function in PAIRS
        for axis in axes
        if axis != "radius" or function == "radial_filter"
    ]


def points(row: Row, options: Options) -> dict[int, Pair]:
    """What runs at each value of a curve."""
    values, problem, _ = AXES[row.axis]
    found = {}
    for value in values:
        if row.axis == "threads" and value > torch.get_num_threads():
            break
        torch.manual_seed(0)
        shape, radius = problem(value)
        x = make_input(shape, DTYPES[row.dtype], device=str(options.device)).contiguous(memory_format=LAYOUTS[row.layout])
        found[value] = PAIRS[row.function](x, radius)
    return found


def measure(row: Row, options: Options) -> dict[str, Any]:
    """Check and time every point of a curve."""
    bound = BOUNDS["infer", row.dtype]
    verdicts: dict[str, dict[str, Any]] = {}
    functions = {}
    for value, (function, wanted) in points(row, options).items():
        judge = wanted()
        error = ((function().double() - judge).norm() / judge.norm()).item()
        verdicts[f"ours {value}"] = {"error": error, "bound": bound}
        if error <= bound:
            functions[value] = function
        else:
            verdicts[f"ours {value}"]["refused"] = f"wrong result: error {error:.1e} of the norm, {bound:.1e} allowed"
    clock, budget = clock_for(options.device), 10.0 if options.full else 1.0
    with Others() as others, torch.inference_mode():
        if row.axis == "threads":
            timings = {}
            threads = torch.get_num_threads()
            for value, function in functions.items():
                torch.set_num_threads(value)
                timings |= interleave({str(value): function}, clock, budget / len(functions))
            torch.set_num_threads(threads)
        else:
            timings = interleave({str(value): function for value, function in functions.items()}, clock, budget) if functions else {}
    for value, timing in timings.items():
        verdicts[f"ours {value}"] |= timing.json()
    return asdict(row) | {"name": row.name, "busy cores of others": others.cores, "competitors": verdicts}


def expected(row: dict[str, Any]) -> float:
    """The exponent that arithmetic or memory traffic alone would have; the products of gates are C x C."""
    return 2 if row["axis"] == "channels" and row["function"] in ("spectral_gate", "SPAM") else AXES[row["axis"]][2]


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log values by least squares, over the upper half of the values, where call overhead matters least."""
    half = len(values) // 2 if len(values) > 3 else 0
    x, y = ([math.log(value) for value in part[half:]] for part in (values, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def abscissa(axis: str, value: int) -> int:
    """What the cost should be proportional to: pixels of a side, cosines and sines of a radius."""
    return {"pixels": value**2, "radius": 2 * value + 1}.get(axis, value)


def data_parallel(options: Options) -> list[dict[str, Any]]:
    """Training steps of SPANet-S by torchrun on 1, 2, 4, ... processes with the same work each: one thread each, or one GPU."""
    most = torch.cuda.device_count() if options.device.type == "cuda" else torch.get_num_threads()
    found = []
    for processes in (1 << index for index in range(most.bit_length())):
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
        launch += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m", "benchmarks.parallel", options.device.type]
        done = subprocess.run(launch, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
        if done.returncode:
            found.append({"processes": processes, "refused": (done.stderr.strip().splitlines() or ["no reason given"])[-1][:160]})
        else:
            found.append({"processes": processes} | json.loads(done.stdout.strip().splitlines()[-1]))
    return found


def run(chosen: list[Row], options: Options, advance: Callable[[str], None], result: dict[str, Any]) -> Iterator[None]:
    """Measure the chosen curves, then data-parallel training."""
    for row in chosen:
        advance(row.name)
        result["rows"].append(measure(row, options))
        yield
    advance("data-parallel training")
    result["data parallel"] = data_parallel(options)
    yield


def wrong(result: dict[str, Any]) -> list[str]:
    found = ((row["name"], point, verdict) for row in result["rows"] for point, verdict in row["competitors"].items())
    return [f"{name}, {point}: {verdict['refused']}" for name, point, verdict in found if "refused" in verdict]
