"""Triton kernel of `gelu`: value, gradient and bias gradient in one pass, and its launcher.

a = h Phi(h), grad becomes grad o (Phi(h) + h phi(h)), h = x + bias; Phi the normal distribution, phi its density, both from one
exponential in fp32: Phi(-|h|) = exp(-h^2 / 2) q(1 / (1 + p |h|)), q of degree 5 (Abramowitz and Stegun 7.1.26), to 1e-6 of itself in
the tail and 8e-8 absolutely. A call of erf has three times the instructions, more than fit into the time that the memory takes.
A program owns BC columns and a share of the rows; its sums of the new grad are a part that `column_sums` adds.
Bytes per element: 1 read, 1 write; with a grad 2 reads, 2 writes.
"""

# Kernels have no types of their own, a launch gives them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from spanet_kernels import reference

from .column_sums import COLUMNS, ROWS, column_sums, shares
from .launch import cdiv, launch
from .radial_filter import _multiple


@triton.jit
def normal(h):
    """Phi(h) and phi(h)."""
    half = 0.5 * tl.exp(-0.5 * h * h)
    t = 1 / (1 + 0.23164190 * tl.abs(h))
    tail = half * t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return tl.where(h < 0, tail, 1 - tail), half * 0.7978845608028654


@triton.jit
def _gelu_kernel(x, bias, grad, y, parts, R, C, share, BR: tl.constexpr, BC: tl.constexpr, V: tl.constexpr):
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    C = _multiple(C, V)
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, R)
    if bias is not None:
        add = tl.load(bias + c, mask=c < C, other=0).to(tl.float32)
    total = tl.zeros((BR, BC), tl.float32)
    for r0 in range(first, last, BR):
        r = r0 + tl.arange(0, BR)
        at, inside = r.to(tl.int64)[:, None] * C + c[None, :], (r < last)[:, None] & (c < C)[None, :]
        h = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        if bias is not None:
            h += add[None, :]
        below, density = normal(h)
        tl.store(y + at, (h * below).to(y.dtype.element_ty), mask=inside)
        if grad is not None:
            slope = below + h * density
            g = tl.load(grad + at, mask=inside, other=0).to(tl.float32) * slope
            tl.store(grad + at, g.to(grad.dtype.element_ty), mask=inside)
            total += tl.where(inside, g, 0)
    if grad is not None:
        tl.store(parts + tl.program_id(0) * C + c, tl.sum(total, 0), mask=c < C)


def gelu(x: Tensor, bias: Tensor | None, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """`spanet_kernels::gelu` on a GPU."""
    if x.dtype == torch.float64 or x.numel() == 0 or not x.is_contiguous() or not (grad is None or grad.is_contiguous()):
        return reference.gelu(x, bias, grad)
    R, C = x.shape
    groups = cdiv(C, COLUMNS)
    programs, share = shares(R, groups)
    y = torch.empty_like(x)
    parts = None if grad is None else torch.empty((programs, C), dtype=torch.float32, device=x.device)
    bias = None if bias is None else bias.contiguous()
    launch(
        _gelu_kernel, (programs, groups),
        x, bias, grad, y, parts, R, C, share, BR=ROWS, BC=COLUMNS, V=gcd(C, 16 // x.element_size()), num_warps=8,
    )  # fmt: skip
    return y, x.new_empty(0, dtype=torch.float32) if parts is None else column_sums(parts)
