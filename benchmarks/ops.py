"""radial_filter against `clone()` and against the FFT chains of other hands: forward, gradients, any radius, call overhead.

Every competitor computes the same filter, one profile for all channels. Each result is compared with the fp64
reference before it is timed; a competitor whose result is wrong, or that refuses, is recorded with its reason and not timed.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spanet_kernels import modes, radial_filter, reference
from spanet_kernels.testing import CASES, make_input, make_profile

from .peers import global_filter
from .record import Others
from .section import DTYPES, LAYOUTS, Options
from .timing import CallClock, Clock, clock_for, interleave

KINDS = ("forward", "backward x", "backward profile")
GROUPS = ("stages S", "stages B", "detection", "large", "radius")
LARGE = 2**27  # bytes of x that no last-level cache of a processor worth measuring holds
BLOCK = 8  # images repeat with this period, so that one reference of a block checks them all

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """One line of the benchmark: a problem and who competes on it."""

    group: str
    kind: str
    shape: tuple[int, int, int, int]
    radius: float
    dtype: str
    layout: str
    competitors: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.group}, {self.kind}, {'x'.join(map(str, self.shape))} r={self.radius:g} {self.dtype} {self.layout}"


def problems(full: bool, gpu: bool) -> Iterator[tuple[str, str, tuple[int, int, int, int], float]]:
    """Group, kind, shape and radius of every problem; a batch of 0 stands for as many images as make x LARGE."""
    for index, (image, radius) in enumerate(CASES["radial_filter"].time):
        group = GROUPS[index // 4]
        if group == "detection":
            batches: tuple[int, ...] = (1, 2) if full else (8,) if gpu else (1,)
        else:
            batches = (1, 8, 64, 128) if full else (128,) if gpu else (8,)
        for batch, kind in itertools.product(batches, KINDS if full or group == "stages S" else KINDS[:1]):
            yield group, kind, (batch, *image), radius
    image, radius = CASES["radial_filter"].time[0]
    for kind in KINDS:
        yield "large", kind, (0, *image), radius
    few = ((8, 64, 56, 56), (8, 64, 14, 14), (1, 64, 128, 128), (1, 8, 200, 334))
    for shape in ((128, 64, 56, 56), (128, 320, 14, 14), (8, 64, 200, 334)) if gpu else few:
        whole = math.ceil(math.hypot(shape[2] // 2, shape[3] // 2))
        for radius in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, whole):
            if radius <= whole and (full or radius not in (3, 6, 12, 24)):
                yield "radius", "forward", shape, radius


def rows(options: Options) -> list[Row]:
    """The rows of the "quick" or the "full" form; the quick one runs the first dtype and layout alone where time is short."""
    full, found, gpu = options.full, [], options.device.type == "cuda"
    for (group, kind, shape, radius), layout, dtype in itertools.product(problems(full, gpu), options.layouts, options.dtypes):
        first = dtype == options.dtypes[0] and layout == options.layouts[0]
        if not (full or first) and (group == "radius" or (group == "large" and kind != "forward")):
            continue
        competitors = ["ours", "rfft2", "clone"]
        if group != "radius" and (full or group != "large"):
            competitors.append("published")
        if group == "stages S" and (kind != "backward profile" if full else first and kind == "forward" and not gpu):
            competitors += ["compiled", "gfnet"]
        if shape[0] == 0:
            images = LARGE / (math.prod(shape[1:]) * DTYPES[dtype].itemsize)
            shape = (BLOCK * math.ceil(images / BLOCK), *shape[1:])
        found.append(Row(group, kind, shape, radius, dtype, layout, tuple(competitors)))
    return found


class Problem:
    """Tensors of a row, and the results that the specification wants, in fp64 and for one block of images."""

    def __init__(self, row: Row, device: torch.device) -> None:
        self.kind, self.radius, self.squared = row.kind, row.radius, modes.squared_radius(row.radius)
        batch, channels, self.height, self.width = row.shape
        dtype, self.block = DTYPES[row.dtype], math.gcd(batch, BLOCK)
        self.x, self.grad = (
            make_input((self.block, *row.shape[1:]), dtype, device=str(device), seed=seed)
            .repeat(batch // self.block, 1, 1, 1)
            .contiguous(memory_format=LAYOUTS[row.layout])
            for seed in (0, 1)
        )
        base, gain = make_profile(1, row.radius, dtype, device=str(device))
        self.base, self.gain = base.expand(channels), gain.expand(-1, channels)

    def wanted(self) -> Results:
        x, grad = self.x[: self.block].double(), self.grad[: self.block].double()
        if self.kind == "backward profile":
            repeats = len(self.x) // self.block
            return tuple(repeats * part for part in reference.radial_filter_backward(grad, x, self.squared))
        return (reference.radial_filter(x if self.kind == "forward" else grad, self.base.double(), self.gain.double(), self.squared),)

    def mask(self, base: Tensor, gain: Tensor) -> Tensor:
        """The mask the chains multiply with: (H, W), or (C, H, W) where its gradient per channel is wanted."""
        if self.kind != "backward profile":
            return reference.radial_mask(base[:1], gain[:, :1], self.height, self.width, self.squared)[0]
        return reference.radial_mask(base, gain, self.height, self.width, self.squared)


def published(x: Tensor, centred_mask: Tensor) -> Tensor:
    """The published chain; it refuses 16-bit input on most devices, so it gets and returns that through fp32."""
    return reference.published_chain(x.to(centred_mask.dtype), centred_mask).to(x.dtype)


def competitor(name: str, problem: Problem) -> Callable[[], Results]:
    """The function to check and to time: a forward pass, or the backward pass of a graph that is built here."""
    if name == "clone":
        source = problem.x if problem.kind == "forward" else problem.grad
        return lambda: (source.clone(),)
    x = problem.x.detach().requires_grad_(problem.kind == "backward x")
    base, gain = (part.detach().requires_grad_(problem.kind == "backward profile") for part in (problem.base, problem.gain))
    if name == "ours":

        def forward() -> Tensor:
            return radial_filter(x, base, gain, problem.radius)
    else:
        mask = problem.mask(base, gain)
        mask = torch.fft.fftshift(mask) if name in ("published", "compiled") else mask[..., : problem.width // 2 + 1].contiguous()
        chain = {"rfft2": reference.rfft2_chain, "gfnet": global_filter, "published": published, "compiled": published}[name]
        if name == "gfnet":  # its weight is complex, one per channel
            mask = mask.expand(x.shape[1], -1, -1).to(torch.complex64).contiguous()
        if name == "compiled":
            torch._dynamo.reset()  # one graph per row, without the limit on recompilations
            torch._functorch.config.donated_buffer = False  # a backward graph is to run many times
            chain = torch.compile(published, dynamic=False)

        def forward() -> Tensor:
            return chain(x, mask)

    if problem.kind == "forward":
        return lambda: (forward(),)
    y, leaves = forward(), (x,) if problem.kind == "backward x" else (base, gain)
    return lambda: torch.autograd.grad(y, leaves, problem.grad, retain_graph=True)


def check(results: Results, wanted: Results) -> tuple[float, float]:
    """Largest error of all results, as a part of the largest wanted value, and what is allowed of it.

    Allowed are one rounding to the result's dtype and 32 roundings in fp32.
    """
    worst, allowed = 0.0, 0.0
    for result, want in zip(results, wanted, strict=True):
        scale = want.abs().max().item()
        parts = result.split(len(want))
        error = max(torch.nan_to_num((part.double() - want).abs(), nan=math.inf).max().item() for part in parts) / scale
        bound = torch.finfo(result.dtype).eps / 2 + 32 * torch.finfo(torch.float32).eps
        if error / bound >= worst / (allowed or 1):
            worst, allowed = error, bound
    return worst, allowed


def reason(error: Exception) -> str:
    """First line of an error, short enough for a table."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]


