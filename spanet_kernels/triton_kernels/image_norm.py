"""Triton kernels of `image_norm`, a GroupNorm with one group, and its backward, for either layout, and their launchers.

For image b of L = C N elements, n = (x - mean) / deviation: y = weight o n + bias, and backward, with g = weight o grad,

    x_grad = (g - sum(g) / L - n sum(g o n) / L) / deviation      weight_grad = sum_bn grad o n      bias_grad = sum_bn grad

    forward     _moments (image_moments.py)     _normalise: y
    backward    _norm_sums: sums of grad and grad o n by parts and channels     _norm_gradient: x_grad

Every sum has an order that depends on the shape of one image alone, no atomics. Bytes per element: 2 reads, 1 write; backward 4 reads,
1 write. PyTorch's GroupNorm on a GPU takes and gives NCHW: of channels_last it makes copies, this does not.
"""

# Kernels have no types of their own, a launch gives them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spanet_kernels import modes, reference

from .column_sums import column_sums
from .image_moments import mean_and_scale, moments_of, serves, wide
from .launch import cdiv, launch, next_power_of_2
from .spectral_gate import _place, _plane, access

PIXELS, CHANNELS = 64, 64  # of a tile
PIECES = 8  # shares of the pixels of an image in the backward pass, at most


@triton.jit
def _normalise_kernel(
    x, y, parts, moments, weight, bias, N, C, P, inverse, eps,
    BP: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    b, tile, n, c = _place(N, C, BN, BC)
    mean, scale = mean_and_scale(parts, b, P, inverse, eps, BP)
    if (tile == 0) & (tl.program_id(0) % tl.cdiv(C, BC) == 0):
        tl.store(moments + b * 2, mean)
        tl.store(moments + b * 2 + 1, scale)
    place, real = _plane(x, b, n, c, N, C, V, CHANNELS_LAST, INDEX)
    target, _ = _plane(y, b, n, c, N, C, V, CHANNELS_LAST, INDEX)
    factor, offset = tl.load(weight + c, mask=c < C, other=0).to(tl.float32), tl.load(bias + c, mask=c < C, other=0).to(tl.float32)
    value = (tl.load(place, mask=real, other=0).to(tl.float32) - mean) * scale
    tl.store(target, (value * factor[None, :] + offset[None, :]).to(y.dtype.element_ty), mask=real)


@triton.jit
def _norm_sums_kernel(
    grad, x, moments, weight, channels, image, N, C, share,
    BN: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """channels (B, T, 2, C): sums of grad o n and of grad; image (B, T, groups, 2): those weighted, over the channels too."""
    b, t, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    c = group * BC + tl.arange(0, BC)
    mean, scale = tl.load(moments + b * 2), tl.load(moments + b * 2 + 1)
    with_n, alone = tl.zeros((BN, BC), tl.float32), tl.zeros((BN, BC), tl.float32)
    last = tl.minimum((t + 1) * share, N)
    for first in range(t * share, last, BN):
        n = first + tl.arange(0, BN)
        place, real = _plane(grad, b, n, c, N, C, V, CHANNELS_LAST, INDEX)
        slope = tl.load(place, mask=real, other=0).to(tl.float32)
        place, _ = _plane(x, b, n, c, N, C, V, CHANNELS_LAST, INDEX)
        with_n += tl.where(real, slope * (tl.load(place, mask=real, other=0).to(tl.float32) - mean) * scale, 0)
        alone += slope
    weighted, plain = tl.sum(with_n, 0), tl.sum(alone, 0)
    row = b * tl.num_programs(1) + t
    tl.store(channels + row * 2 * C + c, weighted, mask=c < C)
    tl.store(channels + row * 2 * C + C + c, plain, mask=c < C)
    factor = tl.load(weight + c, mask=c < C, other=0).to(tl.float32)
    image += (row * tl.num_programs(2) + group) * 2
    tl.store(image, tl.sum(factor * weighted, 0))
    tl.store(image + 1, tl.sum(factor * plain, 0))


@triton.jit
def _norm_gradient_kernel(
    grad, x, x_grad, moments, image, weight, N, C, P, inverse,
    BP: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    b, _, n, c = _place(N, C, BN, BC)
    i = tl.arange(0, BP)
    mean, scale = tl.load(moments + b * 2), tl.load(moments + b * 2 + 1)
    with_n = tl.sum(tl.load(image + (b * P + i) * 2, mask=i < P, other=0), 0) * inverse
    alone = tl.sum(tl.load(image + (b * P + i) * 2 + 1, mask=i < P, other=0), 0) * inverse
    place, real = _plane(grad, b, n, c, N, C, V, CHANNELS_LAST, INDEX)
    slope = tl.load(place, mask=real, other=0).to(tl.float32) * tl.load(weight + c, mask=c < C, other=0).to(tl.float32)[None, :]
    place, _ = _plane(x, b, n, c, N, C, V, CHANNELS_LAST, INDEX)
    normalised = (tl.load(place, mask=real, other=0).to(tl.float32) - mean) * scale
    target, _ = _plane(x_grad, b, n, c, N, C, V, CHANNELS_LAST, INDEX)
    tl.store(target, (scale * (slope - alone - normalised * with_n)).to(x_grad.dtype.element_ty), mask=real)


def image_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`spanet_kernels::image_norm` on a GPU."""
    if not serves(x):
        return reference.image_norm(x, weight, bias, eps)
    B, C, H, W = x.shape
    N = H * W
    x, weight, bias = modes.like(x, x), weight.contiguous(), bias.contiguous()
    y, moments, parts = torch.empty_like(x), wide(x, B, 2), moments_of(x)
    grid, count = (B * cdiv(N, PIXELS) * cdiv(C, CHANNELS),), parts.shape[1]
    launch(
        _normalise_kernel, grid,
        x, y, parts, moments, weight, bias, N, C, count, 1 / (C * N), eps, BP=next_power_of_2(count), **_tiles(x),
    )  # fmt: skip
    return y, moments


def image_norm_backward(grad: Tensor, x: Tensor, moments: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`spanet_kernels::image_norm_backward` on a GPU."""
    if not serves(x):
        return reference.image_norm_backward(grad, x, moments, weight)
    B, C, H, W = x.shape
    N = H * W
    x, weight = modes.like(x, x), weight.contiguous()
    grad = modes.like(grad, x)
    groups, share = cdiv(C, CHANNELS), cdiv(cdiv(N, PIXELS), PIECES) * PIXELS
    T = cdiv(N, share)
    channels, image = wide(x, B * T, 2 * C), wide(x, B, T * groups, 2)
    x_grad, tiles = torch.empty_like(x), _tiles(x)
    launch(_norm_sums_kernel, (B, T, groups), grad, x, moments, weight, channels, image, N, C, share, **tiles | {"num_warps": 8})
    launch(
        _norm_gradient_kernel, (B * cdiv(N, PIXELS) * groups,),
        grad, x, x_grad, moments, image, weight, N, C, T * groups, 1 / (C * N), BP=next_power_of_2(T * groups), **tiles,
    )  # fmt: skip
    weight_grad, bias_grad = column_sums(channels).to(weight.dtype).view(2, C).unbind()
    return x_grad, weight_grad, bias_grad


def _tiles(x: Tensor) -> dict[str, object]:
    return dict(access(x), BN=PIXELS, BC=CHANNELS, num_warps=4)
