"""Triton kernel of `pointwise_pair` for 16-bit channels_last tensors on a GPU, and its launcher.

A row r is a position of an image. Each product is one launch of one kernel,

    y[r, d] = act(sum_c n[r, c] W[d, c] + bias[d]) + scale[d] residual[r, d],     n = x, or norm_weight o (x - mean) / deviation + norm_bias

with the norm applied to a tile of x as it is loaded, and GELU, residual and scale as the result leaves its accumulators (fp32). What
stands between the two products goes through memory, and programs of the same rows are neighbours, so that x leaves memory once; of up to
128 channels a program keeps its rows of x and of the result, and makes and multiplies what stands between a few channels at a time.
Bytes per position, of an MLP C -> 4 C -> C with a residual in 16 bits: 24 C, or 6 C in one launch; by PyTorch's operators with their
norm 50 C. FLOP 16 C^2: at 64 channels 26 GFLOP for 128 images at 56 x 56, and 103 M values of GELU, some 16 instructions each, 56 us of an
H200's issue slots. The two launches were measured at 207 + 80 us there, the one at 196; at 128 channels and 28 x 28 126 + 47 and 147.
Other dtypes, layouts and a factor are for `reference`.
"""

# Kernels have no types of their own, a launch gives them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spanet_kernels import reference

from .gelu import normal
from .launch import cdiv, launch, next_power_of_2
from .radial_filter import _multiple
from .spectral_gate import AMD, PRECISION
from .tiles import tile

ONE_LAUNCH = 128  # channels of x and of the result up to which a pair is one launch


@triton.jit
def _normalised(value, norm_weight, norm_bias, mean, inverse, c, C):
    factor = tl.load(norm_weight + c, mask=c < C, other=0).to(tl.float32)
    offset = tl.load(norm_bias + c, mask=c < C, other=0).to(tl.float32)
    wide = (value.to(tl.float32) - mean[:, None]) * inverse[:, None]
    return (wide * factor[None, :] + offset[None, :]).to(value.dtype)


@triton.jit
def _with_bias(total, bias, d, D):
    if bias is not None:
        total += tl.load(bias + d, mask=d < D, other=0).to(tl.float32)[None, :]
    return total


