"""Operators composed of matrix products, which a library does best, and of smaller operators: one code for every device.

Of the gate y = z o ctx, ctx = (W diag(base)) z + sum_k v_k phi_k + b, the matrix products and the modes v_k = W (gain_k o zhat_k)
are PyTorch's; adding the modes and modulating is one pass over memory. The mixer around it keeps its channels adjacent from
its first matrix product to its last, whatever the layout of its input: a matrix product reads and writes either at no cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from . import modes

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


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of x, as channels_last."""
    return functional.linear(x.flatten(2).mT, weight, bias).mT.unflatten(2, x.shape[2:])


def _pointwise_like(x: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """The 1x1 convolution of x, which is channels_last, in the layout of like."""
    if modes.channels_last(like):
        return pointwise(x, weight, bias)
    columns = x.flatten(2)
    weights = weight.expand(len(x), -1, -1)
    y = torch.bmm(weights, columns) if bias is None else torch.baddbmm(bias[:, None], weights, columns)
    return y.unflatten(2, x.shape[2:])


@exact
def spectral_gate(z: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    """`reference.spectral_gate`, the filter as an addition of modes to the matrix product."""
    context = _pointwise_like(z, (weight * base).to(weight.dtype), bias, z)
    filtered = coefficients * _gains(z, gain, radius_squared)
    return _ops.add_modes(context, _mixed(weight.to(base.dtype), filtered), z, radius_squared)


@exact
def spectral_gate_backward(
    grad: Tensor,
    z: Tensor,
    coefficients: Tensor,
    weight: Tensor,
    bias: Tensor,
    base: Tensor,
    gain: Tensor,
    radius_squared: int,
    profile_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.spectral_gate_backward`; the context is computed again, not saved."""
    filtered, context = _context(z, weight, bias, base, gain, radius_squared)
    return _gate_gradients(modes.like(grad, z), z, filtered, context, weight, base, gain, radius_squared, profile_learns)


def _context(z: Tensor, weight: Tensor, bias: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> tuple[Tensor, Tensor]:
    """F(z), which the gradient of the weight needs as it is, and W F(z) + b."""
    filtered = _filter(z, base, gain, radius_squared)
    return filtered, _pointwise_like(filtered, weight, bias, z)


def _gate_gradients(
    grad: Tensor,
    z: Tensor,
    filtered: Tensor,
    context: Tensor,
    weight: Tensor,
    base: Tensor,
    gain: Tensor,
    radius_squared: int,
    profile_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the gate to z, weight, bias, base, gain: grad o ctx + F(W^T c), c F(z)^T, c and the profile's, with c = grad o z."""
    c = grad * z
    mixed = _pointwise_like(c, weight.mT, None, z)
    z_grad = _filter(mixed, base, gain, radius_squared).addcmul_(grad, context)
    bias_grad = c.sum((0, 2, 3), dtype=base.dtype).to(weight.dtype)
    profile_grads = base.new_empty(0), gain.new_empty(0)
    if profile_learns and radius_squared >= 0:
        profile_grads = _ops.radial_filter_backward(mixed, z, radius_squared)
    elif profile_learns:
        profile_grads = (mixed * z).sum((0, 2, 3), dtype=base.dtype), torch.zeros_like(gain)
    return z_grad, _channel_product(c, filtered), bias_grad, *profile_grads


def _filter(x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    if radius_squared >= 0:
        filtered: Tensor = _ops.radial_filter(x, base, gain, radius_squared)
        return filtered
    return modes.like((x * base[:, None, None]).to(x.dtype), x)


def _gains(z: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    """(C, A_H, A_W) gain of every mode, 0 outside the disc."""
    shell = modes.shell_map(z.shape[2], z.shape[3], radius_squared, gain.device)
    return torch.cat([gain, gain.new_zeros(1, gain.shape[1])])[shell].permute(2, 0, 1)


def _mixed(weight: Tensor, coefficients: Tensor) -> Tensor:
    """weight applied to the channels of coefficients."""
    mixed = coefficients.flatten(2).transpose(0, 1).flatten(1)  # one product for the whole batch
    count = coefficients.shape[2] * coefficients.shape[3]
    return (weight @ mixed).unflatten(1, (len(coefficients), count)).transpose(0, 1).contiguous().view_as(coefficients)


def _channel_product(c: Tensor, z: Tensor) -> Tensor:
    """sum over images and positions of c z^T, (C, C)."""
    return c.flatten(2).mT.flatten(0, 1).mT @ z.flatten(2).mT.flatten(0, 1)


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
    t = pointwise(x, in_weight, in_bias)
    z, coefficients = _ops.axial_conv(t, row_weight, row_bias, column_weight, column_bias, radius_squared)
    y = _ops.spectral_gate(z, coefficients, weight, bias, base, gain, radius_squared)
    out = _pointwise_like(y, out_weight, out_bias, x)
    if keep:
        return out, t, z, coefficients
    return out, x.new_empty(0), x.new_empty(0), base.new_empty(0)


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
    """Gradients of `spectral_mixer` to x and, in its order, to every weight and bias, base and gain. y and its context are not saved."""
    filtered, context = _context(z, weight, bias, base, gain, radius_squared)
    y_grad = pointwise(grad, out_weight.mT)
    out_weight_grad = _channel_product(grad, z * context)
    z_grad, *gate_grads = _gate_gradients(y_grad, z, filtered, context, weight, base, gain, radius_squared, profile_learns)
    t_grad, *conv_grads = _ops.axial_conv_backward(z_grad, t, row_weight, row_bias, column_weight)
    return (
        _pointwise_like(t_grad, in_weight.mT, None, x),
        _channel_product(t_grad, x),
        t_grad.sum((0, 2, 3), dtype=base.dtype).to(x.dtype),
        *conv_grads,
        *gate_grads,
        out_weight_grad,
        grad.sum((0, 2, 3), dtype=base.dtype).to(x.dtype),
    )
