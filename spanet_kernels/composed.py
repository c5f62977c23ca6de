"""Operators composed of matrix products, which a library does best, and of smaller operators: one code for every device.

The gate is y = z o (W F(z) + b), with the filter F by its own operator: on a CPU that costs less than adding the modes to the product.
The mixer around it keeps its channels adjacent from its first matrix product to its last, whatever the layout of its input, because
a matrix product reads and writes either at no cost. On a CPU it takes few images at a time, so that what it writes between its first
product and its last stays in the cache, in memory that is used again and not mapped anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from . import modes

PART = 2 * 2**20  # bytes of a tensor of the images that a CPU takes at a time

_ops = torch.ops.spanet_kernels
P = ParamSpec("P")
T = TypeVar("T")


def exact(function: Callable[P, T]) -> Callable[P, T]:
    """Every product in the dtypes that it is given, also under autocast."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        x = args[0]
        assert isinstance(x, Tensor)
        if not torch.is_autocast_enabled(x.device.type):
            return function(*args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(*args, **kwargs)

    return call


def _rows(x: Tensor) -> Tensor:
    """(B H W, C), a view of a channels_last tensor."""
    return x.flatten(2).mT.flatten(0, 1)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of x, as channels_last."""
    return functional.linear(x.flatten(2).mT, weight, bias).mT.unflatten(2, x.shape[2:])


def _pointwise_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write the 1x1 convolution of x, which is channels_last, into out of either layout."""
    if modes.channels_last(out):
        matrix, rows = _rows(out), _rows(x)
        torch.mm(rows, weight.mT, out=matrix) if bias is None else torch.addmm(bias, rows, weight.mT, out=matrix)
    else:
        columns, weights, planes = x.flatten(2), weight.expand(len(x), -1, -1), out.flatten(2)
        torch.bmm(weights, columns, out=planes) if bias is None else torch.baddbmm(bias[:, None], weights, columns, out=planes)


def _pointwise_like(x: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """The 1x1 convolution of x in the layout of like."""
    if modes.channels_last(like):
        return pointwise(x, weight, bias)
    out = torch.empty_like(like)
    _pointwise_into(out, x, weight, bias)
    return out


def _channel_product(c: Tensor, z: Tensor) -> Tensor:
    """Sum over images and positions of c z^T, (C, C)."""
    return _rows(c).mT @ _rows(z)


def _channel_sum(c: Tensor, dtype: torch.dtype) -> Tensor:
    return c.sum((0, 2, 3), dtype=dtype)


def _context(z: Tensor, weight: Tensor, bias: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> tuple[Tensor, Tensor, Tensor]:
    """F(z), the weight that applies to it, and W F(z) + b; of an empty disc F is diag(base), which the weight takes in."""
    if radius_squared < 0:
        filtered, weight = z, (weight * base).to(weight.dtype)
    else:
        filtered = _ops.radial_filter(z, base, gain, radius_squared)
    return filtered, weight, _pointwise_like(filtered, weight, bias, z)


@exact
def spectral_gate(
    z: Tensor, coefficients: Tensor | None, weight: Tensor, bias: Tensor, base: Tensor, gain: Tensor, radius_squared: int
) -> Tensor:
    """`reference.spectral_gate`."""
    _, _, context = _context(modes.like(z, z), weight, bias, base, gain, radius_squared)
    return context.mul_(z)


@exact
def spectral_gate_backward(
    grad: Tensor,
    z: Tensor,
    coefficients: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    base: Tensor,
    gain: Tensor,
    radius_squared: int,
    profile_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.spectral_gate_backward`; the context is computed again, not saved."""
    z = modes.like(z, z)
    filtered, applied, context = _context(z, weight, bias, base, gain, radius_squared)
    c = modes.like(grad, z) * z
    return _gate_gradients(grad, c, z, filtered, applied, context, weight, base, gain, radius_squared, profile_learns)


def _gate_gradients(
    grad: Tensor,
    c: Tensor,
    z: Tensor,
    filtered: Tensor,
    applied: Tensor,
    context: Tensor,
    weight: Tensor,
    base: Tensor,
    gain: Tensor,
    radius_squared: int,
    profile_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the gate to z, weight, bias, base, gain: grad o ctx + F(W^T c), c F(z)^T, sum c and the profile's; c = grad o z."""
    mixed = _pointwise_like(c, applied.mT, None, z)
    product, bias_grad = _channel_product(c, filtered), _channel_sum(c, base.dtype).to(weight.dtype)
    profile_grads = base.new_empty(0), gain.new_empty(0)
    if radius_squared < 0:
        if profile_learns:
            profile_grads = (weight * product).sum(0, dtype=base.dtype), torch.zeros_like(gain)
        return mixed.addcmul_(grad, context), (product * base).to(weight.dtype), bias_grad, *profile_grads
    if profile_learns:
        profile_grads = _ops.radial_filter_backward(mixed, z, radius_squared)
    z_grad = _ops.radial_filter(mixed, base, gain, radius_squared).addcmul_(grad, context)
    return z_grad, product, bias_grad, *profile_grads


def _parts(x: Tensor) -> list[slice]:
    """The images to take at a time."""
    size = max(1, len(x) if x.device.type != "cpu" else PART * len(x) // max(x.nbytes, 1))
    return [slice(start, start + size) for start in range(0, len(x), size)] or [slice(0, 0)]


@exact
def spectral_mixer(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    row_weight: Tensor,
    row_bias: Tensor,
    column_weight: Tensor,
    column_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    base: Tensor,
    gain: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    radius_squared: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.spectral_mixer`; keep returns t, z and the coefficients of z for the gradients, else they are empty."""
    wanted = radius_squared if x.is_cuda else -1  # the fused gate of GPUs takes coefficients
    out = torch.empty_like(x, memory_format=modes.memory_format(x))
    t = z = coefficients = x.new_empty(0)
    parts = _parts(x)
    kept = [torch.empty_like(x, memory_format=torch.channels_last) for _ in range(2)] if keep and len(parts) > 1 else []
    for part in parts:
        t = pointwise(x[part], in_weight, in_bias)
        z, coefficients = _ops.axial_conv(t, row_weight, row_bias, column_weight, column_bias, wanted)
        for whole, value in zip(kept, (t, z), strict=False):
            whole[part] = value
        y = _ops.spectral_gate(z, coefficients if x.is_cuda else None, weight, bias, base, gain, radius_squared)
        _pointwise_into(out[part], y, out_weight, out_bias)
    if not keep:
        return out, x.new_empty(0), x.new_empty(0), base.new_empty(0)
    t, z = kept or (t, z)
    return out, t, z, coefficients if x.is_cuda else base.new_empty(0)


@exact
def spectral_mixer_backward(
    grad: Tensor,
    x: Tensor,
    t: Tensor,
    z: Tensor,
    coefficients: Tensor,
    in_weight: Tensor,
    row_weight: Tensor,
    row_bias: Tensor,
    column_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    base: Tensor,
    gain: Tensor,
    out_weight: Tensor,
    radius_squared: int,
    profile_learns: bool,
) -> tuple[Tensor, ...]:
    """Gradients of `spectral_mixer` to x and, in its order, to every weight and bias, base and gain; the gate is computed again."""
    x_grad = torch.empty_like(x, memory_format=modes.memory_format(x))
    sums: list[Tensor] = []
    for part in _parts(x):
        g, z_part = grad[part], z[part]
        y_grad = pointwise(g, out_weight.mT)
        if z.is_cuda:
            y = _ops.spectral_gate(z, coefficients, weight, bias, base, gain, radius_squared)
            gate = _ops.spectral_gate_backward(y_grad, z, coefficients, weight, bias, base, gain, radius_squared, profile_learns)
        else:
            filtered, applied, context = _context(z_part, weight, bias, base, gain, radius_squared)
            y, c = z_part * context, y_grad * z_part
            gate = _gate_gradients(y_grad, c, z_part, filtered, applied, context, weight, base, gain, radius_squared, profile_learns)
        t_grad, *conv = _ops.axial_conv_backward(gate[0], t[part], row_weight, row_bias, column_weight)
        _pointwise_into(x_grad[part], t_grad, in_weight.mT)
        grads = [
            _channel_product(t_grad, x[part]),
            _channel_sum(t_grad, base.dtype),
            *conv,
            *gate[1:],
            _channel_product(g, y),
            _channel_sum(g, base.dtype),
        ]
        sums = [total.add_(more) for total, more in zip(sums, grads, strict=True)] if sums else [g.to(base.dtype) for g in grads]
    dtypes = [x.dtype] * 2 + [base.dtype] * 4 + [x.dtype] * 2 + [base.dtype] * 2 + [x.dtype] * 2
    return x_grad, *(total.to(dtype) for total, dtype in zip(sums, dtypes, strict=True))
