"""Interleaved timing of functions that compete.

Competitors run in rounds, each round in a fresh random order, so that drift, other load and what a neighbour
leaves in the caches fall on all of them alike. A slow competitor takes part in fewer rounds, spread evenly.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from spanet.train import uncollected

Function = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of the seconds of one call."""

    median: float
    lower: float
    upper: float
    samples: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return Timing(median, lower, upper, len(seconds))

    def json(self) -> dict[str, float]:
        return asdict(self)


class Clock(Protocol):
    """Measures a sequence of functions, one call each."""

    def round(self, functions: Sequence[Function]) -> list[float]:
        """Seconds of each function, run in the order given."""


class WallClock:
    """Wall time of a call, the host's part and the device's, which is idle before; its result is freed after the clock has stopped."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def round(self, functions: Sequence[Function]) -> list[float]:
        seconds = []
        for function in functions:
            self._settle()
            start = time.perf_counter()
            result = function()
            self._settle()
            seconds.append(time.perf_counter() - start)
            del result
        return seconds


WAIT = 800_000  # cycles of a GPU, two fifths of a millisecond: a backward pass through Python takes longer to enqueue than a fifth


class CudaClock:
    """Device time between two events on the current stream, with a cold L2.

    Before each call a buffer of several L2 sizes is read: that evicts what earlier calls left without leaving
    lines to write back. Then the device waits, while the host enqueues the call behind it.
    """

    def __init__(self, device: torch.device) -> None:
        level2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.device = device
        self.evict = torch.zeros(max(4 * level2, 256 * 2**20) // 4, device=device)

    def round(self, functions: Sequence[Function]) -> list[float]:
        with torch.cuda.device(self.device):
            events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in functions]
            for function, (start, stop) in zip(functions, events, strict=True):
                self.evict.sum()
                torch.cuda._sleep(WAIT)
                start.record()
                function()
                stop.record()
            torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def captured(function: Function) -> Function:
    """The kernels of a function on a GPU as a graph: a call replays them, without the host's part, and returns what they leave."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose and allocate
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay() -> object:
        graph.replay()
        return results

    return replay


class CallClock:
    """Host time per call, averaged over a loop of calls; the device is waited for outside of the loop."""

    def __init__(self, device: torch.device, calls: int = 200) -> None:
        self.device = device
        self.calls = calls

    def round(self, functions: Sequence[Function]) -> list[float]:
        seconds = []
        for function in functions:
            start = time.perf_counter()
            for _ in range(self.calls):
                function()
            seconds.append((time.perf_counter() - start) / self.calls)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return seconds


BRIEF = 1e-3  # seconds


class WarmClock:
    """Wall time of a call on the CPU that finds in the caches what fits them.

    A brief call is repeated until as much time has passed, and the first one does not count: it finds what the competitor
    before it left there, and a thread that wakes late would be a good part of it.
    """

    def round(self, functions: Sequence[Function]) -> list[float]:
        device, seconds = torch.device("cpu"), []
        for function in functions:
            (took,) = WallClock(device).round([function])
            if took < BRIEF:
                (took,) = CallClock(device, math.ceil(BRIEF / took)).round([function])
            seconds.append(took)
        return seconds


def clock_for(device: torch.device) -> Clock:
    """That of operators: without the host's part on a GPU, with warm caches on a CPU."""
    return CudaClock(device) if device.type == "cuda" else WarmClock()


def interleave(functions: Mapping[str, Function], clock: Clock, budget: float, samples: int = 100, least: int = 3) -> dict[str, Timing]:
    """Time competing functions in interleaved rounds.

    Args:
        functions: name to function, each called before: the first calls here are the warm-up and an estimate.
        clock: measures one round.
        budget: seconds for all of them together, shared equally; rounds end after three times as long where estimates were short.
        samples: calls per function where its share of the budget allows.
        least: calls per function where it does not, at least 2.

    Returns:
        name to Timing.
    """
    names = list(functions)
    share = budget / len(names)
    once = dict(zip(names, clock.round(list(functions.values())), strict=True))
    brief = [name for name in names if once[name] < share]  # the first call of these may have been the slow one
    again = dict(zip(brief, clock.round([functions[name] for name in brief]), strict=True))
    counts = {name: int(max(least, min(samples, share / min(once[name], again.get(name, math.inf))))) for name in names}
    rounds = max(counts.values())
    order, deadline = random.Random(0), time.perf_counter() + 3 * budget
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with uncollected():  # a full collection within a sample would be of what the process holds, not of the function
        for index in range(rounds):
            chosen = [name for name in names if (index + 1) * counts[name] // rounds > index * counts[name] // rounds]
            order.shuffle(chosen)
            for name, value in zip(chosen, clock.round([functions[name] for name in chosen]), strict=True):
                seconds[name].append(value)
            if time.perf_counter() > deadline and min(map(len, seconds.values())) >= least:
                break
    return {name: Timing.of(values) for name, values in seconds.items()}
