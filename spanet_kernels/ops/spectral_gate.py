"""The spectral gate: a context of filtered channels, mixed by a matrix product, modulates its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import modes
from .autograd import by_composition
from .checks import PROFILE_DTYPE, check_input, check_parameter, check_radius, count_shells
from .radial_filter import linear

_gate = torch.ops.spanet_kernels.spectral_gate.default
_gradient = torch.ops.spanet_kernels.spectral_gate_backward.default


def spectral_gate(
    z: Tensor, weight: Tensor, bias: Tensor | None, base: Tensor, gain: Tensor, radius: float | None, coefficients: Tensor | None = None
) -> Tensor:
    """Modulate z by the context of its filtered channels.

    y = z o (W F(z) + b),  F(z) = base o z + sum_k gain_k <z, phi_k> phi_k, the radial filter of base and gain. Computed as
    ctx = (W diag(base)) z + sum_k (W (gain_k o zhat_k)) phi_k + b: one matrix product with rescaled weights, a few Fourier modes
    of the product's size, and the modulation; F(z) is never formed.

    Args:
        z: (B, C, H, W), float64, float32, float16 or bfloat16, any strides, B and C may be 0.
        weight: (C, C), dtype of z: the 1x1 convolutions of all gates side by side.
        bias: (C,), dtype of z: the sum of the gates' biases; None is zero.
        base, gain, radius: as for `radial_filter`; a radius of None is an empty disc, with gain of shape (0, C).
        coefficients: those of z as `axial_conv` gives them, or None; kernels that need them compute them then.

    Returns:
        y, of the shape and dtype of z, channels_last if the channels of z are adjacent, else contiguous; differentiable to any order
        in z, weight, bias, base and gain. Gradients of z go through its coefficients too.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype, or radius is no number.
        ValueError: a wrong rank, shape or device, an empty plane, a negative or NaN radius.

    Source: arXiv 2308.11568, eqs. 19-23.
    """
    check_input("spectral_gate", z, "z")
    squared = -1 if radius is None else modes.squared_radius(check_radius("spectral_gate", radius))
    channels, wide = z.shape[1], PROFILE_DTYPE[z.dtype]
    gain_shape = (count_shells("spectral_gate", squared), channels)
    shapes = {"weight": (channels, channels), "bias": (channels,), "base": (channels,), "gain": gain_shape}
    given = {"weight": weight, "bias": bias, "base": base, "gain": gain}
    weight, bias, base, gain = (check_parameter("spectral_gate", name, given[name], shape, z) for name, shape in shapes.items())
    for name, value, dtype in (("weight", weight, z.dtype), ("bias", bias, z.dtype), ("base", base, wide), ("gain", gain, wide)):
        if value.dtype != dtype:
            raise TypeError(f"spectral_gate: {name} must be {dtype} for a z of {z.dtype}, got {value.dtype}")
    if coefficients is not None:
        height, width = (modes.functions(n, squared) for n in z.shape[2:])
        check_parameter("spectral_gate", "coefficients", coefficients, (z.shape[0], channels, height, width), z)
        if coefficients.dtype != wide:
            raise TypeError(f"spectral_gate: coefficients must be {wide} for a z of {z.dtype}, got {coefficients.dtype}")
    y: Tensor = _call(z, coefficients, weight, bias, base, gain, squared)
    return y


def _gradients(
    grad: Tensor, needed: Any, by_products: Any, z: Tensor, coefficients: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    profile_learns = needed[4] or needed[5]
    z_grad, *grads, base_grad, gain_grad = _gradient(grad, z, coefficients, *args, profile_learns)
    return z_grad, None, *grads, *((base_grad, gain_grad) if profile_learns else (None, None)), None


def _composition(
    z: Tensor, coefficients: Tensor | None, weight: Tensor, bias: Tensor, base: Tensor, gain: Tensor, radius_squared: int
) -> Tensor:
    filtered = linear(z, base, gain, radius_squared) if radius_squared >= 0 else (z * base[:, None, None]).to(z.dtype)
    context = torch.einsum("oc,bchw->bohw", weight, filtered) + bias[:, None, None]
    return modes.like(z * context, z)


_call = by_composition(_gate, _gradient, _gradients, _composition)


@torch.library.register_fake("spanet_kernels::spectral_gate")
def _gate_fake(z: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(z, memory_format=modes.memory_format(z))


@torch.library.register_fake("spanet_kernels::spectral_gate_backward")
def _gradient_fake(grad: Tensor, z: Tensor, coefficients: Tensor | None, weight: Tensor, bias: Tensor, *args: Any) -> tuple[Tensor, ...]:
    base, gain, _, profile_learns = args
    z_grad = torch.empty_like(z, memory_format=modes.memory_format(z))
    return z_grad, *(x.new_empty(x.shape) for x in (weight, bias)), *(x.new_empty(x.shape if profile_learns else 0) for x in (base, gain))
