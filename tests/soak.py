"""Soak: every operator and the layer, forward and backward, thousands of times in two threads: bit-equal, memory flat.

    python tests/soak.py [--repeats 20000] [--device cpu]

Exit status 1 with a line for each case that gave other bits than at first, or if memory grew.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from spanet_kernels import SPAM, axial_conv, pointwise_mlp, radial_filter, spectral_gate
from spanet_kernels.testing import make_input, make_profile

THREADS = 2
GROWTH = 32 * 2**20  # bytes that allocators may keep; a leak of one small plane per call is many times that
Call = Callable[[], tuple[Tensor, ...]]


def call(function: Callable[..., Tensor], leaves: list[Tensor]) -> Call:
    """Output and all gradients of a function of leaves."""
    leaves = [leaf.requires_grad_() if leaf.is_leaf else leaf.detach().requires_grad_() for leaf in leaves]
    with torch.no_grad():
        y = function(*leaves)
    grad = make_input(tuple(y.shape), y.dtype, device=str(y.device), seed=9)

    def both() -> tuple[Tensor, ...]:
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    return both


def inference(function: Callable[..., Tensor], args: list[Tensor]) -> Call:
    """Output of a function where no gradient is wanted: other kernels than those of `call`, in places."""
    return lambda: (function(*args),)


def cases(device: str) -> Iterator[tuple[str, Call]]:
    """Every operator in two dtypes and layouts, on a plane of odd and of even sides."""
    for dtype in (torch.float32, torch.bfloat16):
        for layout, (height, width) in (("contiguous", (14, 13)), ("channels_last", (28, 28))):
            shape, radius = (2, 24, height, width), 2
            x = make_input(shape, dtype, layout, device)
            base, gain = make_profile(24, radius, dtype, device)
            weight = make_input((1, 1, 24, 24), dtype, device=device)[0, 0] / 24
            torch.manual_seed(0)
            layer = SPAM(24, radius=radius).to(device, dtype)
            row, column = layer.conv
            conv = [part.detach() for part in (row.weight, row.bias, column.weight, column.bias)]
            name = f"{dtype} {layout} {height}x{width}".removeprefix("torch.")
            yield f"radial_filter {name}", call(lambda x, base, gain: radial_filter(x, base, gain, 2), [x, base, gain])
            yield f"axial_conv {name}", call(lambda x, *parts: axial_conv(x, *parts, radius=2)[0], [x, *conv])
            gate = [x, weight, weight[0].clone(), base, gain]
            yield f"spectral_gate {name}", call(lambda z, weight, bias, base, gain: spectral_gate(z, weight, bias, base, gain, 2), gate)
            mlp = torch.nn.Conv2d(32, 64, 1), torch.nn.Conv2d(64, 32, 1)
            parts = [parameter.detach().to(device, dtype) for convolution in mlp for parameter in convolution.parameters()]
            rows = make_input((2, 32, height, width), dtype, layout, device)
            yield f"pointwise_mlp {name}", inference(pointwise_mlp, [rows, *parts])
            yield f"SPAM {name}", call(lambda x, *_, layer=layer: layer(x), [x, *layer.parameters()])


def memory(device: str) -> int:
    """Bytes this process holds: of the device's allocator, or resident."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def repeat(function: Call, first: tuple[Tensor, ...], times: int, device: str, advance: Callable[[], None]) -> str | None:
    """The first difference to the first results, in THREADS threads at once with a stream each; None for none."""
    found: list[str] = []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
                for index in range(times // THREADS):
                    for place, (now, then) in enumerate(zip(function(), first, strict=True)):
                        if not torch.equal(now, then):
                            raise ValueError(f"result {place} of repeat {index} differs by up to {(now - then).abs().max().item():.2e}")
                    if found:
                        return
                    advance()
        except Exception as error:  # whatever goes wrong in a thread is a fault of the case
            found.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found[0] if found else None


def soak(chosen: list[tuple[str, Call]], repeats: int, device: str) -> list[str]:
    """A line for every case that failed, and one if memory grew after the first tenth of its repeats."""
    faults = []
    with Progress() as progress:
        task = progress.add_task("soak", total=repeats * len(chosen))
        for name, function in chosen:
            progress.update(task, description=name)
            first = function()
            fault, before = None, 0
            for part in (repeats // 10, repeats - repeats // 10):
                before = memory(device)
                fault = fault or repeat(function, first, part, device, lambda: progress.advance(task))
            growth = memory(device) - before
            if growth > GROWTH:
                fault = fault or f"memory grew by {growth / 2**20:.0f} MiB"
            if fault:
                faults.append(f"{name}: {fault}")
    return faults


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20_000, help="of each operator, spread over its dtypes and layouts (20000)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    chosen = list(cases(options.device))
    each = options.repeats // (len(chosen) // len({name.split()[0] for name, _ in chosen}))
    faults = soak(chosen, each, options.device)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{len(chosen)} cases x {each} repeats in {THREADS} threads on {options.device}: bit-equal, memory flat")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
