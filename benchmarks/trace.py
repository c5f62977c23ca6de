"""What a call does: its matrix products, the bytes its operators touch, its peak memory, where its time goes, its energy."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Gemm(NamedTuple):
    """count products (m, k) (k, n) at once."""

    count: int
    m: int
    n: int
    k: int

    @property
    def macs(self) -> int:
        return math.prod(self)

    @property
    def operands(self) -> int:
        """Values read and written once."""
        return self.count * (self.m * self.k + self.k * self.n + self.m * self.n)


def gemms_of(operator: Any, arguments: tuple[Any, ...], result: Any) -> list[Gemm]:
    """The matrix products behind an operator call; a convolution with one channel per group is none."""
    operator = operator.overloadpacket
    if operator in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
        a, b = arguments[-2:]
        return [Gemm(math.prod(a.shape[:-2]), a.shape[-2], b.shape[-1], a.shape[-1])]
    if operator in (aten.convolution, aten.convolution_backward):
        forward = operator is aten.convolution
        weight, groups = (arguments[1], arguments[8]) if forward else (arguments[2], arguments[9])
        channels, depth = weight.shape[0], math.prod(weight.shape[1:])
        pixels = (result if forward else arguments[0]).numel() // channels
        each = channels // groups
        if weight.shape[1] == 1:
            return []
        if forward:
            return [Gemm(groups, pixels, each, depth)]
        wanted = (Gemm(groups, pixels, depth, each), Gemm(groups, each, depth, pixels))
        return [gemm for gemm, needed in zip(wanted, arguments[10], strict=False) if needed]
    if "scaled_dot_product" in str(operator):
        query, key, value = arguments[:3]
        count, (m, k), n = math.prod(query.shape[:-2]), query.shape[-2:], key.shape[-2]
        return [Gemm(count, m, n, k), Gemm(count, m, value.shape[-1], n)]
    return []


@dataclass
class Trace(TorchDispatchMode):
    """Counts matrix products, and the bytes of tensors that operators read and write; views and new memory are neither."""

    gemms: Counter[Gemm] = field(default_factory=Counter)
    bytes: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.gemms.update(gemms_of(func, args, result))
        if not (func.is_view or "empty" in func.name()):
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
        return result


KINDS = {  # a part of an operator's name, to what it is shown as; the first that fits
    "spanet_kernels::pointwise_pair": "matrix products",
    "spanet_kernels::outer_sum": "matrix products",
    "spanet_kernels::pointwise_mlp": "matrix products",
    "spanet_kernels::mixer_branch": "SPAM layers",  # products, filter and all
    "spanet_kernels::image_moments": "norms",
    "spanet_kernels::branch_": "norms",  # and the sums of residual branches
    "spanet_kernels::gelu": "activations",
    "spanet_kernels::": "SPAM kernels",
    "linear": "matrix products",
    "fft": "FFT",
    "conv": "convolutions",
    "mm": "matrix products",
    "scaled_dot": "attention",
    "softmax": "attention",
    "norm": "norms",
    "gelu": "activations",
    "relu": "activations",
    "copy": "copies",
    "cat": "copies",
    "roll": "copies",
    "pool": "pooling",
    "add": "sums and products",
    "mul": "sums and products",
    "sub": "sums and products",
}


def kind_of(operator: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in operator), "other")


class Profile(NamedTuple):
    peak: int  # bytes allocated at once during the call, above what was there before
    kinds: dict[str, float]  # seconds in operators by kind


def profiled(function: Callable[[], object], device: torch.device) -> Profile:
    """One call under the profiler."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        function()
    kinds: Counter[str] = Counter()
    for entry in profiler.key_averages():
        kinds[kind_of(entry.key)] += (entry.self_device_time_total if device.type == "cuda" else entry.self_cpu_time_total) / 1e6
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        events = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
        now = peak = 0
        for _, change in events:
            now += change
            peak = max(peak, now)
    return Profile(peak, {kind: seconds for kind, seconds in kinds.most_common() if seconds > 0})


@contextmanager
def stage_times(model: nn.Module, device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds of a forward pass by stride of the features, 4 and more, each with what leads to it; and the head."""
    times: dict[str, float] = {}
    last = 0.0

    def lap(name: str | None) -> None:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if name:
            times[name] = now - last
        last = now

    stages = {info["reduction"]: info["module"] for info in model.feature_info if info["reduction"] >= 4}
    hooks = [model.register_forward_pre_hook(lambda *_: lap(None)), model.register_forward_hook(lambda *_: lap("head"))]
    for stride, name in stages.items():
        hooks.append(model.get_submodule(name).register_forward_hook(lambda *_, stage=f"stride {stride}": lap(stage)))
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


class Energy:
    """Joules that a device has used so far, where it says: `meter()` is None where it does not."""

    def __init__(self, device: torch.device) -> None:
        self.files = sorted(Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj")) if device.type == "cpu" else []
        self.handle: Any = None
        if device.type == "cuda":
            try:
                import pynvml
            except ImportError:
                return
            pynvml.nvmlInit()
            self.nvml = pynvml
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

    def __call__(self) -> float | None:
        if self.handle is not None:
            return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3
        try:
            return sum(int(file.read_text()) for file in self.files) / 1e6 if self.files else None
        except OSError:
            return None

    def per_call(self, function: Callable[[], object], device: torch.device, seconds: float = 1.0) -> float | None:
        """Joules of one call, over calls that take some seconds together; other programs' share is in it."""
        before, calls, stop = self(), 0, time.perf_counter() + seconds
        if before is None:
            return None
        while calls == 0 or time.perf_counter() < stop:
            function()
            calls += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        after = self()
        return (after - before) / calls if after is not None and after >= before else None  # the counter wraps around
