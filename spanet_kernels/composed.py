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

from . import modes
from .products import Branch, linear, pair, pair_serves

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


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of x, as channels_last."""
    return linear(x.flatten(2).mT, weight, bias).mT.unflatten(2, x.shape[2:])


def _pointwise_like(x: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """The 1x1 convolution of x, which is channels_last, in the layout of like."""
    if modes.channels_last(like):
        return _pointwise(x, weight, bias)
    columns, weights = x.flatten(2), weight.expand(len(x), -1, -1)
    planes = torch.bmm(weights, columns) if bias is None else torch.baddbmm(bias[:, None], weights, columns)
    return planes.unflatten(2, x.shape[2:])


def _channel_product(c: Tensor, z: Tensor) -> Tensor:
    """Sum over images and positions of c z^T, (C, C)."""
    return _rows(c).mT @ _rows(z)


def _channel_sum(c: Tensor, dtype: torch.dtype) -> Tensor:
    return c.sum((0, 2, 3), dtype=dtype)


def _context(z: Tensor, weight: Tensor, bias: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> tuple[Tensor, Tensor, Tensor]:
    """F(z), the weight that applies to it, and W F(z) + b."""
    filtered, weight = _filtered(z, weight, base, gain, radius_squared)
    return filtered, weight, _pointwise_like(filtered, weight, bias, z)


def _filtered(z: Tensor, weight: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> tuple[Tensor, Tensor]:
    """F(z) and the weight that applies to it; of an empty disc F is diag(base), which the weight takes in."""
    if radius_squared < 0:
        return z, (weight * base).to(weight.dtype)
    return _ops.radial_filter(z, base, gain, radius_squared), weight


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


def _whole(x: Tensor, memory_format: torch.memory_format) -> Tensor | None:
    """Memory for the results of all parts of x; of a single part the result is the whole."""
    return torch.empty_like(x, memory_format=memory_format) if len(_parts(x)) > 1 else None


def _placed(whole: Tensor | None, part: slice, value: Tensor) -> Tensor:
    if whole is None:
        return value
    whole[part] = value
    return whole


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
    branch: Branch = Branch(),  # noqa: B008  an immutable value
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.spectral_mixer`; keep returns t, z and the coefficients of z for the gradients, else they are empty.

    With a branch, the residual branch that the mixer makes; x and its residual are then dense, and in one dtype with all the weights.
    """
    wanted = radius_squared if x.is_cuda else -1  # the fused gate of GPUs takes coefficients
    out = _whole(x, modes.memory_format(x))
    all_t, all_z = (_whole(x, torch.channels_last) if keep else None for _ in range(2))
    for part in _parts(x):
        around = branch.of(part)
        if around.norm_weight is not None and pair_serves(x[part], None, in_weight):
            t = torch.empty_like(x[part], memory_format=torch.channels_last)
            pair(t, x[part], None, None, in_weight, in_bias, branch=around._replace(residual=None, scale=None))
        else:
            t = _pointwise(around.normalised(x[part]), in_weight, in_bias)
        z, coefficients = _ops.axial_conv(t, row_weight, row_bias, column_weight, column_bias, wanted)
        if keep:
            all_t, all_z = _placed(all_t, part, t), _placed(all_z, part, z)
        if pair_serves(z, weight, out_weight):
            filtered, applied = _filtered(z, weight, base, gain, radius_squared)
            to = torch.empty_like(x[part], memory_format=modes.memory_format(x)) if out is None else out[part]
            pair(to, filtered, applied, bias, out_weight, out_bias, z, around._replace(norm_weight=None))
            out = to if out is None else out
        else:
            y = _ops.spectral_gate(z, coefficients if x.is_cuda else None, weight, bias, base, gain, radius_squared)
            out = _placed(out, part, around.added(_pointwise_like(y, out_weight, out_bias, x)))
    assert out is not None
    if all_t is None or all_z is None:
        return out, x.new_empty(0), x.new_empty(0), base.new_empty(0)
    return out, all_t, all_z, coefficients if x.is_cuda else base.new_empty(0)


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
    x_grad = _whole(x, modes.memory_format(x))
    sums: list[Tensor] = []
    for part in _parts(x):
        g, z_part = grad[part], z[part]
        y_grad = _pointwise(g, out_weight.mT)
        if z.is_cuda:
            y = _ops.spectral_gate(z, coefficients, weight, bias, base, gain, radius_squared)
            gate = _ops.spectral_gate_backward(y_grad, z, coefficients, weight, bias, base, gain, radius_squared, profile_learns)
        else:
            filtered, applied, context = _context(z_part, weight, bias, base, gain, radius_squared)
            y, c = z_part * context, y_grad * z_part
            gate = _gate_gradients(y_grad, c, z_part, filtered, applied, context, weight, base, gain, radius_squared, profile_learns)
        t_grad, *conv = _ops.axial_conv_backward(gate[0], t[part], row_weight, row_bias, column_weight)
        x_grad = _placed(x_grad, part, _pointwise_like(t_grad, in_weight.mT, None, x))
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
    assert x_grad is not None
    return x_grad, *(total.to(dtype) for total, dtype in zip(sums, dtypes, strict=True))
