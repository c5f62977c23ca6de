"""The Triton launchers under the interpreter, on CPU tensors, against the fp64 reference: parity without a GPU.

Error rule: at most 1.25 times (max) and 1.0 times (rms) the error of the straightforward evaluation, torch.fft in fp32
rounded to the dtype, plus a few fp32 rounding units of the largest value (SLACK). Fresh memory is NaN.
The interpreter has no working bf16. It is chosen when Triton is imported, hence one process of its own for all cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spanet_kernels import modes, reference

pytest.importorskip("triton")

# (B, C, H, W), radius_squared, layout, dtype
CASES: list[tuple[tuple[int, int, int, int], int, str, str]] = [
    ((2, 3, 1, 1), 0, "contiguous", "float32"),
    ((2, 3, 1, 5), 4, "channels_last", "float16"),
    ((2, 65, 7, 7), 1, "contiguous", "float32"),
    ((2, 65, 7, 7), 1, "channels_last", "float16"),
    ((2, 64, 14, 14), 1, "channels_last", "float32"),
    ((3, 6, 14, 14), 4, "contiguous", "float16"),
    ((2, 5, 8, 6), 25, "contiguous", "float32"),  # the full spectrum
    ((2, 3, 8, 6), 25, "channels_last", "float16"),
    ((2, 3, 17, 3), 65, "sliced", "float32"),
    ((2, 3, 25, 42), 4, "odd_offset", "float16"),
    ((2, 3, 25, 42), 9, "expanded", "float32"),
    ((2, 4, 14, 12), 5, "sliced", "float16"),
    ((1, 33, 14, 12), 2, "expanded", "float32"),
    ((130, 3, 5, 3), 2, "contiguous", "float32"),  # more images than one block of the sum over them
    ((0, 3, 7, 7), 1, "contiguous", "float32"),
    ((2, 0, 7, 7), 1, "contiguous", "float32"),
    # too large to stay on chip
    ((1, 2, 130, 130), 1, "contiguous", "float32"),
    ((1, 1, 130, 130), 4, "sliced", "float16"),
    ((1, 20, 58, 58), 2, "channels_last", "float32"),
    ((1, 3, 70, 66), 9, "channels_last", "float16"),
    ((1, 1, 131, 140), 36, "odd_offset", "float32"),
    ((1, 2, 3, 9000), 100, "expanded", "float32"),
]

# (max, rms) in fp32 rounding units: a mode carries the rounding of its two basis functions, a product of coefficients that of four
SLACK = {"y": (1, 0.25), "base_grad": (3, 2), "gain_grad": (3, 2)}


def tensor(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    """Random values of mean 1 in the given layout."""
    b, c, h, w = shape
    if layout == "channels_last":
        return torch.randn(shape).add(1).to(dtype, memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.randn(b, c + 1, h + 2, w + 3).add(1).to(dtype)[:, 1:, 1:-1, 2:-1]
    if layout == "expanded":
        return torch.randn(b, 1, h, w).add(1).to(dtype).expand(shape)
    if layout == "odd_offset":
        return torch.randn(b * c * h * w + 1).add(1).to(dtype)[1:].view(shape)
    return torch.randn(shape).add(1).to(dtype)


def compare(result: Tensor, exact: Tensor, plain: Tensor) -> dict[str, float]:
    """Largest and rms error of the result and of the plain evaluation, in fp32 rounding units of the largest value."""
    if result.shape != exact.shape or result.dtype != plain.dtype:
        raise AssertionError(f"got {result.dtype} {tuple(result.shape)}, want {plain.dtype} {tuple(exact.shape)}")
    if not result.numel():
        return dict(max=0, rms=0, plain_max=0, plain_rms=0)
    unit = exact.abs().max().clamp_min(1e-30) * torch.finfo(torch.float32).eps
    error, other = (result.double() - exact) / unit, (plain.double() - exact) / unit
    sizes = error.abs().max(), error.square().mean().sqrt(), other.abs().max(), other.square().mean().sqrt()
    return dict(zip(("max", "rms", "plain_max", "plain_rms"), map(float, sizes), strict=True))


def evaluate(index: int) -> dict[str, dict[str, float]]:
    """Errors of one case: the filter and both gradients."""
    from spanet_kernels.triton_kernels import radial_filter as module

    shape, radius_squared, layout, name = CASES[index]
    dtype = getattr(torch, name)
    torch.manual_seed(index)
    x, grad = tensor(shape, layout, dtype), tensor(shape, "contiguous" if index % 2 else layout, dtype)
    base = torch.randn(2 * shape[1])[::2]
    gain = torch.randn(shape[1], len(modes.shells(radius_squared))).T

    y = module.radial_filter(x, base, gain, radius_squared)
    if not y.is_contiguous(memory_format=torch.channels_last if modes.channels_last(x) else torch.contiguous_format):
        raise AssertionError(f"wrong memory format: strides {y.stride()}")
    results = module.radial_filter_backward(grad, x, radius_squared)
    if not x.numel():
        if any(result.any() for result in results):
            raise AssertionError("the gradients of an empty input must be zero")
        return {}
    exact = reference.radial_filter(x.double(), base.double(), gain.double(), radius_squared)
    found = {"y": compare(y, exact, reference.radial_filter(x.float(), base, gain, radius_squared).to(dtype))}
    exact_grads = reference.radial_filter_backward(grad.double(), x.double(), radius_squared)
    plain_grads = reference.radial_filter_backward(grad.float(), x.float(), radius_squared)
    for what, result, exact, plain in zip(("base_grad", "gain_grad"), results, exact_grads, plain_grads, strict=True):
        found[what] = compare(result, exact, plain)
    return found


def main() -> None:
    """Evaluate every case with fresh memory full of NaN; print the errors, or what went wrong, as JSON."""
    empty = torch.empty

    def nan_empty(*args: Any, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs).fill_(torch.nan)

    torch.empty = nan_empty
    torch.set_num_threads(1)
    found: list[Any] = []
    for index in range(len(CASES)):
        try:
            found.append(evaluate(index))
        except Exception:
            found.append(traceback.format_exc())
    print(json.dumps(found))


@pytest.fixture(scope="module")
def errors() -> list[Any]:
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found: list[Any] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case)).replace(" ", "") for case in CASES])
def test_error_is_within_the_rule(errors: list[Any], index: int) -> None:
    found = errors[index]
    assert isinstance(found, dict), found
    for what, error in found.items():
        assert error["max"] <= 1.25 * error["plain_max"] + SLACK[what][0], f"{what}: {error}"
        assert error["rms"] <= error["plain_rms"] + SLACK[what][1], f"{what}: {error}"


if __name__ == "__main__":
    main()
