"""Whole models side by side: inference here, the training step by the same means in train.py.

Every model runs in the better of the layouts, with weights and images that 16-bit formats hold, so that one fp64 result judges
all dtypes: for SPANet that of the published network. Inference casts the model to the dtype, training casts by autocast.
Each row carries what the limit is made of: its matrix products run alone, its bytes, its FLOP.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .limit import Gemms, copy_rates
from .ops import reason
from .peers import MODELS, create, is_ours
from .record import Others, free_memory
from .section import DTYPES, LAYOUTS, Options
from .timing import Clock, WallClock, captured, clock_for, interleave
from .trace import Energy, Gemm, Trace, profiled, stage_times

SIZES = (192, 288, 384, 512, 768, 1024)
BUDGET = {"quick": 20.0, "full": 120.0}  # seconds to time the models of a group, on a GPU a third
TOGETHER = 8  # models that are timed in the same rounds
CHECKED = 2  # images whose logits are compared with those in fp64
# largest |result - fp64| / |fp64|, norms of vectors: five to ten times what the small models need
BOUNDS = {("infer", "fp32"): 4e-6, ("infer", "bf16"): 3e-2, ("infer", "fp16"): 4e-3}
BOUNDS |= {("train", "fp32"): 2e-5, ("train", "bf16"): 5e-2, ("train", "fp16"): 1e-2}
BATCH_NORM = 20  # times the bound for ResNets in training: norms over few images magnify every rounding on the way back to the stem

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """A model at one size, batch and dtype."""

    mode: str  # "infer" or "train"
    model: str
    size: int
    batch: int
    dtype: str
    compiled: bool  # measure torch.compile too

    @property
    def name(self) -> str:
        return f"{self.model}, {self.mode}, {self.size}x{self.size}, batch {self.batch}, {self.dtype}"


def rows(options: Options, mode: str = "infer") -> list[Row]:
    """Quick: the small models at 224 and batch 8 (GPU: 128). Full: every model over batches, the small ones over sizes too."""
    some = {"cpu": ((8,), (1, 8, 32)), "cuda": ((128,), (1, 8, 32, 128, 512, 1024))}
    batches = options.batches or some[options.device.type][options.full]
    problems = [(224, batch) for batch in batches]
    largest = max(batches)
    sizes = [(size, max(1, largest * 224**2 // size**2)) for size in SIZES] if options.full and mode == "infer" else []
    found = []
    for (size, batch), dtype in itertools.product((*problems, *sizes), options.dtypes):
        for name, peer in MODELS.items():
            if peer.quick or (options.full and size == 224):
                found.append(Row(mode, name, size, batch, dtype, options.full or options.compile))
    return found


def images(row: Row) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) values of mean 0.5 and (B,) labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(row.batch, 3, row.size, row.size, generator=generator) + 0.5
    return x.bfloat16().float(), torch.randint(1000, (row.batch,), generator=generator)


class Subject:
    """A model that runs a row: calling it gives what is checked.

    form: "eager"; "graph", the same as a CUDA graph; "compiled", on a GPU as a CUDA graph too.
    """

    def __init__(self, row: Row, model: nn.Module, dtype: torch.dtype, layout: str, device: torch.device, form: str = "eager") -> None:
        compiled = form == "compiled"
        self.mode, self.device = row.mode, device
        x, labels = images(row)
        held = torch.float32 if row.mode == "train" and dtype != torch.float64 else dtype
        self.model = copy.deepcopy(model).to(device, held).to(memory_format=LAYOUTS[layout]).train(row.mode == "train")
        self.x, self.labels = x.to(device, held, memory_format=LAYOUTS[layout]), labels.to(device)
        if compiled:
            torch._dynamo.reset()
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.autocast = torch.autocast(device.type, dtype, enabled=held != dtype)
        if compiled and row.mode == "infer" and device.type == "cpu":
            # the first call compiles: with weights that are constants, which Inductor packs for the matrix products
            with torch._inductor.config.patch(freezing=True), torch.inference_mode():
                self.forward(self.x)
        if row.mode == "train":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True, capturable=device.type == "cuda")
        self.run: Callable[[], Any] = captured(self.step) if form != "eager" and device.type == "cuda" else self.step

    def __call__(self) -> Results:
        results: Results = self.run()
        return results

    def step(self) -> Results:
        """An inference or a training step."""
        if self.mode == "infer":
            with torch.inference_mode():
                return (self.forward(self.x)[:CHECKED],)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            loss = nn.functional.cross_entropy(self.forward(self.x), self.labels)
        loss.backward()
        self.optimizer.step()
        first = next(parameter for parameter in self.model.parameters() if parameter.grad is not None)
        return loss.detach(), first.grad


Prepared = tuple[dict[str, Any], dict[str, Subject]]  # the record of a row without its times, and what is to be timed


def wanted(row: Row, model: nn.Module, device: torch.device) -> Results:
    """The results of a row in fp64."""
    subject = Subject(row, model, torch.float64, "nchw", device)
    if row.mode == "infer":
        subject.x = subject.x[:CHECKED]
    return tuple(result.cpu() for result in subject())


def check(results: Results, judge: Results) -> float:
    """Largest |result - wanted| / |wanted| of all results."""
    errors = ((y.double() - want).norm().item() / want.norm().item() for y, want in zip(results, judge, strict=True))
    return max(math.inf if math.isnan(error) else error for error in errors)


def trace(row: Row, model: nn.Module) -> Trace:
    """What the operators of a row do, from shapes alone."""
    dtype = torch.float32 if row.mode == "train" else DTYPES[row.dtype]

    def shape(value: Tensor) -> Tensor:
        return value.detach().to("meta", dtype if value.is_floating_point() else value.dtype)

    shapes = {name: shape(value).requires_grad_() for name, value in model.named_parameters()}
    shapes |= {name: shape(value) for name, value in model.named_buffers()}
    with torch.set_grad_enabled(row.mode == "train"), Trace() as found:
        y = functional_call(model, shapes, shape(images(row)[0]))
        if row.mode == "train":
            y.sum().backward()
    return found


def fitting(batch: int, one: int, free: int) -> int:
    """The batch, halved until images of `one` byte count each fit into nine tenths of what is free."""
    while batch > 1 and one * batch > 0.9 * free:
        batch //= 2
    return batch


class Bench:
    """Prepares rows and times them together."""

    def __init__(self, options: Options) -> None:
        self.options, self.device = options, options.device
        self.clock: Clock = clock_for(options.device)
        self.wall = WallClock(options.device)  # of models: without a graph a GPU can wait for the host
        self.gemms = Gemms(options.device, self.clock, 0.2 if options.full else 0.05)
        self.energy = Energy(options.device)
        self.judged: dict[tuple[str, str, int, int], tuple[Results, Counter[Gemm]]] = {}
        self.one_image: dict[tuple[str, str, int], int] = {}

    def prepare(self, row: Row) -> Prepared:
        """The record of a row without its times, and what is to be timed: each checked, in the better layout."""
        peer, asked = MODELS[row.model], row.batch
        model = create(row.model, row.size)
        row = replace(row, batch=fitting(asked, self._one_image(row, model) if asked > 1 else 0, free_memory(self.device)))
        record = asdict(row) | {"title": peer.title, "top1": peer.top1, "params": sum(p.numel() for p in model.parameters())}
        record |= {"name": replace(row, batch=asked).name, "asked batch": asked, "competitors": {}}
        judged, gemms = self._judged(row)
        subjects: dict[str, Subject] = {}
        probes: dict[str, float] = {}
        for layout in self.options.layouts:
            subject = self._admit("eager", record, row, model, judged, layout)
            if subject is None:
                return record, {}
            probes[layout] = min(self.wall.round([subject, subject]))
            if probes[layout] == min(probes.values()):
                subjects["eager"], record["layout"] = subject, layout
        self._limits(record, row, model, gemms, subjects["eager"])
        if self.device.type == "cuda" and (subject := self._admit("graph", record, row, model, judged, record["layout"])):
            subjects["graph"] = subject
        if row.compiled and (subject := self._admit("compiled", record, row, model, judged, record["layout"])):
            subjects["compiled"] = subject
        return record, subjects

    def _one_image(self, row: Row, model: nn.Module) -> int:
        """Peak bytes with one image, in the first dtype that asks."""
        key = (row.mode, row.model, row.size)
        if key not in self.one_image:
            subject = Subject(replace(row, batch=1), model, DTYPES[row.dtype], self.options.layouts[0], self.device)
            self.one_image[key] = profiled(subject, self.device).peak
        return self.one_image[key]

    def _judged(self, row: Row) -> tuple[Results, Counter[Gemm]]:
        """The results in fp64 and the matrix products of a row, SPANet's from the published network; computed once for all dtypes."""
        name = row.model.replace("spanet_", "published_")
        key = (row.mode, name, row.size, row.batch)
        if key not in self.judged:
            model = create(name, row.size)
            self.judged[key] = wanted(row, model, self.device), trace(row, model).gemms
        return self.judged[key]

    def _admit(self, form: str, record: dict[str, Any], row: Row, model: nn.Module, judge: Results, layout: str) -> Subject | None:
        """A subject whose first results are right; otherwise the reason is recorded."""
        bound = BOUNDS[row.mode, row.dtype] * (BATCH_NORM if row.mode == "train" and row.model.startswith("resnet") else 1)
        try:
            subject = Subject(row, model, DTYPES[row.dtype], layout, self.device, form)
            error = check(tuple(result.cpu() for result in subject()), judge)
        except Exception as failure:  # whatever a library or a compiler raises is the reason that it does not compete
            record["competitors"][form] = {"refused": f"{layout}: {reason(failure)}"}
            return None
        if not error <= bound:
            record["competitors"][form] = {"refused": f"wrong result in {layout}: error {error:.1e} of the norm, {bound:.1e} allowed"}
            return None
        record["competitors"][form] = {"error": error, "bound": bound}
        return subject

    def _limits(self, record: dict[str, Any], row: Row, model: nn.Module, gemms: Counter[Gemm], subject: Subject) -> None:
        """FLOP, bytes and seconds of the matrix products alone; peak memory; where the time goes; energy."""
        dtype = DTYPES[row.dtype]
        floor = sum(number * gemm.operands for gemm, number in gemms.items()) * dtype.itemsize
        subject.model.zero_grad()
        with stage_times(subject.model, self.device) as stages:
            measured = profiled(subject, self.device)
        record |= {"flop": 2 * sum(number * gemm.macs for gemm, number in gemms.items()), "floor bytes": floor}
        record |= {"touched bytes": trace(row, model).bytes, "gemm seconds": self.gemms.seconds(gemms, dtype)}
        record |= {"peak bytes": measured.peak, "kinds": measured.kinds, "stages": stages}
        record["joules"] = self.energy.per_call(subject, self.device, 0.3 if self.device.type == "cuda" else 1.0)

    def time(self, prepared: list[Prepared]) -> list[dict[str, Any]]:
        """Add the times of rows that competed together to their records."""
        functions = {(index, form): subject for index, (_, subjects) in enumerate(prepared) for form, subject in subjects.items()}
        budget = BUDGET[self.options.form] / (3 if self.device.type == "cuda" else 1)
        with Others() as others:
            timings = interleave(functions, self.wall, budget, samples=50, least=5) if functions else {}
        for (index, form), timing in timings.items():
            prepared[index][0]["competitors"][form] |= timing.json()
        return [record | {"busy cores of others": others.cores} for record, _ in prepared]


