"""Triton kernels of `image_moments`, mean and 1 / deviation of every image, and their launchers.

    _moments    sums of x - p and its square by parts of an image, whatever its layout     _finish    adds them

p, the mean of the first elements of the image, keeps the difference of the two sums exact where the mean is large. Every sum has an
order that depends on the shape of one image alone, no atomics. Bytes per element: 1 read.
"""

# Kernels have no types of their own, a launch gives them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spanet_kernels import modes, reference

from .launch import cdiv, launch, next_power_of_2

BLOCK = 4096  # elements that a program of _moments takes at a time
MOST_PARTS = 16  # of an image


@triton.jit
def _moments_kernel(x, parts, L, share, BLOCK: tl.constexpr):
    """parts (B, P, 3): p, sum x - p, sum (x - p)^2 of elements i share .. (i + 1) share of an image."""
    b, i, count = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    x += b * L
    first, at = tl.arange(0, 256), tl.arange(0, BLOCK)
    pivot = tl.sum(tl.load(x + first, mask=first < L, other=0).to(tl.float32), 0) / tl.minimum(L, 256)
    once, twice = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(i * share, tl.minimum((i + 1) * share, L), BLOCK):
        e = start + at
        inside = e < tl.minimum((i + 1) * share, L)
        d = tl.where(inside, tl.load(x + e, mask=inside, other=0).to(tl.float32) - pivot, 0)
        once += d
        twice += d * d
    parts += (b * count + i) * 3
    tl.store(parts, pivot)
    tl.store(parts + 1, tl.sum(once, 0))
    tl.store(parts + 2, tl.sum(twice, 0))


@triton.jit
def mean_and_scale(parts, b, P, inverse, eps, BP: tl.constexpr):
    """Mean and 1 / deviation of image b from its P parts."""
    i = tl.arange(0, BP)
    once = tl.sum(tl.load(parts + (b * P + i) * 3 + 1, mask=i < P, other=0), 0) * inverse
    twice = tl.sum(tl.load(parts + (b * P + i) * 3 + 2, mask=i < P, other=0), 0) * inverse
    return tl.load(parts + b * P * 3) + once, 1 / tl.sqrt(tl.maximum(twice - once * once, 0) + eps)


@triton.jit
def _finish_kernel(parts, moments, P, inverse, eps, BP: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    mean, scale = mean_and_scale(parts, b, P, inverse, eps, BP)
    tl.store(moments + b * 2, mean)
    tl.store(moments + b * 2 + 1, scale)


def serves(x: Tensor) -> bool:
    return x.dtype != torch.float64 and x.numel() > 0 and x.numel() // x.shape[0] < 2**30


def wide(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def moments_of(x: Tensor) -> Tensor:
    """(B, P, 3) sums of the parts of dense images."""
    images = x.shape[0]
    elements = x.numel() // images
    share = cdiv(cdiv(elements, BLOCK), MOST_PARTS) * BLOCK
    count = cdiv(elements, share)
    parts = wide(x, images, count, 3)
    launch(_moments_kernel, (images, count), x, parts, elements, share, BLOCK=BLOCK, num_warps=8)
    return parts


def image_moments(x: Tensor, eps: float) -> Tensor:
    """`spanet_kernels::image_moments` on a GPU."""
    if not serves(x):
        return reference.image_moments(x, eps)
    images = x.shape[0]
    parts, moments = moments_of(modes.like(x, x)), wide(x, images, 2)
    count = parts.shape[1]
    launch(_finish_kernel, (images,), parts, moments, count, images / x.numel(), eps, BP=next_power_of_2(count), num_warps=1)
    return moments
