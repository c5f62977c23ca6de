"""Triton kernel of `column_sums`: the sums over the rows of a matrix, fp32 accumulation, and its launcher.

A program owns BC columns and a share of the rows, and leaves a part; a second launch of narrow programs adds the parts, in one order.
Bytes: 1 read.
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

from .launch import cdiv, launch
from .radial_filter import _multiple

ROWS, COLUMNS = 64, 64  # of a tile
PROGRAMS = 1024  # enough for any GPU
FEW = 1024  # rows that a program sums alone


@triton.jit
def _sums_kernel(x, parts, R, C, share, BR: tl.constexpr, BC: tl.constexpr, V: tl.constexpr):
    """parts (P, C): program (p, group of columns) adds rows p share .. (p + 1) share."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    C = _multiple(C, V)
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, R)
    total = tl.zeros((BR, BC), tl.float32)
    for r0 in range(first, last, BR):
        r = r0 + tl.arange(0, BR)
        total += tl.load(x + r.to(tl.int64)[:, None] * C + c[None, :], mask=(r < last)[:, None] & (c < C)[None, :], other=0).to(tl.float32)
    tl.store(parts + tl.program_id(0) * C + c, tl.sum(total, 0), mask=c < C)


def shares(rows: int, groups: int) -> tuple[int, int]:
    """Programs beside one another over the rows, for `groups` of columns, and the rows of each, whole tiles."""
    tiles = cdiv(rows, ROWS)
    share = cdiv(tiles, min(tiles, max(PROGRAMS // groups, 1)))
    return cdiv(tiles, share), share * ROWS


def column_sums(x: Tensor) -> Tensor:
    """`spanet_kernels::column_sums` on a GPU."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.column_sums(x)
    x = x.contiguous()
    R, C = x.shape
    rows, columns = (128, 16) if R <= FEW else (ROWS, COLUMNS)
    groups = cdiv(C, columns)
    parts, share = (1, R) if R <= FEW else shares(R, groups)
    out = torch.empty((C,) if parts == 1 else (parts, C), dtype=torch.float32, device=x.device)
    launch(_sums_kernel, (parts, groups), x, out, R, C, share, BR=rows, BC=columns, V=gcd(C, 16 // x.element_size()), num_warps=4)
    return out if parts == 1 else column_sums(out)
