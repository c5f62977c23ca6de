"""The SPAM layer at the stages of SPANet: forward, and forward with backward, against the published layer and against its own limit.

    ours         SPAM
    no filter    the same layer, its gates too, with the filters removed
    published    the layer of the published code on the same weights, eager; 16-bit input goes through fp32 for the transforms
    compiled     the same under torch.compile
    gemms        the matrix products of the layer alone

Results are compared with those of the published layer in fp64 before anything is timed. On a GPU each is timed as a CUDA graph.
"""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spanet_kernels import SPAM

from .ops import admit
from .peers import Mixer
from .record import Others
from .section import DTYPES, LAYOUTS, Options
from .timing import Clock, captured, clock_for, interleave
from .trace import Trace, profiled

STAGES = {
    "S": ((64, 56, 2), (128, 28, 2), (320, 14, 1), (512, 7, 1)),
    "B": ((96, 56, 2), (192, 28, 2), (384, 14, 1), (768, 7, 1)),
}
KINDS = ("forward", "training")
COMPETITORS = ("ours", "no filter", "published", "compiled", "gemms")
# largest |result - fp64| / |fp64|, norms of tensors
BOUNDS = {("forward", "fp32"): 1e-5, ("forward", "bf16"): 3e-2, ("forward", "fp16"): 4e-3}
BOUNDS |= {("training", "fp32"): 1e-4, ("training", "bf16"): 1e-1, ("training", "fp16"): 2e-2}

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """A stage of a model in one dtype and layout."""

    model: str
    stage: int
    kind: str
    shape: tuple[int, int, int, int]
    radius: float
    dtype: str
    layout: str
    compiled: bool  # measure torch.compile of the published layer too, which takes long to compile

    @property
    def name(self) -> str:
        return f"SPAM {self.model}, stage {self.stage}, {self.kind}, {'x'.join(map(str, self.shape))} {self.dtype} {self.layout}"


def rows(options: Options) -> list[Row]:
    """Quick: S at 8 images, on a GPU at 128. Full: S and B at 8 and 128 images, on a GPU; 1 and 8 on a CPU."""
    gpu = options.device.type == "cuda"
    batches = options.batches or (((8, 128) if options.full else (128,)) if gpu else (1, 8) if options.full else (8,))
    models = ("S", "B") if options.full else ("S",)
    return [
        Row(
            model, stage, kind, (batch, channels, size, size), radius, dtype, layout, options.full or options.compile or (first and not gpu)
        )
        for batch, model, kind in itertools.product(batches, models, KINDS)
        for stage, (channels, size, radius) in enumerate(STAGES[model], 1)
        for dtype, layout in itertools.product(options.dtypes, options.layouts)
        for first in [dtype == options.dtypes[0] and layout == options.layouts[0]]
    ]


class Problem:
    """Layers that share their weights, and the input, of a row; all values are such that 16-bit formats hold them."""

    def __init__(self, row: Row, device: torch.device) -> None:
        torch.manual_seed(0)
        self.kind, dim = row.kind, row.shape[1]
        dtype, layout = DTYPES[row.dtype], LAYOUTS[row.layout]
        judge = Mixer(dim, row.radius)
        state = {key: value.bfloat16() for key, value in judge.state_dict().items()}
        x, self.grad = ((torch.randn(row.shape) + 0.5).bfloat16().to(device, dtype).contiguous(memory_format=layout) for _ in range(2))
        self.x = x.requires_grad_(row.kind == "training")
        self.layers: dict[str, nn.Module] = {"ours": SPAM(dim, radius=row.radius), "published": Mixer(dim, row.radius)}
        for layer in self.layers.values():
            layer.load_state_dict(state)
            layer.to(device, dtype)
        self.layers["no filter"] = copy.deepcopy(self.layers["ours"])
        self.layers["no filter"].lams = ()
        torch._dynamo.reset()  # one graph per row, without the limit on recompilations
        torch._functorch.config.donated_buffer = False  # a backward graph is to run many times
        self.layers["compiled"] = torch.compile(self.layers["published"], dynamic=False)
        judge.load_state_dict(state)
        self.judge = judge.to(device).double()

    def wanted(self) -> Results:
        x = self.x.detach().double().requires_grad_(self.kind == "training")
        return run_layer(self.judge, x, self.grad.double(), self.kind)

    def function(self, name: str) -> Callable[[], Results]:
        if name == "gemms":
            return self.gemms
        return lambda: run_layer(self.layers[name], self.x, self.grad, self.kind)

    def gemms(self) -> Results:
        """Three products forward; of each, the gradients of both factors."""
        rows_ = self.x.detach().movedim(1, -1).flatten(0, 2)
        weight = self.layers["ours"].proj_in.weight.detach()[:, :, 0, 0]
        products = [torch.mm(rows_, weight) for _ in range(3)]
        if self.kind == "training":
            products += [torch.mm(rows_, weight) for _ in range(3)] + [torch.mm(rows_.mT, rows_) for _ in range(3)]
        return tuple(products)


