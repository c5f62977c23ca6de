"""The operators in the standard operators of PyTorch, for runtimes that have no others.

    torch.onnx.export(model, args, "model.onnx", dynamic_shapes=...)    calls them by itself
    torch.export.export(model, args).run_decompositions(decompositions())

Matrix products with Fourier bases that the graph computes from the sizes of its input, convolutions, and no FFT. A program
that PyTorch itself runs, torch.compile's and AOTInductor's included, needs none of this: it calls the operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import modes


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Table for `ExportedProgram.run_decompositions`: every operator of a forward pass, and PyTorch's default table."""
    return {**torch.export.default_decompositions(), **_ours()}


def call_in_graph(operator: Any, *args: Any) -> Any:
    """Call an operator in a graph, or in one for ONNX, which has no operators of others, what it consists of."""
    return _ours()[operator](*args) if torch.onnx.is_in_onnx_export() else operator(*args)


def _ours() -> dict[Any, Callable[..., Any]]:
    ops = torch.ops.spanet_kernels
    return {
        ops.radial_filter.default: _radial_filter,
        ops.mode_coefficients.default: _mode_coefficients,
        ops.axial_conv.default: _axial_conv,
        ops.spectral_gate.default: _spectral_gate,
        ops.spectral_mixer.default: _spectral_mixer,
    }


def _basis(n: int, radius_squared: int, like: Tensor) -> Tensor:
    """`modes.basis` of a length that may be symbolic: always 2 r + 1 rows, those beyond a short length zero."""
    index = torch.arange(2 * math.isqrt(radius_squared) + 1, device=like.device)
    frequency = (index + 1) // 2
    turns = (frequency[:, None] * torch.arange(n, device=like.device)).to(like.dtype) / n
    angle = (turns - turns.floor()) * (2 * math.pi)
    rows = torch.where((index % 2 == 1)[:, None], angle.cos(), angle.sin())
    rows = torch.where((index == 0)[:, None], torch.ones_like(rows), rows)
    weight = 2 - ((frequency == 0) | (2 * frequency == n)).to(like.dtype)
    return rows * ((weight / n).sqrt() * (index < n))[:, None]


def _gains(gain: Tensor, radius_squared: int) -> Tensor:
    """(C, A, A) gain of every mode, 0 outside the disc."""
    frequency = (torch.arange(2 * math.isqrt(radius_squared) + 1, device=gain.device) + 1) // 2
    squared = frequency[:, None] ** 2 + frequency**2
    gains = [gain[i][:, None, None] * (squared == shell).to(gain.dtype) for i, shell in enumerate(modes.shells(radius_squared))]
    return torch.stack(gains).sum(0)


def _filter(x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    """The radial filter, in the dtype of base."""
    scaled = x.to(base.dtype) * base[:, None, None]
    if radius_squared < 0:
        return scaled
    coefficients = _mode_coefficients(x, radius_squared) * _gains(gain, radius_squared)
    return scaled + _basis(x.shape[2], radius_squared, base).T @ coefficients @ _basis(x.shape[3], radius_squared, base)


def _radial_filter(x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    return _filter(x, base, gain, radius_squared).to(x.dtype)


def _mode_coefficients(x: Tensor, radius_squared: int) -> Tensor:
    wide = x.to(modes.profile_dtype(x.dtype))
    if radius_squared < 0:
        return wide[:, :, :0, :0]
    return _basis(x.shape[2], radius_squared, wide) @ wide @ _basis(x.shape[3], radius_squared, wide).T


def _axial_conv(
    x: Tensor, row_weight: Tensor, row_bias: Tensor, column_weight: Tensor, column_bias: Tensor, radius_squared: int
) -> tuple[Tensor, Tensor]:
    channels, size = row_weight.shape
    t = functional.conv2d(x.to(row_weight.dtype), row_weight[:, None, None], row_bias, padding=(0, size // 2), groups=channels)
    z = functional.conv2d(t, column_weight[:, None, :, None], column_bias, padding=(size // 2, 0), groups=channels).to(x.dtype)
    return z, _mode_coefficients(z, radius_squared)


def _spectral_gate(
    z: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor, base: Tensor, gain: Tensor, radius_squared: int
) -> Tensor:
    return z * functional.conv2d(_radial_filter(z, base, gain, radius_squared), weight[:, :, None, None], bias)


def _spectral_mixer(x: Tensor, in_weight: Tensor, in_bias: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_weight, row_bias, column_weight, column_bias, weight, bias, base, gain, out_weight, out_bias, radius_squared, _ = args
    in_weight, in_bias, weight, bias, out_weight, out_bias = (
        value.to(x.dtype) for value in (in_weight, in_bias, weight, bias, out_weight, out_bias)
    )
    row_weight, row_bias, column_weight, column_bias = (
        value.to(base.dtype) for value in (row_weight, row_bias, column_weight, column_bias)
    )
    t = functional.conv2d(x, in_weight[:, :, None, None], in_bias)
    z, coefficients = _axial_conv(t, row_weight, row_bias, column_weight, column_bias, radius_squared)
    y = _spectral_gate(z, coefficients, weight, bias, base, gain, radius_squared)
    empty = x.new_empty(0)
    return functional.conv2d(y, out_weight[:, :, None, None], out_bias), empty, empty, base.new_empty(0)