def admit(
    functions: Mapping[str, Callable[[], Any]], wanted: Any, checker: Callable[..., tuple[float, float]]
) -> dict[str, dict[str, Any]]:
    """Run each function once: {"error", "bound"} for a right result, with "refused" for a wrong one or none. `clone` passes unchecked."""
    verdicts: dict[str, dict[str, Any]] = {}
    for name, function in functions.items():
        verdicts[name] = {}
        if name == "clone":
            continue
        try:
            error, bound = checker(function(), wanted)
        except Exception as failure:  # whatever a compiler or a library raises is the reason it does not compete
            verdicts[name] = {"refused": reason(failure)}
            continue
        verdicts[name] = {"error": error, "bound": bound}
        if not error <= bound:
            verdicts[name]["refused"] = f"wrong result: error {error:.1e} of the largest value, {bound:.1e} allowed"
    return verdicts


def measure(row: Row, device: torch.device, clock: Clock, budget: float) -> dict[str, Any]:
    """Check every competitor of a row, then time those that are right."""
    problem = Problem(row, device)
    functions: dict[str, Callable[[], Results]] = {}
    verdicts: dict[str, dict[str, Any]] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
        for name in row.competitors:
            try:
                functions[name] = competitor(name, problem)
            except Exception as failure:  # the graph of a backward row is built here, by a compiler too
                verdicts[name] = {"refused": reason(failure)}
        verdicts |= admit(functions, problem.wanted(), check)
    right = {name: function for name, function in functions.items() if "refused" not in verdicts[name]}
    with Others() as others:
        timings = interleave(right, clock, budget)
    for name, timing in timings.items():
        verdicts[name] |= timing.json()
    result = asdict(row) | {"name": row.name, "bytes": problem.x.nbytes, "busy cores of others": others.cores, "competitors": verdicts}
    if "published" in row.competitors and row.dtype != "fp32":
        result["published as it stands"] = refusal(problem)
    return result