@triton.jit
def _store(y, total, residual, scale, r, d, R, D):
    at, inside = r[:, None] * D + d[None, :], (r < R)[:, None] & (d < D)[None, :]
    if residual is not None:
        added = tl.load(residual + at, mask=inside, other=0).to(tl.float32)
        if scale is not None:
            added *= tl.load(scale + d, mask=d < D, other=0).to(tl.float32)[None, :]
        total += added
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _pointwise_kernel(
    x, y, weight, bias, moments, norm_weight, norm_bias, residual, scale, R, N, C, D,
    BR: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, VC: tl.constexpr, VD: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(D, BD)
    r = (tl.program_id(0) // groups).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.program_id(0) % groups * BD + tl.arange(0, BD)
    C, D = _multiple(C, VC), _multiple(D, VD)
    if moments is not None:
        mean = tl.load(moments + r // N * 2, mask=r < R, other=0)
        inverse = tl.load(moments + r // N * 2 + 1, mask=r < R, other=0)
    total = tl.zeros((BR, BD), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        value = tl.load(x + r[:, None] * C + c[None, :], mask=(r < R)[:, None] & (c < C)[None, :], other=0)
        if moments is not None:
            value = _normalised(value, norm_weight, norm_bias, mean, inverse, c, C)
        total = tl.dot(
            value,
            tl.load(weight + c[:, None] + d[None, :] * C, mask=(c < C)[:, None] & (d < D)[None, :], other=0),
            total,
            input_precision=PRECISION,
        )
    total = _with_bias(total, bias, d, D)
    if GELU:
        below, _ = normal(total)
        total = total * below
    _store(y, total, residual, scale, r, d, R, D)


@triton.jit
def _pair_kernel(
    x, y, moments, norm_weight, norm_bias, residual, scale, weight_in, bias_in, weight_out, bias_out, R, N, C, M, D,
    BR: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, VC: tl.constexpr, VM: tl.constexpr, VD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    c, d = tl.arange(0, BC), tl.arange(0, BD)
    C, M, D = _multiple(C, VC), _multiple(M, VM), _multiple(D, VD)
    value = tl.load(x + r[:, None] * C + c[None, :], mask=(r < R)[:, None] & (c < C)[None, :], other=0)
    if moments is not None:
        mean = tl.load(moments + r // N * 2, mask=r < R, other=0)
        inverse = tl.load(moments + r // N * 2 + 1, mask=r < R, other=0)
        value = _normalised(value, norm_weight, norm_bias, mean, inverse, c, C)
    total = tl.zeros((BR, BD), tl.float32)
    for m0 in range(0, M, BM):
        m = m0 + tl.arange(0, BM)
        inner = tl.load(weight_in + c[:, None] + m[None, :] * C, mask=(c < C)[:, None] & (m < M)[None, :], other=0)
        h = _with_bias(tl.dot(value, inner, input_precision=PRECISION), bias_in, m, M)
        below, _ = normal(h)
        outer = tl.load(weight_out + m[:, None] + d[None, :] * M, mask=(m < M)[:, None] & (d < D)[None, :], other=0)
        total = tl.dot((h * below).to(value.dtype), outer, total, input_precision=PRECISION)
    _store(y, _with_bias(total, bias_out, d, D), residual, scale, r, d, R, D)


@functools.lru_cache(maxsize=1024)
def plan(channels: int, out: int) -> dict[str, Any]:
    """Tile, warps and stages of a product, whatever the number of its rows."""
    br, bd, bc, warps, stages = tile("pointwise", channels, out) or (64, 128 if out % 128 == 0 else 64, 64, 4, 2 if AMD else 3)
    divisors = dict(VC=gcd(channels, 8), VD=gcd(out, 8))
    return dict(BR=br, BD=bd, BC=bc, **divisors, num_warps=warps, num_stages=stages if channels > bc else 1)


@functools.lru_cache(maxsize=1024)
def pair_plan(channels: int, between: int, out: int) -> dict[str, Any]:
    """The same of a pair in one launch; the depth of its tile is all channels."""
    br, bm, _, warps, stages = tile("pair", channels, between) or ((64, 32, 0, 4, 1) if AMD else (128, 32, 0, 8, 2))
    divisors = dict(VC=gcd(channels, 8), VM=gcd(between, 8), VD=gcd(out, 8))
    sizes = dict(BC=max(16, next_power_of_2(channels)), BD=max(16, next_power_of_2(out)))
    return dict(BR=br, BM=bm, **sizes, **divisors, num_warps=warps, num_stages=stages)


def _dense(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def pointwise(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: tuple[Tensor | None, ...], *added: Tensor | None, gelu: bool
) -> None:
    """One product of the rows of x into those of y."""
    B, C, H, W = x.shape
    D, R = weight.shape[0], B * H * W
    choice = plan(C, D)
    programs = cdiv(R, choice["BR"]) * cdiv(D, choice["BD"])
    launch(_pointwise_kernel, (programs,), x, y, weight, bias, *norm, *added, R, H * W, C, D, GELU=gelu, PRECISION=PRECISION, **choice)


def pointwise_pair(
    y: Tensor,
    x: Tensor,
    moments: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    factor: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    weight_in: Tensor | None,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    before: Tensor | None = None,
) -> None:
    """`spanet_kernels::pointwise_pair` on a GPU."""
    whole_norm = moments is None or (norm_weight is not None and norm_bias is not None)
    dense = _dense(x) and _dense(y) and (residual is None or _dense(residual))
    special = factor is not None or before is not None or x.dtype not in (torch.bfloat16, torch.float16)
    if special or not x.numel() or not whole_norm or not dense:
        norm, added = (moments, norm_weight, norm_bias), (factor, residual, residual_scale)
        reference.pointwise_pair(y, x, *norm, *added, weight_in, bias_in, weight_out, bias_out, before)
        return
    norm = moments, norm_weight, norm_bias
    if weight_in is not None and max(x.shape[1], y.shape[1]) <= ONE_LAUNCH:
        (B, C, H, W), (M, D) = x.shape, (weight_in.shape[0], weight_out.shape[0])
        choice = pair_plan(C, M, D)
        launch(
            _pair_kernel, (cdiv(B * H * W, choice["BR"]),),
            x, y, *norm, residual, residual_scale, weight_in, bias_in, weight_out, bias_out, B * H * W, H * W, C, M, D,
            PRECISION=PRECISION, **choice,
        )  # fmt: skip
        return
    if weight_in is not None:
        hidden = torch.empty(
            (x.shape[0], weight_in.shape[0], *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        pointwise(hidden, x, weight_in, bias_in, norm, None, None, gelu=True)
        x, norm = hidden, (None, None, None)
    pointwise(y, x, weight_out, bias_out, norm, residual, residual_scale, gelu=False)
