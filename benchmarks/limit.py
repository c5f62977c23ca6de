"""What the machine can do, measured in the run: bytes copied per second, and the time of matrix products."""

from __future__ import annotations

import ctypes
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch

from spanet.train import uncollected

from .timing import Clock, interleave
from .trace import Gemm

COPIED = 2**28  # bytes read, and as many written, per copy: beyond every cache


def copy_rates(device: torch.device, clock: Clock, budget: float) -> dict[str, float]:
    """Bytes read and written per second: by clone(), into memory that is there, and on CPUs by memmove, which streams past the caches."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    functions = {"clone": source.clone, "copy": lambda: target.copy_(source)}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        if device.type == "cpu":
            part = COPIED // torch.get_num_threads() // 64 * 64
            starts = range(0, part * torch.get_num_threads(), part)

            def stream() -> None:
                list(pool.map(lambda at: ctypes.memmove(target.data_ptr() + at, source.data_ptr() + at, part), starts))

            functions["streaming"] = stream
        timings = interleave(functions, clock, budget, samples=25)
    return {name: 2 * COPIED / timing.median for name, timing in timings.items()}


class Gemms:
    """Seconds of matrix products run by themselves into memory that is there; each shape is measured once."""

    def __init__(self, device: torch.device, clock: Clock, budget: float) -> None:
        self.device, self.clock, self.budget = device, clock, budget
        self.known: dict[tuple[Gemm, torch.dtype], float] = {}

    def seconds(self, gemms: Counter[Gemm], dtype: torch.dtype) -> float:
        """Of all products together."""
        with uncollected():  # once, not for every product
            return sum(number * self._one(gemm, dtype) for gemm, number in gemms.items())

    def best_rate(self, dtype: torch.dtype) -> float:
        """FLOP per second of the fastest product so far; 0 before the first."""
        return max((2 * gemm.macs / seconds for (gemm, held), seconds in self.known.items() if held == dtype), default=0.0)

    def _one(self, gemm: Gemm, dtype: torch.dtype) -> float:
        if (gemm, dtype) not in self.known:
            a = torch.ones(gemm.count, gemm.m, gemm.k, device=self.device, dtype=dtype)
            b = torch.ones(gemm.count, gemm.n, gemm.k, device=self.device, dtype=dtype).mT
            y = torch.empty(gemm.count, gemm.m, gemm.n, device=self.device, dtype=dtype)
            product = (lambda: torch.mm(a[0], b[0], out=y[0])) if gemm.count == 1 else (lambda: torch.bmm(a, b, out=y))
            with torch.inference_mode():
                self.known[gemm, dtype] = interleave({"gemm": product}, self.clock, self.budget, samples=15)["gemm"].median
        return self.known[gemm, dtype]
