"""Triton kernels of `spectral_gate` and its backward in 16 bits on tensor cores, and their launchers.

For image b, pixel n and the K modes phi_k of the disc, z[n, c] the plane's values and zhat[k, c] its coefficients,

    v[k, o] = sum_c W[o, c] gain[shell k, c] zhat[k, c]                            W' = W diag(base)
    ctx[n, o] = sum_c z[n, c] W'[o, c] + sum_k phi_k[n] v[k, o] + bias[o]          y = z o ctx

and backward, c = grad o z, chat[k, o] = sum_n phi_k[n] c[n, o],

    back[k, c] = sum_o chat[k, o] W[o, c]
    z_grad[n, c] = grad[n, c] ctx[n, c] + sum_o c[n, o] W'[o, c] + sum_k phi_k[n] gain[shell k, c] back[k, c]
    P[o, c] = sum_bn c[n, o] z[n, c]               weight_grad = P diag(base) + sum_bk chat[k, o] gain[shell k, c] zhat[k, c]
    base_grad = sum_o W o P      gain_grad[s] = sum_b sum_{k in s} zhat[k] back[k]      bias_grad = sqrt(N) sum_b chat[0]

Both are one matrix product whose last step is the modes. A program owns a tile (BN pixels of one image, BO channels);
programs of the same pixels are neighbours, so that z leaves memory once. One code serves NCHW and channels_last: the strides
decide which axis of a tile is contiguous. A tile never straddles images: a NaN and a rounding stay in their image whatever the
batch. The price is padding of the products, not of memory: 49 pixels fill 64 (23 % idle), 196 fill 256 (23 %), and with tiles of 128
forward and 64 backward 784 fill 896 and 832 (13 and 6 %), 3136 fill 3200 and 3136 (2 and 0 %).

    forward     _mix: v and W'     _gate: y
    backward    _mix     _context: grad o ctx, c, parts of chat     _fold: chat     _mix_backward: back     _gradient: z_grad, in
                place of grad o ctx     _outer: parts of weight_grad, base_grad     sums of parts in a fixed order, no atomics

The floor is 4 bytes per pixel and channel forward (z, y) and 6 backward (grad, z, z_grad); backward moves
18 (_context 8, _gradient 6, _outer 4). Products: 2 C FLOP per pixel and channel forward, 6 C backward, before padding.
Measured on an H200, bf16, 128 images, channels_last, _mix and _gate together (backward), us: 64 at 56 x 56 60 (271), 128 at 28 x 28 43
(193), 320 at 14 x 14 51 (198), 512 at 7 x 7 49 (252); a copy takes 26, 15, 11 and 6.5. _mix is 16 of each: few programs, long sums.

Coefficients, basis and v stay fp32: a 16-bit v or phi errs as much as the result's rounding where features have a mean. The
steps that multiply them split fp32 into two bf16 terms and take three products (error 2^-16); no TF32 and no overflow of fp16 is
involved, and NVIDIA and AMD share the code. 16 modes cost as much as 48 channels of the product. fp32 planes are for `composed`, whose
products are a library's: in three terms and six products the same kernels took 1.1 to 2.4 times as long forward as product, filter
and modulation together (H200, 128 images, stages of SPANet-S); so are fp64 and discs of more than 32 modes.
"""

# Kernels have no types of their own, a launch gives them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
from math import gcd, prod, sqrt
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spanet_kernels import composed, modes

from .launch import cdiv, launch, next_power_of_2
from .radial_filter import _multiple, _shell_kernel
from .tiles import tile

MAX_MODES = 32


