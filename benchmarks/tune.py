"""Measure the tiles of Triton's matrix products on the GPU that is there, and write the fastest into the package's data.

python -m benchmarks.tune                       the stages of SPANet-S and SPANet-B, about ten minutes, most of them compilation
python -m benchmarks.tune --dims 64,128,320,512 --compile-only    fill the cache of compiled kernels, for one run that measures
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from rich.progress import track

from spanet_kernels import modes
from spanet_kernels.testing import make_input, make_profile
from spanet_kernels.triton_kernels import pointwise_pair, spectral_gate, tiles

from .layers import STAGES
from .record import save
from .timing import CudaClock

BATCH, SAMPLES = 128, 11
CANDIDATES: dict[str, tuple[tiles.Tile, ...]] = {
    "pointwise": (
        *((64, 128, 64, 4, 3), (64, 128, 64, 4, 2), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 64, 64, 4, 3), (64, 64, 64, 4, 3)),
        *((64, 256, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 32, 8, 4), (64, 64, 64, 2, 3)),
    ),
    "pair": (
        *((128, 32, 0, 8, 2), (128, 64, 0, 8, 2), (128, 32, 0, 8, 3), (64, 32, 0, 4, 2), (64, 64, 0, 4, 2), (64, 64, 0, 8, 2)),
        *((128, 64, 0, 8, 3), (64, 32, 0, 4, 3)),
    ),
    "gate": (
        *((128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (64, 64, 64, 4, 3), (64, 64, 64, 2, 3)),
        *((64, 256, 64, 8, 3), (64, 128, 64, 8, 2)),
    ),
    "gate_backward": (
        (64, 128, 64, 4, 3),
        (64, 64, 64, 4, 3),
        (128, 64, 64, 8, 3),
        (64, 128, 64, 8, 3),
        (32, 64, 64, 4, 3),
        (128, 128, 64, 8, 2),
    ),
}


Problem = tuple[str, tuple[int, ...], Callable[[], Any]]  # kind, sizes, and the calls that its tile serves


def problems(channels: int, size: int, radius: float) -> Iterator[Problem]:
    """Those of a stage."""
    ops, product, nothing = torch.ops.spanet_kernels, pointwise_pair.pointwise, (None, None, None)

    def image(count: int, seed: int) -> torch.Tensor:
        x = torch.randn((BATCH, count, size, size), device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        return x.to(torch.bfloat16, memory_format=torch.channels_last)

    def matrix(*shape: int) -> torch.Tensor:
        return make_input((1, 1, *shape), torch.bfloat16, device="cuda")[0, 0] / shape[-1]

    x, residual, hidden = image(channels, 0), image(channels, 1), image(4 * channels, 2)
    vector, wide = matrix(1, channels)[0], matrix(1, 4 * channels)[0]
    norm = ops.image_moments(x, 1e-5), vector, vector
    weight, w_in, w_out = matrix(channels, channels), matrix(4 * channels, channels), matrix(channels, 4 * channels)
    y, y_hidden = torch.empty_like(x), torch.empty_like(hidden)

    def square() -> None:
        product(y, x, weight, vector, norm, None, None, gelu=False)
        product(y, x, weight, vector, nothing, residual, vector, gelu=False)

    yield "pointwise", (channels, channels), square
    yield "pointwise", (channels, 4 * channels), lambda: product(y_hidden, x, w_in, wide, norm, None, None, gelu=True)
    yield "pointwise", (4 * channels, channels), lambda: product(y, hidden, w_out, vector, nothing, residual, vector, gelu=False)
    if channels <= pointwise_pair.ONE_LAUNCH:
        mlp = y, x, *norm, None, residual, vector, w_in, wide, w_out, vector
        yield "pair", (channels, 4 * channels), lambda: ops.pointwise_pair(*mlp)
    squared = modes.squared_radius(radius)
    gate = x, ops.mode_coefficients(x, squared), weight, vector, *make_profile(channels, radius, torch.bfloat16, device="cuda"), squared
    yield "gate", (channels, size * size), lambda: ops.spectral_gate(*gate)
    yield "gate_backward", (channels, size * size), lambda: ops.spectral_gate_backward(residual, *gate, True)


def seconds(function: Callable[[], Any], clock: CudaClock | None) -> float:
    """Median time of a call, of one without a clock 0; infinite if the device refuses it."""
    try:
        function()
        return statistics.median(clock.round([function] * SAMPLES)) if clock else 0
    except Exception as failure:  # too much shared memory, too many registers: a compiler's or a driver's own classes
        print(f"refused: {failure}".splitlines()[0][:160])
        return math.inf


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    every = [channels for channels, _, _ in itertools.chain(*STAGES.values())]
    parser.add_argument("--dims", type=lambda text: [int(part) for part in text.split(",")], default=every, help=f"channels ({every})")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(CANDIDATES), help=", ".join(CANDIDATES))
    parser.add_argument("--compile-only", action="store_true", help="call every candidate once, measure and write nothing")
    given = parser.parse_args()
    if not tiles.architecture():
        parser.exit(2, "tune: there is no NVIDIA GPU\n")
    clock = None if given.compile_only else CudaClock(torch.device("cuda"))
    found: dict[str, tiles.Tile] = {}
    stages = [stage for stage in itertools.chain(*STAGES.values()) if stage[0] in given.dims]
    for kind, sizes, function in track(list(itertools.chain(*itertools.starmap(problems, stages))), "tiles"):
        if kind not in given.kinds:
            continue
        times: dict[tiles.Tile, float] = {}
        for candidate in CANDIDATES[kind]:
            spectral_gate.plan.cache_clear()
            pointwise_pair.plan.cache_clear()
            pointwise_pair.pair_plan.cache_clear()
            with mock.patch.object(tiles, "_measured", lambda key=f"{kind} {sizes[0]} {sizes[1]}", candidate=candidate: {key: candidate}):
                times[candidate] = seconds(function, clock)
        best = min(times, key=times.__getitem__)
        if clock and times[best] < math.inf:
            found[f"{kind} {sizes[0]} {sizes[1]}"] = best
            print(
                f"{kind} {sizes}: {best} {1e6 * times[best]:.1f} us, by the rule's first {1e6 * times[CANDIDATES[kind][0]]:.1f} us",
                flush=True,
            )
    if found:
        data = json.loads(tiles.DATA.read_text())
        data[tiles.architecture()] = dict(sorted((data.get(tiles.architecture(), {}) | found).items()))
        save(tiles.DATA, data)


if __name__ == "__main__":
    main()
