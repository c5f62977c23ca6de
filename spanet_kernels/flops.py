"""Floating-point operations of the operators, for PyTorch's counter.

    with torch.utils.flop_counter.FlopCounterMode(custom_mapping=spanet_kernels.flop_formulas()):
        model(x)

As everywhere in that counter a multiply-add is two; filters, norms and products of maps are not counted, nor is what a backward pass
computes again.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

Shape = torch.Size


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas of every operator that multiplies matrices or convolves, by operator; of shapes in place of tensors."""
    ops = torch.ops.spanet_kernels
    ours: dict[Any, Callable[..., int]] = {
        ops.axial_conv: _axial_conv,
        ops.axial_conv_backward: lambda grad, x, row_weight, *_, **__: 2 * _axial_conv(x, row_weight),
        ops.spectral_gate: lambda z, coefficients, weight, *_, **__: _product(z, weight),
        ops.spectral_gate_backward: lambda grad, z, coefficients, weight, *_, **__: 2 * _product(z, weight),
        ops.spectral_mixer: lambda x, weight, bias, row_weight, *_, **__: _mixer(x, weight, row_weight),
        ops.spectral_mixer_backward: _mixer_backward,
        ops.mixer_branch: lambda y, t, context, x, *args, **__: _mixer(x, args[5], args[7]),
        ops.mixer_branch_backward: lambda x_grad, grad, x, t, context, added, *args, **__: 2 * _mixer(x, args[0], args[1]),
        ops.outer_sum: lambda left, left_factor, right, *_, **__: 2 * prod(left) * right[1],
        ops.pointwise_mlp_backward: lambda x_grad, h_grad, grad, h, weight_in, weight_out, **__: (
            _product(grad, weight_out[::-1]) + _product(h, weight_in[::-1])
        ),
        ops.pointwise_pair: _pair,
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ours[torch.ops.mkldnn._linear_pointwise] = lambda rows, weight, *_, **__: 2 * prod(rows) * weight[0]
    return ours


def _product(x: Shape, weight: Shape) -> int:
    """A 1x1 convolution."""
    return 2 * prod(x) * weight[0]


def _axial_conv(x: Shape, row_weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * 2 * prod(x) * row_weight[-1]


def _mixer(x: Shape, weight: Shape, row_weight: Shape) -> int:
    return 3 * _product(x, weight) + _axial_conv(x, row_weight)


def _mixer_backward(
    grad: Shape, x: Shape, t: Shape, z: Shape, coefficients: Shape, weight: Shape, row_weight: Shape, *_: Any, **__: Any
) -> int:
    return 2 * _mixer(x, weight, row_weight)


def _pair(y: Shape, x: Shape, *args: Any, **__: Any) -> int:
    weight_in, _, weight_out = args[6:9]
    between = x if weight_in is None else Shape((x[0], weight_in[0], *x[2:]))
    return (0 if weight_in is None else _product(x, weight_in)) + _product(between, weight_out)
