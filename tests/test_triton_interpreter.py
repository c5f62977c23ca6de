"""The Triton launchers under the interpreter, on CPU tensors, against the fp64 reference, and a block made of them: parity without a GPU.

Error rule: at most 1.25 times (max) and 1.0 times (rms) the error of the straightforward evaluation, torch.fft in fp32
rounded to the dtype, plus a few fp32 rounding units of the largest value (SLACK). Fresh memory is NaN.
The interpreter is chosen when Triton is imported, hence one process of its own for all cases. It holds bf16 as integers, cuts off where
it should round, and multiplies matrices in exact fp32: here it is taught bf16, and the bf16 terms into which GPUs split fp32 operands.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
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

from spanet_kernels import modes, products, reference
from spanet_kernels.ops import branch

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
    ((2, 65, 7, 7), 1, "channels_last", "bfloat16"),
    ((3, 6, 14, 14), 4, "contiguous", "bfloat16"),
    ((130, 3, 5, 3), 2, "contiguous", "float32"),  # more images than one block of the sum over them
    ((0, 3, 7, 7), 1, "contiguous", "float32"),
    ((2, 0, 7, 7), 1, "contiguous", "float32"),
    # too large to stay on chip
    ((1, 2, 130, 130), 1, "contiguous", "float32"),
    ((1, 1, 130, 130), 4, "sliced", "float16"),
    ((1, 20, 58, 58), 2, "channels_last", "float32"),
    ((1, 3, 70, 66), 9, "channels_last", "float16"),
    ((1, 3, 66, 70), 4, "channels_last", "bfloat16"),
    ((1, 1, 131, 140), 36, "odd_offset", "float32"),
    ((1, 2, 3, 9000), 100, "expanded", "float32"),
]

# the same for the gate; z of mean 1, so that the constant mode weighs
GATE_CASES: list[tuple[tuple[int, int, int, int], int, str, str]] = [
    ((2, 20, 7, 7), 1, "contiguous", "float16"),
    ((2, 65, 7, 7), 4, "channels_last", "float16"),
    ((1, 96, 14, 14), 4, "contiguous", "float16"),
    ((2, 96, 5, 14), 1, "channels_last", "float16"),
    ((1, 320, 7, 7), 1, "channels_last", "float16"),
    ((2, 33, 25, 9), 9, "sliced", "float16"),  # more than one tile of an image, 29 modes
    ((2, 20, 14, 15), 4, "odd_offset", "float16"),
    ((12, 3, 1, 3), 1, "expanded", "float16"),
    ((2, 17, 6, 5), -1, "channels_last", "float16"),
    ((2, 5, 12, 10), 20, "contiguous", "float16"),  # more modes than one step takes
    ((2, 65, 7, 7), 1, "contiguous", "bfloat16"),
    ((2, 96, 14, 14), 4, "channels_last", "bfloat16"),
    ((2, 33, 25, 9), 9, "sliced", "bfloat16"),
    ((0, 3, 7, 7), 1, "contiguous", "float16"),
]

# the same for what goes over a tensor once or twice: the norm, the GELU of its rows and their sums; (B, C, H, W), layout, dtype
PASS_CASES: list[tuple[tuple[int, int, int, int], str, str]] = [
    ((2, 3, 7, 7), "contiguous", "float32"),
    ((2, 65, 7, 9), "channels_last", "float16"),
    ((1, 64, 14, 14), "channels_last", "float32"),
    ((3, 40, 20, 21), "contiguous", "float16"),  # several parts of an image
    ((2, 96, 30, 28), "channels_last", "float32"),
    ((2, 5, 6, 5), "sliced", "float32"),
    ((2, 6, 9, 4), "expanded", "float16"),
    ((2, 65, 7, 9), "contiguous", "bfloat16"),
    ((2, 40, 20, 21), "channels_last", "bfloat16"),
    ((0, 3, 7, 7), "contiguous", "float32"),
]

# of products in fp16 and in bf16: (B, C, H, W), channels in between (0: one product alone) and at the end, what else there is
PAIR_CASES: list[tuple[tuple[int, int, int, int], int, int, str]] = [
    ((2, 64, 7, 7), 256, 64, "norm residual scale bias"),
    ((3, 32, 14, 14), 0, 32, "residual"),
    ((1, 96, 20, 21), 0, 96, "norm bias"),
    ((2, 160, 5, 6), 192, 160, "norm residual"),
    ((1, 64, 12, 12), 128, 32, "bias"),
    ((2, 160, 7, 7), 224, 64, "norm residual bias"),
    ((2, 96, 11, 12), 160, 128, "norm residual scale bias"),
]

# a whole block on the way that a GPU takes, the axial convolution alone by the CPU's kernel: (B, C, H, W), radius, layout, dtype, and the
# operators that Triton must have run
EVERY_BLOCK = {"image_norm", "image_norm_backward", "gelu", "column_sums"}
GATED = EVERY_BLOCK | {"spectral_gate", "spectral_gate_backward"}
BLOCK_CASES: list[tuple[tuple[int, int, int, int], float, str, str, set[str]]] = [
    ((2, 64, 14, 14), 2, "channels_last", "float16", GATED | {"image_moments", "pointwise_pair"}),
    ((3, 32, 7, 7), 1, "channels_last", "float16", GATED | {"image_moments", "pointwise_pair"}),
    ((2, 32, 9, 14), 2, "contiguous", "float16", GATED),
    ((2, 64, 14, 14), 2, "channels_last", "bfloat16", GATED | {"image_moments", "pointwise_pair"}),
    ((2, 32, 9, 14), 2, "contiguous", "bfloat16", GATED),
    ((2, 32, 14, 14), 2, "channels_last", "float32", EVERY_BLOCK | {"radial_filter"}),
]

# (max, rms) in fp32 rounding units: a mode carries the rounding of its two basis functions, a product of coefficients that of four
SLACK = {"y": (1, 0.25), "z_grad": (2, 0.5), "weight_grad": (2, 0.5), "bias_grad": (2, 0.5), "base_grad": (3, 2), "gain_grad": (3, 2)}


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
        return dict(max=0, rms=0, plain_max=0, plain_rms=0, count=1)
    unit = exact.abs().max().clamp_min(1e-30) * torch.finfo(torch.float32).eps
    error, other = (result.double() - exact) / unit, (plain.double() - exact) / unit
    sizes = error.abs().max(), error.square().mean().sqrt(), other.abs().max(), other.square().mean().sqrt()
    return dict(zip(("max", "rms", "plain_max", "plain_rms", "count"), map(float, (*sizes, exact.numel())), strict=True))


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


def evaluate_gate(index: int) -> dict[str, dict[str, float]]:
    """Errors of one case: the gate and its gradients, the same bits for an image alone, and beside an image of NaN."""
    from spanet_kernels.triton_kernels import spectral_gate as module

    shape, radius_squared, layout, name = GATE_CASES[index]
    dtype, channels = getattr(torch, name), shape[1]
    torch.manual_seed(index)
    z, grad = tensor(shape, layout, dtype), tensor(shape, "contiguous" if index % 2 else layout, dtype) / 64
    weight, bias = (torch.randn(channels, channels) / channels**0.5).to(dtype), torch.randn(channels).to(dtype)
    profile = torch.randn(2 * channels)[::2], torch.randn(channels, len(modes.shells(radius_squared))).T
    rest = weight, bias, *profile, radius_squared

    zhat = reference.mode_coefficients(z, radius_squared)

    def run(grad: Tensor, z: Tensor, zhat: Tensor) -> tuple[Tensor, ...]:
        return module.spectral_gate(z, zhat, *rest), *module.spectral_gate_backward(grad, z, zhat, *rest, True)

    def judge(dtype: torch.dtype, wide: torch.dtype) -> tuple[Tensor, ...]:
        images, *given = (t.to(dtype if t.dtype == z.dtype and t is not profile[0] else wide) for t in (z, weight, bias))
        arguments = images, images.new_empty(0), *given, *(p.to(wide) for p in profile), radius_squared
        return reference.spectral_gate(*arguments), *reference.spectral_gate_backward(grad.to(dtype), *arguments, True)

    results = run(grad, z, zhat)
    if not results[0].is_contiguous(memory_format=modes.memory_format(z)):
        raise AssertionError(f"wrong memory format: strides {results[0].stride()}")
    if not z.numel():
        return {}
    if shape[0] > 1 and module.serves(z, radius_squared):
        alone = [t[1:] for t in (grad, z, zhat)]
        beside_nan = [torch.cat([torch.full_like(t[:1], torch.nan), t[1:]]) for t in (grad, z, zhat)]
        for given in (alone, beside_nan):
            y, z_grad, *_ = run(given[0], modes.like(given[1], z), given[2])
            if not (torch.equal(y[1 - shape[0] :], results[0][1:]) and torch.equal(z_grad[1 - shape[0] :], results[1][1:])):
                raise AssertionError("an image depends on the others of its batch")
    names = "y", "z_grad", "weight_grad", "bias_grad", "base_grad", "gain_grad"
    judges = zip(names, results, judge(torch.float64, torch.float64), judge(dtype, torch.float32), strict=True)
    return {what: compare(result, exact, plain) for what, result, exact, plain in judges if result.numel()}


def evaluate_pass(index: int) -> dict[str, dict[str, float]]:
    """Errors of one case: the norm far from zero and its gradients, the GELU with both outputs and its sums, the sums of rows."""
    from spanet_kernels.triton_kernels import column_sums, gelu, image_norm

    shape, layout, name = PASS_CASES[index]
    dtype = getattr(torch, name)
    torch.manual_seed(index)
    x, grad = tensor(shape, layout, dtype), tensor(shape, "contiguous" if index % 2 else layout, dtype)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    y, moments = image_norm.image_norm(x, weight, bias, 1e-5)
    if not y.is_contiguous(memory_format=modes.memory_format(x)):
        raise AssertionError(f"wrong memory format: strides {y.stride()}")
    results = {"y": y}
    results |= dict(zip(("z_grad", "weight_grad", "bias_grad"), image_norm.image_norm_backward(grad, x, moments, weight), strict=True))
    if not x.numel():
        return {}
    if shape[0] > 1 and not torch.equal(image_norm.image_norm(x[1:], weight, bias, 1e-5)[0], y[1:]):
        raise AssertionError("an image depends on the others of its batch")

    def judge(dtype: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
        y, moments = reference.image_norm(x.to(wide), weight.to(wide), bias.to(wide), 1e-5)
        x_grad, *sums = reference.image_norm_backward(grad.to(wide), x.to(wide), moments, weight.to(wide))
        return {"y": y.to(dtype), "z_grad": x_grad.to(dtype), "weight_grad": sums[0], "bias_grad": sums[1]} | rows(reference, dtype, wide)

    def rows(module: Any, dtype: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
        h, slope = (t.permute(0, 2, 3, 1).reshape(-1, shape[1]).to(wide if module is reference else dtype) for t in (x - 1, grad))
        add, slope = bias.to(wide) if index % 3 else None, slope.clone()
        a, sums = module.gelu(h, add, slope)
        return {"a": a.to(dtype), "a_grad": slope.to(dtype), "a_sums": sums, "sums": module.column_sums(h)}

    ours = argparse.Namespace(gelu=gelu.gelu, column_sums=column_sums.column_sums)
    results |= rows(ours, dtype, torch.float32)
    exact, plain = judge(torch.float64, torch.float64), judge(dtype, torch.float32)
    return {what: compare(result, exact[what].double(), plain[what]) for what, result in results.items()}


def evaluate_pair(index: int) -> dict[str, dict[str, float]]:
    """Errors of one case: the result of a pair of products or of one, and the moments of its norm."""
    from spanet_kernels.triton_kernels import image_moments, pointwise_pair

    shape, between, out, given = PAIR_CASES[index // 2]
    torch.manual_seed(index // 2)
    dtype, channels = (torch.float16, torch.bfloat16)[index % 2], shape[1]

    def values(*size: int) -> Tensor:
        return (torch.randn(size) / size[-1] ** 0.5).to(dtype)

    x, residual = (tensor((shape[0], count, *shape[2:]), "channels_last", dtype) for count in (channels, out))
    moments = image_moments.image_moments(x, 1e-5)
    norm = [moments, values(channels), values(channels)] if "norm" in given else [None] * 3
    added = [residual if "residual" in given else None, values(out) if "scale" in given else None]
    bias = [values(between or out) if "bias" in given else None, values(out) if "bias" in given else None]
    weights = [values(between, channels) if between else None, bias[0], values(out, between or channels), bias[1]]
    y = torch.empty_like(residual)
    pointwise_pair.pointwise_pair(y, x, *norm, None, *added, *weights)

    def judge(to: torch.dtype) -> Tensor:
        wide = [None if t is None or t is moments else t.to(to) for t in (residual, x, *norm, None, *added, *weights)]
        wide[2] = norm[0]
        result = torch.empty_like(wide[0])
        reference.pointwise_pair(result, *wide[1:])
        return result

    exact_moments, plain_moments = reference.image_moments(x.double(), 1e-5).double(), reference.image_moments(x, 1e-5)
    return {"y": compare(y, judge(torch.float64), judge(torch.float32).to(dtype)), "sums": compare(moments, exact_moments, plain_moments)}


def evaluate_block(index: int) -> dict[str, dict[str, float]]:
    """Errors of one case: a block of SPANet without gradients, with them, and the gradients to its input and every parameter."""
    from spanet.model import Block
    from spanet_kernels.backends import _IN_TRITON, _triton

    shape, radius, layout, name, expected = BLOCK_CASES[index]
    dtype = getattr(torch, name)
    torch.manual_seed(index)
    block = Block(shape[1], 0.0, True, dict(radius=radius)).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += torch.randn_like(parameter) / 10 if parameter.dim() == 1 else 0
    x, grad = tensor(shape, layout, dtype), tensor(shape, layout, dtype) - 1
    called = set()

    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        twin, given = copy.deepcopy(block).to(dtype), x.to(dtype, copy=True).requires_grad_()
        y = twin(given)
        y.backward(grad.to(dtype))
        with torch.no_grad():
            found = {"inferred": twin(given), "y": y.detach(), "x_grad": given.grad}
        return found | {f"{name}_grad": parameter.grad for name, parameter in twin.named_parameters()}

    def logged(op: str) -> Any:
        kernel = _triton(op)
        return lambda *args: called.add(op) or kernel(*args)

    exact = run(torch.float64)
    with pytest.MonkeyPatch.context() as patch:  # operator by operator, each of which rounds, as on a GPU
        patch.setattr(products, "PAIR_POSITIONS", 10**9)
        patch.setattr(branch, "_around", lambda *_: False)
        plain = run(dtype)
    with torch.library._scoped_library("spanet_kernels", "IMPL") as library, pytest.MonkeyPatch.context() as patch:
        for op in _IN_TRITON:
            library.impl(op, logged(op), "CPU", allow_override=True)
        patch.setattr(Tensor, "is_cuda", property(lambda tensor: True))
        patch.setattr(Tensor, "is_cpu", property(lambda tensor: False))
        results = run(dtype)
    if not expected <= called:
        raise AssertionError(f"not run by Triton: {expected - called}")
    return {what: compare(result, exact[what], plain[what]) for what, result in results.items()}


COUNTS = {
    evaluate: len(CASES),
    evaluate_gate: len(GATE_CASES),
    evaluate_pass: len(PASS_CASES),
    evaluate_pair: 2 * len(PAIR_CASES),
    evaluate_block: len(BLOCK_CASES),
}


def widened(value: Any) -> Tensor:
    """The values of a block of the interpreter, of bf16 in fp32."""
    if value.dtype.scalar.name == "bf16":
        return torch.from_numpy((value.data.astype("uint32") << 16).view("float32"))
    return torch.from_numpy(value.data)


def cast(self: Any, value: Any, to: Any, *_: Any) -> Any:
    """A conversion of the interpreter, to nearest where it is to or from bf16."""
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    if to.scalar.name == "bf16":
        data = widened(value).bfloat16().view(torch.int16).numpy().view("uint16")
    else:
        data = widened(value).numpy().astype(_get_np_dtype(to))
    return TensorHandle(data, to.scalar)


def split_dot(self: Any, a: Any, b: Any, total: Any, precision: Any, _: int) -> Any:
    """A matrix product of the interpreter with fp32 operands as sums of bf16 terms, the products of all but the smallest terms."""
    from triton.runtime.interpreter import TensorHandle

    def terms(operand: Any, count: int) -> list[Tensor]:
        found, left = [], widened(operand)
        for _ in range(count):
            found.append(left.bfloat16().float() if operand.data.dtype == "float32" else left.float())
            left = left - found[-1]
        return found

    count = {"BF16x3": 2}[precision.name] if a.data.dtype == "float32" else 1
    left, right = terms(a, count), terms(b, count)
    products = (left[i] @ right[j] for i in range(count) for j in range(count - i))
    return TensorHandle(sum(products, torch.from_numpy(total.data)).numpy(), total.dtype.scalar)


def main() -> None:
    """Evaluate every case with fresh memory full of NaN; print the errors, or what went wrong, as JSON."""
    empty, empty_like = torch.empty, torch.empty_like

    def nan_empty(*args: Any, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs).fill_(torch.nan)

    def nan_empty_like(*args: Any, **kwargs: Any) -> Tensor:
        return empty_like(*args, **kwargs).fill_(torch.nan)

    from triton.runtime import interpreter

    torch.empty, torch.empty_like = nan_empty, nan_empty_like
    torch.set_num_threads(1)
    precisions = ("bf16x3",)
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, allowed_dot_input_precisions=precisions
    )
    interpreter.InterpreterBuilder.create_dot = split_dot
    interpreter.InterpreterBuilder.cast_impl = interpreter.InterpreterBuilder.create_fp_to_fp = cast
    found: dict[str, list[Any]] = {}
    for function, count in COUNTS.items():
        for index in range(count):
            try:
                result: Any = function(index)
            except Exception:
                result = traceback.format_exc()
            found.setdefault(function.__name__, []).append(result)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def errors() -> dict[str, list[Any]]:
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found: dict[str, list[Any]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case)).replace(" ", "") for case in CASES])
def test_error_is_within_the_rule(errors: dict[str, list[Any]], index: int) -> None:
    found = errors["evaluate"][index]
    assert isinstance(found, dict), found
    for what, error in found.items():
        assert error["max"] <= 1.25 * error["plain_max"] + SLACK[what][0], f"{what}: {error}"
        assert error["rms"] <= error["plain_rms"] + SLACK[what][1], f"{what}: {error}"


@pytest.mark.parametrize("index", range(len(GATE_CASES)), ids=["-".join(map(str, case)).replace(" ", "") for case in GATE_CASES])
def test_gate_error_is_within_the_rule(errors: dict[str, list[Any]], index: int) -> None:
    found = errors["evaluate_gate"][index]
    assert isinstance(found, dict), found
    for what, error in found.items():
        widened = 1 + 3 / error["count"] ** 0.5  # both sides round intermediate results alike, as `errors.assert_as_accurate` has it
        assert error["max"] <= 1.5 * widened * error["plain_max"] + SLACK[what][0], f"{what}: {error}"
        assert error["rms"] <= widened * error["plain_rms"] + SLACK[what][1], f"{what}: {error}"


@pytest.mark.parametrize("index", range(len(PASS_CASES)), ids=["-".join(map(str, case)).replace(" ", "") for case in PASS_CASES])
def test_passes_are_as_accurate(errors: dict[str, list[Any]], index: int) -> None:
    found = errors["evaluate_pass"][index]
    assert isinstance(found, dict), found
    for what, error in found.items():
        slack = (8, 5) if "grad" in what or "sums" in what else SLACK["y"]  # sums of many numbers, in other orders
        assert error["max"] <= 1.5 * error["plain_max"] + slack[0], f"{what}: {error}"
        assert error["rms"] <= 1.25 * error["plain_rms"] + slack[1], f"{what}: {error}"


@pytest.mark.parametrize("dtype", [0, 1], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("index", range(len(PAIR_CASES)), ids=["-".join(map(str, case)).replace(" ", "") for case in PAIR_CASES])
def test_pairs_are_as_accurate(errors: dict[str, list[Any]], index: int, dtype: int) -> None:
    found = errors["evaluate_pair"][2 * index + dtype]
    assert isinstance(found, dict), found
    for what, error in found.items():
        # what stands between two products is rounded to 16 bits, which the yardstick does not do
        assert error["max"] <= 2.5 * error["plain_max"] + 4, f"{what}: {error}"
        assert error["rms"] <= 1.5 * error["plain_rms"] + 2, f"{what}: {error}"


@pytest.mark.parametrize("index", range(len(BLOCK_CASES)), ids=["-".join(map(str, case[:4])).replace(" ", "") for case in BLOCK_CASES])
def test_a_block_on_the_way_of_a_gpu_is_as_accurate(errors: dict[str, list[Any]], index: int) -> None:
    """As on the CPU's way, which rounds in other places: sums of few channels scatter by a factor of two and more about the same error."""
    found = errors["evaluate_block"][index]
    assert isinstance(found, dict), found
    for what, error in found.items():
        scatter = 1 + 8 / error["count"] ** 0.5
        assert error["max"] <= 1.5 * scatter * error["plain_max"] + 8, f"{what}: {error}"
        assert error["rms"] <= scatter * error["plain_rms"] + 5, f"{what}: {error}"


if __name__ == "__main__":
    main()