def groups(chosen: list[Row]) -> Iterator[list[Row]]:
    """Rows of one problem, at most TOGETHER at once."""
    for _, same in itertools.groupby(chosen, key=lambda row: (row.mode, row.size, row.batch, row.dtype)):
        rest = list(same)
        while rest:
            yield rest[:TOGETHER]
            rest = rest[TOGETHER:]


def run(chosen: list[Row], options: Options, advance: Callable[[str], None], result: dict[str, Any]) -> Iterator[None]:
    """Measure the copy rates, then row by row what is no time, then the times of the rows of a group together."""
    bench = Bench(options)
    advance("copy bandwidth")
    result["limit"] = {"bytes/s": copy_rates(options.device, bench.clock, 2.0 if options.full else 1.0), "flop/s": {}}
    yield
    for group in groups(chosen):
        prepared: list[Prepared] = []
        for row in group:
            advance(row.name)
            try:
                prepared.append(bench.prepare(row))
            except KeyboardInterrupt:
                if prepared:  # those before it are timed as well
                    measure(bench, prepared, advance, result)
                raise
            if row is group[-1]:
                measure(bench, prepared, advance, result)
            yield


def measure(bench: Bench, prepared: list[Prepared], advance: Callable[[str], None], result: dict[str, Any]) -> None:
    """Add the rows of a group to a result, timed together."""
    advance(f"timing {len(prepared)} models together")
    result["rows"] += bench.time(prepared)
    dtype = prepared[0][0]["dtype"]
    result["limit"]["flop/s"][dtype] = bench.gemms.best_rate(DTYPES[dtype])


def wrong(result: dict[str, Any]) -> list[str]:
    """Refusals of SPANet."""
    found = ((row, form, verdict) for row in result["rows"] if is_ours(row["model"]) for form, verdict in row["competitors"].items())
    return [f"{row['name']}, {form}: {verdict['refused']}" for row, form, verdict in found if "refused" in verdict]
