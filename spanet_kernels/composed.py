"""Operators composed of matrix products, which a library does best, and of smaller operators: one code for every device.

Of the gate y = z o ctx, ctx = (W diag(base)) z + sum_k v_k phi_k + b, the matrix products and the modes v_k = W (gain_k o zhat_k)
are PyTorch's; adding the modes and modulating is one pass over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from . import modes

_ops = torch.ops.spanet_kernels


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of x as a matrix product in the layout of x."""
    if modes.channels_last(x):
        return functional.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
    return functional.conv2d(x.contiguous(), weight[:, :, None, None], bias)


def spectral_gate(z: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    """`reference.spectral_gate`, the filter as an addition of modes to the matrix product."""
    context = pointwise(z, (weight * base).to(weight.dtype), bias)
    return _ops.add_modes(
        context, _mixed(weight.to(base.dtype), coefficients * _gains(coefficients, gain, radius_squared)), z, radius_squared
    )


def spectral_gate_backward(
    grad: Tensor, z: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor, base: Tensor, gain: Tensor, radius_squared: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.spectral_gate_backward`; the context is computed again, not saved."""
    wide, scaled = weight.to(base.dtype), (weight * base).to(weight.dtype)
    gains = _gains(coefficients, gain, radius_squared)
    filtered = coefficients * gains
    context = _ops.add_modes(pointwise(z, scaled, bias), _mixed(wide, filtered), None, radius_squared)
    c = modes.like(grad * z, z)
    c_modes = _ops.mode_coefficients(c, radius_squared)
    back = _mixed(wide.T, c_modes)
    z_grad = modes.like(grad, z) * context + pointwise(c, scaled.T)
    z_grad = _ops.add_modes(z_grad, back * gains, None, radius_squared)
    product = torch.einsum("bohw,bchw->oc", c, z).to(base.dtype)
    weight_grad = product * base + torch.einsum("bohw,bchw->oc", c_modes, filtered)
    shell = modes.shell_map(z.shape[2], z.shape[3], radius_squared, z.device).flatten()
    by_shell = base.new_zeros(gain.shape[0] + 1, gain.shape[1])
    by_shell.index_add_(0, shell, (coefficients * back).sum(0).flatten(1).T)
    return (
        z_grad,
        weight_grad.to(weight.dtype),
        c.sum((0, 2, 3), dtype=base.dtype).to(bias.dtype),
        (wide * product).sum(0),
        by_shell[:-1],
    )


def _gains(coefficients: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    """(C, A_H, A_W) gain of every mode, 0 outside the disc."""
    height, width = coefficients.shape[2:]
    shell = modes.shell_map(height, width, radius_squared, gain.device)
    return torch.cat([gain, gain.new_zeros(1, gain.shape[1])])[shell].permute(2, 0, 1)


def _mixed(weight: Tensor, coefficients: Tensor) -> Tensor:
    """weight applied to the channels of coefficients."""
    return (weight @ coefficients.flatten(2)).view_as(coefficients)
