"""The axial convolution: depthwise 1 x k, then k x 1, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import modes, reference
from .autograd import by_composition
from .checks import check_input, check_parameter, check_radius, odd_size

_conv = torch.ops.spanet_kernels.axial_conv.default
_gradient = torch.ops.spanet_kernels.axial_conv_backward.default


def axial_conv(
    x: Tensor,
    row_weight: Tensor,
    row_bias: Tensor | None,
    column_weight: Tensor,
    column_bias: Tensor | None,
    radius: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel along its rows, then along its columns; and give the Fourier coefficients of the result.

    t[h, w] = row_bias + sum_j row_weight[j] x[h, w + j - k//2],  z[h, w] = column_bias + sum_j column_weight[j] t[h + j - k//2, w],
    with zeros outside the planes of x and of t. Accumulated in float32 (float64 for float64), t never rounded or written.

    Args:
        x: (B, C, H, W), float64, float32, float16 or bfloat16, any strides, B and C may be 0.
        row_weight: (C, 1, 1, k), k odd, any floating dtype, on the device of x: the weight of a `Conv2d(C, C, (1, k), groups=C)`.
        row_bias: (C,) or None.
        column_weight: (C, 1, k, 1), the same k.
        column_bias: (C,) or None.
        radius: of the disc whose coefficients are wanted, in cycles per image; None for none of them.

    Returns:
        z, of the shape and dtype of x, channels_last if the channels of x are adjacent, else contiguous; differentiable to any
        order in everything; and the coefficients (B, C, A_H, A_W) of `mode_coefficients(z)`, float32 or float64, which are
        a by-product without gradient.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype, or radius is no number.
        ValueError: a wrong rank, shape or device, an even k, an empty plane, a negative or NaN radius.

    Source: arXiv 2308.11568, section 3.3.
    """
    check_input("axial_conv", x)
    radius_squared = -1 if radius is None else modes.squared_radius(check_radius("axial_conv", radius))
    size = odd_size("axial_conv", row_weight)
    channels, dtype = x.shape[1], modes.profile_dtype(x.dtype)
    shapes = {"row_weight": (channels, 1, 1, size), "row_bias": (channels,), "column_weight": (channels, 1, size, 1)}
    row_weight, row_bias, column_weight, column_bias = (
        check_parameter("axial_conv", name, value, shapes.get(name, (channels,)), x).to(dtype)
        for name, value in (
            ("row_weight", row_weight),
            ("row_bias", row_bias),
            ("column_weight", column_weight),
            ("column_bias", column_bias),
        )
    )
    out: tuple[Tensor, Tensor] = _call(x, row_weight.flatten(1), row_bias, column_weight.flatten(1), column_bias, radius_squared)
    return out


def _gradients(
    grad: Tensor, needed: Any, by_products: Any, x: Tensor, row_weight: Tensor, row_bias: Tensor, column_weight: Tensor, *_: Any
) -> tuple[Tensor | None, ...]:
    return *_gradient(grad, x, row_weight, row_bias, column_weight), None


_call = by_composition(_conv, _gradient, _gradients, reference.axial_conv)


@torch.library.register_fake("spanet_kernels::axial_conv")
def _conv_fake(
    x: Tensor, row_weight: Tensor, row_bias: Tensor, column_weight: Tensor, column_bias: Tensor, radius_squared: int
) -> tuple[Tensor, Tensor]:
    z = torch.empty_like(x, memory_format=modes.memory_format(x))
    return z, coefficients_fake(x, radius_squared)


@torch.library.register_fake("spanet_kernels::axial_conv_backward")
def _gradient_fake(
    grad: Tensor, x: Tensor, row_weight: Tensor, row_bias: Tensor, column_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight, bias = torch.empty_like(row_weight), torch.empty_like(row_bias)
    return torch.empty_like(x, memory_format=modes.memory_format(x)), weight, bias, torch.empty_like(weight), torch.empty_like(bias)


@torch.library.register_fake("spanet_kernels::mode_coefficients")
def coefficients_fake(x: Tensor, radius_squared: int) -> Tensor:
    height, width = (modes.functions(n, radius_squared) for n in x.shape[2:])
    return x.new_empty((*x.shape[:2], height, width), dtype=modes.profile_dtype(x.dtype))
