"""One `OpCase` per operator: inputs, reference, shapes to test and shapes to time. Tests and benchmarks read it; so can users."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import modes, reference
from .ops.axial_conv import axial_conv
from .ops.radial_filter import radial_filter

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "cropped", "expanded", "transposed", "offset")


def make_input(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", device: str = "cpu", seed: int = 0) -> Tensor:
    """Random (B, C, H, W) values of mean 1.5 in one of LAYOUTS; the memory around a slice is NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) + 1.5).to(device, dtype)
    b, c, h, w = shape
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return x.new_full((b, c + 1, h + 2, 2 * w + 1), torch.nan)[:, 1:, 2:, 1::2].copy_(x)
    if layout == "cropped":
        return x.new_full((b, c, h + 2, w + 3), torch.nan)[..., 1:-1, 2:-1].copy_(x)
    if layout == "expanded":
        return x[:1].expand(shape)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "offset":
        return x.new_full((x.numel() + 3,), torch.nan)[3:].view(shape).copy_(x)
    return x


def make_profile(channels: int, radius: float, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random base (C,) and gain (S, C) for inputs of a dtype."""
    generator = torch.Generator().manual_seed(seed + 1)
    shells = len(modes.shells(modes.squared_radius(radius)))
    base = torch.randn(channels, generator=generator, dtype=torch.float64)
    gain = torch.randn(shells, channels, generator=generator, dtype=torch.float64)
    wide = modes.profile_dtype(dtype)
    return base.to(device, wide), gain.to(device, wide)


@dataclass(frozen=True)
class OpCase:
    """What a test or a benchmark must know of an operator."""

    function: Callable[..., Any]
    sample: Callable[..., tuple[Any, ...]]  # (shape, setting, dtype, layout, device, seed) to the arguments of function
    reference: Callable[..., Any]  # the same arguments, in any dtype, to the specified result
    test: tuple[tuple[tuple[int, int, int, int], Any], ...]  # (B, C, H, W) and setting: the radius; for axial_conv k and the radius
    time: tuple[tuple[tuple[int, int, int], Any], ...]  # (C, H, W) and setting


def _sample(
    shape: tuple[int, ...], radius: float, dtype: torch.dtype, layout: str = "contiguous", device: str = "cpu", seed: int = 0
) -> tuple[Any, ...]:
    return (make_input(shape, dtype, layout, device, seed), *make_profile(shape[1], radius, dtype, device, seed), radius)


def make_kernels(channels: int, size: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random weights (C, 1, 1, k) and (C, 1, k, 1) with their biases (C,), after each its own, for inputs of a dtype."""
    generator = torch.Generator().manual_seed(seed + 2)
    shapes = (channels, 1, 1, size), (channels,), (channels, 1, size, 1), (channels,)
    wide = modes.profile_dtype(dtype)
    row, row_bias, column, column_bias = (torch.randn(s, generator=generator, dtype=torch.float64).to(device, wide) for s in shapes)
    return row, row_bias, column, column_bias


def _sample_conv(
    shape: tuple[int, ...],
    setting: tuple[int, float | None],
    dtype: torch.dtype,
    layout: str = "contiguous",
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Any, ...]:
    size, radius = setting
    return (make_input(shape, dtype, layout, device, seed), *make_kernels(shape[1], size, dtype, device, seed), radius)


def _reference_conv(
    x: Tensor, row_weight: Tensor, row_bias: Tensor, column_weight: Tensor, column_bias: Tensor, radius: float | None
) -> tuple[Tensor, Tensor]:
    squared = -1 if radius is None else modes.squared_radius(radius)
    return reference.axial_conv(x, row_weight.flatten(1), row_bias, column_weight.flatten(1), column_bias, squared)


def _reference(x: Tensor, base: Tensor, gain: Tensor, radius: float) -> Tensor:
    return reference.radial_filter(x, base, gain, modes.squared_radius(radius))


CASES = {
    "radial_filter": OpCase(
        radial_filter,
        _sample,
        _reference,
        test=(
            ((2, 16, 1, 1), 1),
            ((1, 65, 1, 5), 2),
            ((2, 3, 7, 7), 1),
            ((2, 65, 7, 7), 3),
            ((3, 33, 14, 14), 1),
            ((2, 20, 8, 6), 2),
            ((1, 40, 17, 3), 2.5),
            ((2, 5, 25, 42), 2),
            ((1, 17, 28, 28), 2),
            ((1, 64, 56, 56), 2),
            ((1, 4, 56, 56), 8),
            ((1, 2, 100, 167), 2),
            ((2, 18, 9, 18), 100),
            ((1, 2, 64, 61), 45),
            ((2, 45, 14, 14), 4),
            ((1, 70, 20, 52), 40),
            ((1, 64, 700, 12), 3),
            ((3, 40, 1, 1), 0),
        ),
        # the stages of SPANet-S and SPANet-B at 224 x 224, and those of S at the sizes of detection, unaligned ones among them
        time=(
            ((64, 56, 56), 2),
            ((128, 28, 28), 2),
            ((320, 14, 14), 1),
            ((512, 7, 7), 1),
            ((96, 56, 56), 2),
            ((192, 28, 28), 2),
            ((384, 14, 14), 1),
            ((768, 7, 7), 1),
            ((64, 200, 334), 2),
            ((128, 100, 167), 2),
            ((320, 50, 84), 1),
            ((512, 25, 42), 1),
        ),
    ),
    "axial_conv": OpCase(
        axial_conv,
        _sample_conv,
        _reference_conv,
        test=(
            ((2, 16, 1, 1), (9, 1)),
            ((1, 65, 1, 5), (1, 2)),
            ((2, 33, 7, 7), (7, 1)),
            ((2, 3, 7, 7), (7, None)),
            ((3, 40, 14, 14), (7, 1)),
            ((2, 20, 8, 6), (5, 2)),
            ((1, 40, 17, 3), (3, 2.5)),
            ((2, 5, 25, 42), (31, 2)),
            ((1, 17, 28, 28), (7, 2)),
            ((1, 64, 56, 56), (7, 2)),
            ((1, 4, 56, 56), (13, 8)),
            ((1, 2, 100, 167), (7, 2)),
            ((2, 18, 9, 18), (11, 100)),
        ),
        time=(
            ((64, 56, 56), (7, 2)),
            ((128, 28, 28), (7, 2)),
            ((320, 14, 14), (7, 1)),
            ((512, 7, 7), (7, 1)),
            ((96, 56, 56), (7, 2)),
            ((192, 28, 28), (7, 2)),
            ((384, 14, 14), (7, 1)),
            ((768, 7, 7), (7, 1)),
        ),
    ),
}