def refusal(problem: Problem) -> str:
    """What the published chain answers to 16-bit input without casts."""
    try:
        reference.published_chain(problem.x[:1], torch.fft.fftshift(problem.mask(problem.base, problem.gain)))
    except RuntimeError as error:
        return f"refuses: {reason(error)}"
    return "runs"


def overhead(device: torch.device, samples: int) -> list[dict[str, Any]]:
    """Microseconds of host time of one call on 1 x 8 x 7 x 7, ours and `clone()` in the same mode."""
    results = []
    base, gain = make_profile(8, 1, torch.float32, device=str(device))
    for mode in ("inference_mode", "no_grad", "with gradients"):
        x = make_input((1, 8, 7, 7), torch.float32, device=str(device)).requires_grad_(mode == "with gradients")
        guard = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "with gradients": torch.enable_grad}[mode]
        functions = {"ours": lambda x=x: radial_filter(x, base, gain, 1), "clone": lambda x=x: x.clone()}
        with guard():
            timings = interleave(functions, CallClock(device), budget=math.inf, samples=samples)
        results.append({"mode": mode, "competitors": {name: timing.json() for name, timing in timings.items()}})
    return results


def run(chosen: list[Row], options: Options, advance: Callable[[str], None], result: dict[str, Any]) -> Iterator[None]:
    """Measure the chosen rows into result["rows"], then the call overhead."""
    clock = clock_for(options.device)
    budget = 2.0 if options.full else 0.1 if options.device.type == "cuda" else 0.3
    for row in chosen:
        advance(row.name)
        started = time.perf_counter()
        measured = measure(row, options.device, clock, budget)
        result["rows"].append(measured | {"seconds": round(time.perf_counter() - started, 2)})
        yield
    advance("call overhead")
    result["overhead"] = overhead(options.device, 101 if options.full else 25)
    yield


def wrong(result: dict[str, Any]) -> list[str]:
    verdicts = ((row["name"], row["competitors"]["ours"]) for row in result["rows"])
    return [f"{name}: {verdict['refused']}" for name, verdict in verdicts if "refused" in verdict]