def run_layer(layer: nn.Module, x: Tensor, grad: Tensor, kind: str) -> Results:
    """The output; or the gradients of x and of every parameter, by name."""
    if kind == "forward":
        with torch.inference_mode():
            return (layer(x),)
    parameters = dict(sorted(layer.named_parameters()))
    return torch.autograd.grad(layer(x), [x, *parameters.values()], grad)


def checker(row: Row) -> Callable[[Results, Results], tuple[float, float]]:
    def check(results: Results, wanted: Results) -> tuple[float, float]:
        errors = [
            float((result.double() - want).norm() / want.norm().clamp(min=1e-30)) for result, want in zip(results, wanted, strict=True)
        ]
        return max(errors), BOUNDS[row.kind, row.dtype]

    return check


def measure(row: Row, device: torch.device, clock: Clock, budget: float) -> dict[str, Any]:
    """Check what computes the layer, then time everything; bytes and peak memory of one call each."""
    problem = Problem(row, device)
    competitors = [name for name in COMPETITORS if name != "compiled" or row.compiled]
    functions = {name: problem.function(name) for name in competitors}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
        checked = {name: functions[name] for name in ("ours", "published", "compiled") if name in functions}
        verdicts = admit(checked, problem.wanted(), checker(row)) | {"no filter": {}, "gemms": {}}
    right = {name: functions[name] for name in competitors if "refused" not in verdicts[name]}
    if device.type == "cuda":
        right = {name: captured(function) for name, function in right.items()}
    with Others() as others:
        timings = interleave(right, clock, budget)
    floor = (2 if row.kind == "forward" else 4) * problem.x.nbytes  # x and y; and their gradients
    for name, timing in timings.items():
        verdicts[name] |= timing.json()
        if name != "gemms":
            verdicts[name]["peak"] = profiled(functions[name], device).peak
        if name in ("ours", "no filter", "published"):
            with Trace() as trace:
                functions[name]()
            verdicts[name]["bytes over floor"] = round(trace.bytes / floor, 2)
    return asdict(row) | {"name": row.name, "bytes": problem.x.nbytes, "busy cores of others": others.cores, "competitors": verdicts}


def run(chosen: list[Row], options: Options, advance: Callable[[str], None], result: dict[str, Any]) -> Iterator[None]:
    """Measure the chosen rows into result["rows"]."""
    clock = clock_for(options.device)
    for row in chosen:
        advance(row.name)
        started = time.perf_counter()
        measured = measure(row, options.device, clock, 3.0 if options.full else 0.2 if options.device.type == "cuda" else 0.8)
        result["rows"].append(measured | {"seconds": round(time.perf_counter() - started, 2)})
        yield
    yield


def wrong(result: dict[str, Any]) -> list[str]:
    verdicts = ((row["name"], row["competitors"]["ours"]) for row in result["rows"])
    return [f"{name}: {verdict['refused']}" for name, verdict in verdicts if "refused" in verdict]