@triton.jit
def _place(N, C, BN: tl.constexpr, BO: tl.constexpr):
    """This program's image, pixel tile, pixels (BN,) and channels (BO,)."""
    groups = tl.cdiv(C, BO)
    tiles = tl.cdiv(N, BN)
    tile = tl.program_id(0) // groups
    o = tl.program_id(0) % groups * BO + tl.arange(0, BO)
    return (tile // tiles).to(tl.int64), tile % tiles, tile % tiles * BN + tl.arange(0, BN), o


@triton.jit
def _plane(x, b, n, c, N, C, V: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr):
    """Pointers (n, c) into image b, and which of them exist."""
    if CHANNELS_LAST:
        C = _multiple(C, V)
        offset = n.to(INDEX)[:, None] * C + c[None, :]
    else:
        N = _multiple(N, V)
        offset = c.to(INDEX)[None, :] * N + n[:, None]
    return x + b * N * C + offset, (n < N)[:, None] & (c < C)[None, :]


@triton.jit
def _rows(v, r, R, c, C):
    """Values (r, c) of a (R, C) matrix, zero outside."""
    return tl.load(v + r.to(tl.int64)[:, None] * C + c[None, :], mask=(r < R)[:, None] & (c < C)[None, :], other=0)


@triton.jit
def _phi(phi, n, k, N, KP: tl.constexpr):
    """Values (n, k) of the modes, zero outside."""
    return tl.load(phi + n[:, None] * KP + k[None, :], mask=(n < N)[:, None], other=0)


@triton.jit
def _gains(gain, s, r, R, c, C, gain_s, gain_c):
    """Gains (r, c) of the rows r = (b, k) in shells s, zero outside."""
    return tl.load(gain + s[:, None] * gain_s + c[None, :] * gain_c, mask=(r < R)[:, None] & (c < C)[None, :], other=0)


@triton.jit
def _coefficients(zhat, at, r, R, c, C, M):
    """Coefficients (r, c) of the rows r = (b, k) at `_places`, from (B, C, M), zero outside."""
    return tl.load(zhat + at[:, None] + c[None, :] * M, mask=(r < R)[:, None] & (c < C)[None, :], other=0)


@triton.jit
def _places(place, r, K, C, M):
    """Offsets of the rows r = (b, k) in (B, C, M)."""
    return (r // K).to(tl.int64) * C * M + tl.load(place + r % K)


@triton.jit
def _product(
    x, w, v, phi, b, n, o, N, C, K, BC: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(n, o) sum_c x[n, c] w[o, c] (TRANSPOSED: w[c, o]) + sum_k phi[n, k] v[k, o]."""
    total = tl.zeros((n.shape[0], o.shape[0]), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        place, real = _plane(x, b, n, c, N, C, V, CHANNELS_LAST, INDEX)
        at = w + c[:, None] * C + o[None, :] if TRANSPOSED else w + c[:, None] + o[None, :] * C
        weight = tl.load(at, mask=(c < C)[:, None] & (o < C)[None, :], other=0)
        total = tl.dot(tl.load(place, mask=real, other=0), weight, total, input_precision=PRECISION)
    for k0 in tl.range(0, KP, 16, num_stages=1):
        k = k0 + tl.arange(0, 16)
        total = tl.dot(_phi(phi, n, k, N, KP), _rows(v + b * K * C, k, K, o, C), total, input_precision=PRECISION)
    return total


@triton.jit
def _mix_kernel(
    zhat, v, weight, scaled, base, gain, place, shell, B, C, K, M, base_c, gain_s, gain_c,
    BR: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    R = B * K
    at, s = _places(place, r, K, C, M), tl.load(shell + r % K)
    total = tl.zeros((BR, BO), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        inside = (c < C)[:, None] & (o < C)[None, :]
        w = tl.load(weight + c[:, None] + o[None, :] * C, mask=inside, other=0).to(tl.float32)
        if tl.program_id(0) == 0:
            factor = tl.load(base + c * base_c, mask=c < C, other=0)
            tl.store(scaled + c[:, None] + o[None, :] * C, (w * factor[:, None]).to(scaled.dtype.element_ty), mask=inside)
        f = _coefficients(zhat, at, r, R, c, C, M) * _gains(gain, s, r, R, c, C, gain_s, gain_c)
        total = tl.dot(f, w, total, input_precision=PRECISION)
    tl.store(v + r.to(tl.int64)[:, None] * C + o[None, :], total, mask=(r < R)[:, None] & (o < C)[None, :])


@triton.jit
def _mix_backward_kernel(
    chat, zhat, v, products, weight, gain, place, shell, B, C, K, M, gain_s, gain_c, root,
    BR: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """v = gain o back, and the terms (B, K + 1, C) of gain_grad, zhat o back, and of bias_grad, sqrt(N) chat[0]."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    R = B * K
    total = tl.zeros((BR, BC), tl.float32)
    for o0 in range(0, C, BO):
        o = o0 + tl.arange(0, BO)
        total = tl.dot(_rows(chat, r, R, o, C), _rows(weight, o, C, c, C).to(tl.float32), total, input_precision=PRECISION)
    inside = (r < R)[:, None] & (c < C)[None, :]
    row = r.to(tl.int64)[:, None] * C + c[None, :]
    image = (r // K).to(tl.int64)[:, None] * C  # a product has one row more per image
    tl.store(v + row, total * _gains(gain, tl.load(shell + r % K), r, R, c, C, gain_s, gain_c), mask=inside)
    tl.store(products + image + row, total * _coefficients(zhat, _places(place, r, K, C, M), r, R, c, C, M), mask=inside)
    last = inside & (r % K == 0)[:, None]
    tl.store(products + image + row + K * C, root * tl.load(chat + row, mask=last, other=0), mask=last)


@triton.jit
def _gate_kernel(
    z, y, w, v, phi, bias, N, C, K,
    BN: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, _, n, o = _place(N, C, BN, BO)
    context = _product(z, w, v, phi, b, n, o, N, C, K, BC, KP, V, CHANNELS_LAST, INDEX, PRECISION, False)
    context += tl.load(bias + o, mask=o < C, other=0).to(tl.float32)[None, :]
    place, real = _plane(z, b, n, o, N, C, V, CHANNELS_LAST, INDEX)
    target, _ = _plane(y, b, n, o, N, C, V, CHANNELS_LAST, INDEX)
    tl.store(target, (context * tl.load(place, mask=real, other=0).to(tl.float32)).to(y.dtype.element_ty), mask=real)


@triton.jit
def _context_kernel(
    grad, z, z_grad, c, parts, w, v, phi, bias, N, C, K,
    BN: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z_grad = grad o ctx so far, c = grad o z, and this tile's part (K, BO) of chat."""
    b, tile, n, o = _place(N, C, BN, BO)
    context = _product(z, w, v, phi, b, n, o, N, C, K, BC, KP, V, CHANNELS_LAST, INDEX, PRECISION, False)
    context += tl.load(bias + o, mask=o < C, other=0).to(tl.float32)[None, :]
    place, real = _plane(grad, b, n, o, N, C, V, CHANNELS_LAST, INDEX)
    slope = tl.load(place, mask=real, other=0).to(tl.float32)
    place, _ = _plane(z_grad, b, n, o, N, C, V, CHANNELS_LAST, INDEX)
    tl.store(place, (slope * context).to(z_grad.dtype.element_ty), mask=real)
    place, _ = _plane(z, b, n, o, N, C, V, CHANNELS_LAST, INDEX)
    product = slope * tl.load(place, mask=real, other=0).to(tl.float32)
    place, _ = _plane(c, b, n, o, N, C, V, CHANNELS_LAST, INDEX)
    tl.store(place, product.to(c.dtype.element_ty), mask=real)
    parts += (b * tl.cdiv(N, BN) + tile) * K * C
    for k0 in tl.range(0, KP, 16, num_stages=1):
        k = k0 + tl.arange(0, 16)
        part = tl.dot(tl.trans(_phi(phi, n, k, N, KP)), product, input_precision=PRECISION)
        tl.store(parts + k[:, None] * C + o[None, :], part, mask=(k < K)[:, None] & (o < C)[None, :])


@triton.jit
def _fold_kernel(parts, chat, T, M, BT: tl.constexpr, BM: tl.constexpr):
    """chat (B, M) from its parts (B, T, M) of the pixel tiles."""
    groups = tl.cdiv(M, BM)
    b = (tl.program_id(0) // groups).to(tl.int64)
    m = tl.program_id(0) % groups * BM + tl.arange(0, BM)
    total = tl.zeros((BT, BM), tl.float32)
    for t0 in range(0, T, BT):
        total += _rows(parts + b * T * M, t0 + tl.arange(0, BT), T, m, M)
    tl.store(chat + b * M + m, tl.sum(total, 0), mask=m < M)


@triton.jit
def _gradient_kernel(
    c, z_grad, w, v, phi, N, C, K,
    BN: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, _, n, o = _place(N, C, BN, BO)
    total = _product(c, w, v, phi, b, n, o, N, C, K, BC, KP, V, CHANNELS_LAST, INDEX, PRECISION, True)
    place, real = _plane(z_grad, b, n, o, N, C, V, CHANNELS_LAST, INDEX)
    tl.store(place, (total + tl.load(place, mask=real, other=0).to(tl.float32)).to(z_grad.dtype.element_ty), mask=real)


@triton.jit
def _outer_kernel(
    c, z, chat, zhat, weight_parts, base_parts, weight, base, gain, place, shell, B, N, C, K, M, base_c, gain_s, gain_c,
    BN: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, group of o, group of c): the i-th of I equal parts of all pixel tiles and of all rows (b, k)."""
    i, parts = tl.program_id(0), tl.num_programs(0)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    q = tl.program_id(2) * BC + tl.arange(0, BC)
    tiles = tl.cdiv(N, BN)
    product = tl.zeros((BO, BC), tl.float32)
    share = tl.cdiv(B * tiles, parts)
    for t in range(i * share, min((i + 1) * share, B * tiles)):
        b, n = (t // tiles).to(tl.int64), t % tiles * BN + tl.arange(0, BN)
        left, left_real = _plane(c, b, n, o, N, C, V, CHANNELS_LAST, INDEX)
        right, right_real = _plane(z, b, n, q, N, C, V, CHANNELS_LAST, INDEX)
        left, right = tl.load(left, mask=left_real, other=0), tl.load(right, mask=right_real, other=0)
        product = tl.dot(tl.trans(left), right, product, input_precision=PRECISION)
    inside = (o < C)[:, None] & (q < C)[None, :]
    w = _rows(weight, o, C, q, C).to(tl.float32)
    tl.store(base_parts + (i * tl.num_programs(1) + tl.program_id(1)) * C + q, tl.sum(w * product, 0), mask=q < C)
    total = product * tl.load(base + q * base_c, mask=q < C, other=0)[None, :]
    R = B * K
    share = tl.cdiv(tl.cdiv(R, BR), parts) * BR
    for r0 in range(i * share, min((i + 1) * share, R), BR):
        r = r0 + tl.arange(0, BR)
        at, s = _places(place, r, K, C, M), tl.load(shell + r % K)
        f = _coefficients(zhat, at, r, R, q, C, M) * _gains(gain, s, r, R, q, C, gain_s, gain_c)
        total = tl.dot(tl.trans(_rows(chat, r, R, o, C)), f, total, input_precision=PRECISION)
    tl.store(weight_parts + i.to(tl.int64) * C * C + o[:, None] * C + q[None, :], total, mask=inside)


class Disc(NamedTuple):
    """The modes of a disc in ascending order of their shells."""

    place: Tensor  # (K,) of a mode in (A_H, A_W), flat
    shell: Tensor  # (K,)
    order: Tensor  # (K + 1,) the modes, and the row after them as a shell of its own
    start: Tensor  # (S + 2,) where each shell starts in order
    phi: Tensor  # (N, K padded to a multiple of 16) fp32 values


@modes.cached(maxsize=64)
def disc(height: int, width: int, radius_squared: int, device: torch.device) -> Disc:
    """The K modes of an H x W plane inside the disc."""
    count = len(modes.shells(radius_squared))
    shell, place = modes.shell_map(height, width, radius_squared, modes.CPU).flatten().sort(stable=True)
    k = int((shell < count).sum())
    shell, place = shell[:k], place[:k]
    phi_h, phi_w = (modes.basis(n, radius_squared, torch.float64, modes.CPU) for n in (height, width))
    phi = phi_h[place // phi_w.shape[0], :, None] * phi_w[place % phi_w.shape[0], None, :]
    phi = torch.nn.functional.pad(phi.flatten(1).T, (0, -k % 16)).float().contiguous()
    start = torch.searchsorted(torch.cat([shell, torch.tensor([count], device=modes.CPU)]), torch.arange(count + 2, device=modes.CPU))
    tables = place, shell, torch.arange(k + 1, device=modes.CPU), start, phi
    return Disc(*(table.to(device) for table in tables))


@functools.lru_cache(maxsize=1024)
def _few_modes(height: int, width: int, radius_squared: int) -> bool:
    shell = modes.shell_map(height, width, radius_squared, modes.CPU)
    return int((shell < len(modes.shells(radius_squared))).sum()) <= MAX_MODES


def serves(z: Tensor, radius_squared: int) -> bool:
    """Whether the kernels take such planes and such a disc."""
    return z.element_size() == 2 and z.numel() > 0 and _few_modes(z.shape[2], z.shape[3], radius_squared)


class Plan(NamedTuple):
    """Tile, warps and stages of the products over planes."""

    tile: dict[str, int]
    launch: dict[str, Any]

    def programs(self, images: int, channels: int, pixels: int) -> tuple[int]:
        return (images * cdiv(pixels, self.tile["BN"]) * cdiv(channels, self.tile["BO"]),)


@functools.lru_cache(maxsize=1024)
def plan(channels: int, pixels: int, backward: bool) -> Plan:
    """From the shape of one image alone, so that no result depends on the batch size."""
    most_pixels, most_channels = (max(16, next_power_of_2(size)) for size in (pixels, channels))
    if found := tile("gate_backward" if backward else "gate", channels, pixels):
        bn, bo, bc, warps, stages = found
    else:
        # channels in tiles of 128 where that pads no more than tiles of 64
        bn, bo, bc = 64 if backward else 128, 128 if cdiv(channels, 64) % 2 == 0 else 64, 64
        warps, stages = 8 if min(bn, most_pixels) * bo >= 8192 else 4, 2 if AMD else 3
    sizes = dict(BN=min(bn, most_pixels), BO=min(bo, most_channels), BC=min(bc, most_channels))
    return Plan(sizes, dict(num_warps=warps, num_stages=stages))


AMD = torch.version.hip is not None


def access(z: Tensor) -> dict[str, Any]:
    """How tiles address planes like z: V neighbours on the fastest axis are one aligned access; INDEX holds any offset in an image."""
    channels_last = modes.channels_last(z)
    fastest = z.shape[1] if channels_last else z.shape[2] * z.shape[3]
    index = tl.int32 if z.numel() // z.shape[0] < 2**31 else tl.int64
    return dict(V=gcd(fastest, 16 // z.element_size()), CHANNELS_LAST=channels_last, INDEX=index)


PRECISION = "bf16x3"  # of products with fp32 operands


def _mix(coefficients: Tensor, weight: Tensor, base: Tensor, gain: Tensor, table: Disc) -> tuple[Tensor, Tensor]:
    """v (B, K, C) and W' (C, C)."""
    B, C, *functions = coefficients.shape
    K = table.place.shape[0]
    v, scaled = torch.empty((B, K, C), dtype=base.dtype, device=base.device), torch.empty_like(weight)
    launch(
        _mix_kernel, (cdiv(B * K, 32), cdiv(C, 64)),
        coefficients, v, weight, scaled, base, gain, table.place, table.shell, B, C, K, prod(functions), base.stride(0), *gain.stride(),
        BR=32, BO=64, BC=64, PRECISION=PRECISION, num_warps=8,
    )  # fmt: skip
    return v, scaled


def _modes_of(z: Tensor, coefficients: Tensor | None, base: Tensor, gain: Tensor, radius_squared: int) -> tuple[Disc, Tensor, Tensor]:
    """The disc, the coefficients of z and the gains of its modes; an empty disc is one of the constant mode without gain."""
    if radius_squared < 0:
        coefficients, gain, radius_squared = base.new_zeros(*z.shape[:2], 1, 1), base.new_zeros(1, z.shape[1]), 0
    if coefficients is None:
        coefficients = torch.ops.spanet_kernels.mode_coefficients(z, radius_squared)
    return disc(z.shape[2], z.shape[3], radius_squared, z.device), coefficients.contiguous(), gain


def spectral_gate(
    z: Tensor, coefficients: Tensor | None, weight: Tensor, bias: Tensor, base: Tensor, gain: Tensor, radius_squared: int
) -> Tensor:
    """`spanet_kernels::spectral_gate` on a GPU."""
    if not serves(z, radius_squared):
        return composed.spectral_gate(z, coefficients, weight, bias, base, gain, radius_squared)
    B, C, H, W = z.shape
    table, coefficients, gain = _modes_of(z, coefficients, base, gain, radius_squared)
    z, weight, bias, choice = modes.like(z, z), weight.contiguous(), bias.contiguous(), plan(C, H * W, backward=False)
    y = torch.empty_like(z)
    v, scaled = _mix(coefficients, weight, base, gain, table)
    launch(
        _gate_kernel, choice.programs(B, C, H * W),
        z, y, scaled, v, table.phi, bias, H * W, C, table.place.shape[0], **choice.tile, KP=table.phi.shape[1], PRECISION=PRECISION,
        **access(z), **choice.launch,
    )  # fmt: skip
    return y


def spectral_gate_backward(
    grad: Tensor,
    z: Tensor,
    coefficients: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    base: Tensor,
    gain: Tensor,
    radius_squared: int,
    profile_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`spanet_kernels::spectral_gate_backward` on a GPU."""
    if not serves(z, radius_squared):
        return composed.spectral_gate_backward(grad, z, coefficients, weight, bias, base, gain, radius_squared, profile_learns)
    B, C, H, W = z.shape
    shells = gain.shape[0]
    table, coefficients, gain = _modes_of(z, coefficients, base, gain, radius_squared)
    grad, z, weight, bias = modes.like(grad, z), modes.like(z, z), weight.contiguous(), bias.contiguous()
    choice = plan(C, H * W, backward=True)
    N, K, S, M = H * W, table.place.shape[0], gain.shape[0], prod(coefficients.shape[2:])
    tiles, side, step = cdiv(N, choice.tile["BN"]), min(64, choice.tile["BO"]), min(choice.tile["BN"], choice.tile["BC"])
    groups = cdiv(C, side)
    splits = min(cdiv(256, groups * groups), B * cdiv(N, step))  # enough programs for any GPU

    def wide(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=base.dtype, device=base.device)

    z_grad, c, parts, chat, products = torch.empty_like(z), torch.empty_like(z), wide(B, tiles, K, C), wide(B, K, C), wide(B, K + 1, C)
    weight_parts, base_parts, bias_grad, gain_grad = wide(splits, C, C), wide(splits * groups, C), wide(C), wide(S, C)
    planes = dict(choice.tile, KP=table.phi.shape[1], PRECISION=PRECISION, **access(z), **choice.launch)
    v, scaled = _mix(coefficients, weight, base, gain, table)
    launch(_context_kernel, choice.programs(B, C, N), grad, z, z_grad, c, parts, scaled, v, table.phi, bias, N, C, K, **planes)
    launch(_fold_kernel, (B * cdiv(K * C, 64),), parts, chat, tiles, K * C, BT=16, BM=64, num_warps=4)
    launch(
        _mix_backward_kernel, (cdiv(B * K, 32), cdiv(C, 64)),
        chat, coefficients, v, products, weight, gain, table.place, table.shell, B, C, K, M, *gain.stride(), sqrt(N),
        BR=32, BO=32, BC=64, PRECISION=PRECISION, num_warps=4,
    )  # fmt: skip
    launch(_gradient_kernel, choice.programs(B, C, N), c, z_grad, scaled, v, table.phi, N, C, K, **planes)
    launch(
        _outer_kernel, (splits, groups, groups),
        c, z, chat, coefficients, weight_parts, base_parts, weight, base, gain, table.place, table.shell, B, N, C, K, M,
        base.stride(0), *gain.stride(), BN=step, BO=side, BC=side, BR=16, PRECISION=PRECISION, **access(z), **choice.launch,
    )  # fmt: skip
    launch(
        _shell_kernel, ((S + 1) * cdiv(C, 8),),
        products, bias_grad, gain_grad, table.order, table.start, B, C, K, S, BB=128, BC=8, num_warps=4,
    )  # fmt: skip
    profile_grads = (base_parts.sum(0), gain_grad[:shells]) if profile_learns else (base.new_empty(0), gain.new_empty(0))
    return z_grad, weight_parts.sum(0).to(weight.dtype), bias_grad.to(bias.dtype), *profile_grads
