"""Triton kernels of `radial_filter` and its backward, for GPUs without the compiled extension, and their launchers.

For image b, channel c and a plane X = x[b, c], with the functions Phi_H (A_H x H) and Phi_W (A_W x W) of `modes.basis`,

    t[a, w] = sum_h Phi_H[a, h] X[h, w]        z[a, k] = sum_w t[a, w] Phi_W[k, w]        (coefficients)
    u[a, w] = sum_k gain[shell(a, k), c] z[a, k] Phi_W[k, w]
    Y[h, w] = base[c] X[h, w] + sum_a Phi_H[a, h] u[a, w]

and backward d gain[s, c] = sum_b sum_{(a, k) in shell s} zx[a, k] zgrad[a, k], d base[c] = sum_b <grad, X>.

A program owns BC channels of one image as tiles (BH, BC, BW), padded to powers of two. Triton spreads lanes along the
axis with unit stride first, so one kernel serves NCHW (lanes along w, then c) and channels_last (lanes along c, then w);
h comes first so that the sums over h and k, axis 0, stay inside a thread where planes are small.
    plane on chip    one read, one write; 2 A_H multiply-adds per padded pixel, any radius: functions a are independent
    larger planes    the program passes over its planes twice, the second time through L2; up to five functions per pass
Plain multiply-adds, because a matrix product would pad A = 3 or 5 to 16, and fp32 input must not go through TF32.
The backward leaves products of coefficients in a scratch (B, modes + 1, C) that a second kernel adds up in a fixed order.
"""

# Kernels have no types of their own, a launch gives them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spanet_kernels import modes

from .launch import cdiv, launch, next_power_of_2


@triton.jit
def _multiple(n, V: tl.constexpr):
    return n // V * V  # tells the compiler what the launcher knows: V divides n, so V neighbours are one access


@triton.jit
def _group(C, BC: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """This program's image, its channels (BC,) and which of them exist."""
    groups = tl.cdiv(C, BC)
    c = tl.program_id(0) % groups * BC + tl.arange(0, BC)
    return (tl.program_id(0) // groups).to(tl.int64), c, c < (_multiple(C, V) if CHANNELS_LAST else C)


@triton.jit
def _inside(h, H, exists, w, W, V: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Mask (BH, BC, BW)."""
    return (h < H)[:, None, None] & exists[None, :, None] & (w < (W if CHANNELS_LAST else _multiple(W, V)))[None, None, :]


@triton.jit
def _tile(x, b, c, h, w, x_b, x_c, x_h, x_w, V: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr):
    """Pointers (BH, BC, BW)."""
    if CHANNELS_LAST:
        x_w = _multiple(x_w, V)
    else:
        x_c = _multiple(x_c, V)
    rows = (h.to(INDEX) * _multiple(x_h, V))[:, None, None]
    return x + b * _multiple(x_b, V) + (rows + (c.to(INDEX) * x_c)[None, :, None] + (w.to(INDEX) * x_w)[None, None, :])


@triton.jit
def _phi(phi_w, A_W, W, k, w):
    """Phi_W (BK, 1, BW), zero outside."""
    return tl.load(phi_w + k[:, None] * W + w[None, :], mask=(k < A_W)[:, None] & (w < W)[None, :], other=0)[:, None, :]


@triton.jit
def _gains(gain, shell_of, a, k, c, exists, A_W, S, gain_s, gain_c):
    """Gains (BK, BC) of the modes (a, k), zero outside the disc."""
    shell = tl.load(shell_of + a * A_W + k, mask=k < A_W, other=S)
    return tl.load(gain + shell[:, None] * gain_s + c[None, :] * gain_c, mask=(shell < S)[:, None] & exists[None, :], other=0)


@triton.jit
def _modes(z, a, k, c, exists, A_W, C):
    """Pointers (BK, BC) to the modes (a, k) in the scratch (modes, C) of one image, and which of them exist."""
    return z + (a * A_W + k).to(tl.int64)[:, None] * C + c[None, :], (k < A_W)[:, None] & exists[None, :]


@triton.jit
def _plane_kernel(
    x, y, base, gain, phi_h, phi_w, shell_of, C, H, W, A_W, S, x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w, base_c, gain_s, gain_c,
    A_H: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr,
    UNROLL: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    b, c, exists = _group(C, BC, V, CHANNELS_LAST)
    h, w, k = tl.arange(0, BH), tl.arange(0, BW), tl.arange(0, BK)
    inside = _inside(h, H, exists, w, W, V, CHANNELS_LAST)
    phi = _phi(phi_w, A_W, W, k, w)
    plane = tl.load(_tile(x, b, c, h, w, x_b, x_c, x_h, x_w, V, CHANNELS_LAST, INDEX), mask=inside, other=0).to(phi.dtype)
    result = plane * tl.load(base + c * base_c, mask=exists, other=0)[None, :, None]
    for a in tl.range(A_H, loop_unroll_factor=UNROLL):
        f = tl.load(phi_h + a * H + h, mask=h < H, other=0)[:, None, None]
        t = tl.sum(plane * f, 0)
        v = tl.sum(t[None, :, :] * phi, 2) * _gains(gain, shell_of, a, k, c, exists, A_W, S, gain_s, gain_c)
        u = tl.sum(v[:, :, None] * phi, 0)
        result += f * u[None, :, :]
    target = _tile(y, b, c, h, w, y_b, y_c, y_h, y_w, V, CHANNELS_LAST, INDEX)
    tl.store(target, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _plane_backward_kernel(
    grad, x, z, phi_h, phi_w, C, H, W, A_W, g_b, g_c, g_h, g_w, x_b, x_c, x_h, x_w,
    A_H: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr,
    UNROLL: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    b, c, exists = _group(C, BC, V, CHANNELS_LAST)
    h, w, k = tl.arange(0, BH), tl.arange(0, BW), tl.arange(0, BK)
    inside = _inside(h, H, exists, w, W, V, CHANNELS_LAST)
    phi = _phi(phi_w, A_W, W, k, w)
    plane = tl.load(_tile(x, b, c, h, w, x_b, x_c, x_h, x_w, V, CHANNELS_LAST, INDEX), mask=inside, other=0).to(phi.dtype)
    slope = tl.load(_tile(grad, b, c, h, w, g_b, g_c, g_h, g_w, V, CHANNELS_LAST, INDEX), mask=inside, other=0).to(phi.dtype)
    z += b * (A_H * A_W + 1) * C
    for a in tl.range(A_H, loop_unroll_factor=UNROLL):
        f = tl.load(phi_h + a * H + h, mask=h < H, other=0)[:, None, None]
        zx = tl.sum(tl.sum(plane * f, 0)[None, :, :] * phi, 2)
        zg = tl.sum(tl.sum(slope * f, 0)[None, :, :] * phi, 2)
        place, real = _modes(z, a, k, c, exists, A_W, C)
        tl.store(place, zx * zg, mask=real)
    tl.store(z + tl.cast(A_H * A_W, tl.int64) * C + c, tl.sum(tl.sum(plane * slope, 0), 1), mask=exists)


@triton.jit
def _project(sums, tile, phi_h, a0, h, A_H, H, F: tl.constexpr):
    """sums[i] + Phi_H[a0 + i, h] tile for the F functions from a0 on."""
    added = ()
    for i in tl.static_range(F):
        f = tl.load(phi_h + (a0 + i) * H + h, mask=(h < H) & (a0 + i < A_H), other=0)
        added = added + (sums[i] + tile * f[:, None, None],)  # type: ignore[assignment]  # noqa: RUF005
    return added


@triton.jit
def _add_coefficients(z, sums, phi_w, a0, w0, w, c, exists, A_H, A_W, C, W, F: tl.constexpr, BK: tl.constexpr):
    """Adds the columns w, sums (F x (BR, BC, BW)) folded over rows and columns, to the coefficients in scratch; w0 = 0 starts them."""
    for i in tl.static_range(F):
        t = tl.sum(sums[i], 0)
        for k0 in range(0, A_W, BK):
            k = k0 + tl.arange(0, BK)
            place, real = _modes(z, a0 + i, k, c, exists, A_W, C)
            real = real & (a0 + i < A_H)
            part = tl.sum(t[None, :, :] * _phi(phi_w, A_W, W, k, w), 2)
            tl.store(place, part + tl.load(place, mask=real & (w0 > 0), other=0), mask=real)


@triton.jit
def _stream_kernel(
    x, y, z, u, base, gain, phi_h, phi_w, shell_of, C, H, W, A_W, S,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w, u_b, u_c, u_h, u_w, base_c, gain_s, gain_c,
    A_H: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr,
    F: tl.constexpr, UNROLL: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    b, c, exists = _group(C, BC, V, CHANNELS_LAST)
    dtype: tl.constexpr = phi_h.dtype.element_ty
    z += b * (A_H * A_W + 1) * C
    for a0 in range(0, A_H, F):
        for w0 in range(0, W, BW):
            w = w0 + tl.arange(0, BW)
            sums = (tl.zeros((BH, BC, BW), dtype),) * F
            for h0 in tl.range(0, H, BH, num_stages=3):
                h = h0 + tl.arange(0, BH)
                inside = _inside(h, H, exists, w, W, V, CHANNELS_LAST)
                tile = tl.load(_tile(x, b, c, h, w, x_b, x_c, x_h, x_w, V, CHANNELS_LAST, INDEX), mask=inside, other=0).to(dtype)
                sums = _project(sums, tile, phi_h, a0, h, A_H, H, F)
            tl.debug_barrier()  # the scratch may change hands between threads
            _add_coefficients(z, sums, phi_w, a0, w0, w, c, exists, A_H, A_W, C, W, F, BK)
    tl.debug_barrier()
    for w0 in range(0, W, BW):
        w = w0 + tl.arange(0, BW)
        columns = exists[:, None] & (w < W)[None, :]
        for a in tl.range(A_H, loop_unroll_factor=UNROLL):
            total = tl.zeros((BC, BW), dtype)
            for k0 in range(0, A_W, BK):
                k = k0 + tl.arange(0, BK)
                place, real = _modes(z, a, k, c, exists, A_W, C)
                v = tl.load(place, mask=real, other=0) * _gains(gain, shell_of, a, k, c, exists, A_W, S, gain_s, gain_c)
                total += tl.sum(v[:, :, None] * _phi(phi_w, A_W, W, k, w), 0)
            row = u + b * u_b + tl.cast(a, INDEX) * u_h
            tl.store(row + (c.to(INDEX) * u_c)[:, None] + (w.to(INDEX) * u_w)[None, :], total, mask=columns)
    tl.debug_barrier()
    scale = tl.load(base + c * base_c, mask=exists, other=0)[None, :, None]
    for w0 in range(0, W, BW):
        w = w0 + tl.arange(0, BW)
        columns = exists[:, None] & (w < W)[None, :]
        for h0 in tl.range(0, H, BH, num_stages=3):
            h = h0 + tl.arange(0, BH)
            inside = _inside(h, H, exists, w, W, V, CHANNELS_LAST)
            tile = tl.load(_tile(x, b, c, h, w, x_b, x_c, x_h, x_w, V, CHANNELS_LAST, INDEX), mask=inside, other=0).to(dtype)
            result = tile * scale
            for a in tl.range(A_H, loop_unroll_factor=UNROLL):
                f = tl.load(phi_h + a * H + h, mask=h < H, other=0)
                row = u + b * u_b + tl.cast(a, INDEX) * u_h
                mode = tl.load(row + (c.to(INDEX) * u_c)[:, None] + (w.to(INDEX) * u_w)[None, :], mask=columns, other=0)
                result += f[:, None, None] * mode[None, :, :]
            target = _tile(y, b, c, h, w, y_b, y_c, y_h, y_w, V, CHANNELS_LAST, INDEX)
            tl.store(target, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _stream_backward_kernel(
    grad, x, z, zg, phi_h, phi_w, C, H, W, A_W, g_b, g_c, g_h, g_w, x_b, x_c, x_h, x_w,
    A_H: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr,
    F: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    b, c, exists = _group(C, BC, V, CHANNELS_LAST)
    dtype: tl.constexpr = phi_h.dtype.element_ty
    z += b * (A_H * A_W + 1) * C
    zg += b * (A_H * A_W + 1) * C
    for a0 in range(0, A_H, F):
        dot = tl.zeros((BH, BC, BW), dtype)
        for w0 in range(0, W, BW):
            w = w0 + tl.arange(0, BW)
            x_sums = (tl.zeros((BH, BC, BW), dtype),) * F
            g_sums = (tl.zeros((BH, BC, BW), dtype),) * F
            for h0 in tl.range(0, H, BH, num_stages=3):
                h = h0 + tl.arange(0, BH)
                inside = _inside(h, H, exists, w, W, V, CHANNELS_LAST)
                tile = tl.load(_tile(x, b, c, h, w, x_b, x_c, x_h, x_w, V, CHANNELS_LAST, INDEX), mask=inside, other=0).to(dtype)
                slope = tl.load(_tile(grad, b, c, h, w, g_b, g_c, g_h, g_w, V, CHANNELS_LAST, INDEX), mask=inside, other=0).to(dtype)
                x_sums = _project(x_sums, tile, phi_h, a0, h, A_H, H, F)
                g_sums = _project(g_sums, slope, phi_h, a0, h, A_H, H, F)
                dot += tile * slope
            tl.debug_barrier()  # the scratch may change hands between threads
            _add_coefficients(z, x_sums, phi_w, a0, w0, w, c, exists, A_H, A_W, C, W, F, BK)
            _add_coefficients(zg, g_sums, phi_w, a0, w0, w, c, exists, A_H, A_W, C, W, F, BK)
        tl.store(z + tl.cast(A_H * A_W, tl.int64) * C + c, tl.sum(tl.sum(dot, 0), 1), mask=exists)  # the same number in every pass
    tl.debug_barrier()
    for a in range(A_H):
        for k0 in range(0, A_W, BK):
            k = k0 + tl.arange(0, BK)
            place, real = _modes(z, a, k, c, exists, A_W, C)
            other, _ = _modes(zg, a, k, c, exists, A_W, C)
            tl.store(place, tl.load(place, mask=real) * tl.load(other, mask=real), mask=real)


@triton.jit
def _shell_kernel(z, base_grad, gain_grad, order, start, B, C, M, S, BB: tl.constexpr, BC: tl.constexpr):
    """Program (s, group of channels): the sum over the images and over the modes of shell s; s = S is <grad, x>."""
    s = tl.program_id(0) % (S + 1)
    c = tl.program_id(0) // (S + 1) * BC + tl.arange(0, BC)
    sums = tl.zeros((BB, BC), z.dtype.element_ty)
    for i in range(tl.load(start + s), tl.load(start + s + 1)):
        row = z + tl.load(order + i) * C
        for b0 in range(0, B, BB):
            b = b0 + tl.arange(0, BB)
            sums += tl.load(row + b.to(tl.int64)[:, None] * (M + 1) * C + c[None, :], mask=(b < B)[:, None] & (c < C)[None, :], other=0)
    total = tl.sum(sums, 0)
    tl.store(gain_grad + s.to(tl.int64) * C + c, total, mask=(c < C) & (s < S))
    tl.store(base_grad + c, total, mask=(c < C) & (s == S))


class Plan(NamedTuple):
    """Kernel and launch choice for a shape: whole planes on chip or not, and the compile-time constants."""

    on_chip: bool
    num_warps: int
    constants: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def plan(channels: int, height: int, width: int, radius_squared: int, itemsize: int, channels_last: bool, backward: bool) -> Plan:
    """Launch choice from the shape of one image alone, so that no result depends on the batch size."""
    a_h, a_w = modes.functions(height, radius_squared), modes.functions(width, radius_squared)
    bh, bw, bk = (next_power_of_2(n) for n in (height, width, a_w))
    words = 2 if itemsize == 8 else 1
    registers = (2 * bh + bk) * bw * words  # of one channel: the plane, the result or the gradient, and Phi_W
    # channels_last wants at least one 32-byte sector per pixel
    bc = max(32 // itemsize, min(32, 8192 // words // (bh * bw))) if channels_last else max(1, 2048 // (bh * bw))
    bc = min(bc, next_power_of_2(channels))
    warps = next_power_of_2(cdiv(bc * registers, 32 * 136))  # 136 of 255 registers per thread: no spills
    unroll = a_h if a_h <= 5 else 1
    if warps <= 8:
        return Plan(True, warps, dict(A_H=a_h, BC=bc, BH=bh, BW=bw, BK=bk, UNROLL=unroll))
    # the sums of five functions over a tile, or of five for x and five for grad, are at most 80 registers per thread
    tile = 2048 // words // (2 if backward else 1)
    bc = min(64 // itemsize if channels_last else 1, next_power_of_2(channels))
    bh = min(bh, max(1, tile // bc // min(bw, 32 if channels_last else 128)))
    bw = min(bw, tile // bc // bh)
    f = cdiv(a_h, cdiv(a_h, 5))
    constants = dict(A_H=a_h, BC=bc, BH=bh, BW=bw, BK=min(bk, 4), F=f)
    return Plan(False, 4, constants) if backward else Plan(False, 8, dict(constants, UNROLL=unroll))


def access(channels_last: bool, *tensors: Tensor) -> dict[str, Any]:
    """How tiles address the tensors: V neighbours along the fastest axis are one aligned access; INDEX holds any offset inside an image."""
    fast = 1 if channels_last else 3
    vector = 2 if channels_last else min(4, 16 // tensors[0].element_size())  # wider accesses cost more shuffles than they save
    reach = 0
    for tensor in tensors:
        vector = gcd(vector, tensor.shape[fast], *(stride for axis, stride in enumerate(tensor.stride()) if axis != fast))
        reach = max(reach, sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)))
    return dict(V=vector, CHANNELS_LAST=channels_last, INDEX=tl.int32 if reach < 2**31 else tl.int64)


@modes.cached(maxsize=256)
def _modes_by_shell(height: int, width: int, radius_squared: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scratch rows ordered by shell, and where each of the S shells starts; the row of <grad, x>, the last, is shell S."""
    count = len(modes.shells(radius_squared))
    shell = modes.shell_map(height, width, radius_squared, modes.CPU).flatten()
    shell = torch.cat([torch.where(shell == count, count + 1, shell), torch.tensor([count], device=modes.CPU)])
    shell, order = shell.sort(stable=True)
    return order.to(device), torch.searchsorted(shell, torch.arange(count + 2, device=modes.CPU)).to(device)


def radial_filter(x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    """`spanet_kernels::radial_filter` on a GPU."""
    B, C, H, W = x.shape
    channels_last = modes.channels_last(x)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    if y.numel() == 0:
        return y
    choice = plan(C, H, W, radius_squared, x.element_size(), channels_last, backward=False)
    phi_h = modes.basis(H, radius_squared, base.dtype, x.device)
    phi_w = modes.basis(W, radius_squared, base.dtype, x.device)
    tables = base, gain, phi_h, phi_w, modes.shell_map(H, W, radius_squared, x.device)
    strides = *x.stride(), *y.stride()
    scratch: tuple[Tensor, ...] = ()
    if not choice.on_chip:
        z = torch.empty((B, phi_h.shape[0] * phi_w.shape[0] + 1, C), dtype=base.dtype, device=x.device)
        u = torch.empty((B, C, phi_h.shape[0], W), dtype=base.dtype, device=x.device, memory_format=layout)
        scratch, strides = (z, u), (*strides, *u.stride())
    kernel = _plane_kernel if choice.on_chip else _stream_kernel
    launch(
        kernel, (B * cdiv(C, choice.constants["BC"]),),
        x, y, *scratch, *tables, C, H, W, phi_w.shape[0], gain.shape[0], *strides, base.stride(0), *gain.stride(),
        **choice.constants, **access(channels_last, x, y), num_warps=choice.num_warps,
    )  # fmt: skip
    return y


def radial_filter_backward(grad: Tensor, x: Tensor, radius_squared: int) -> tuple[Tensor, Tensor]:
    """`spanet_kernels::radial_filter_backward` on a GPU."""
    B, C, H, W = x.shape
    dtype, shells = modes.profile_dtype(x.dtype), len(modes.shells(radius_squared))
    base_grad = torch.empty((C,), dtype=dtype, device=x.device)
    gain_grad = torch.empty((shells, C), dtype=dtype, device=x.device)
    if x.numel() == 0:
        return base_grad.zero_(), gain_grad.zero_()
    channels_last = modes.channels_last(x)
    choice = plan(C, H, W, radius_squared, x.element_size(), channels_last, backward=True)
    phi_h, phi_w = modes.basis(H, radius_squared, dtype, x.device), modes.basis(W, radius_squared, dtype, x.device)
    count = phi_h.shape[0] * phi_w.shape[0]
    z = torch.empty((1 if choice.on_chip else 2, B, count + 1, C), dtype=dtype, device=x.device)
    kernel = _plane_backward_kernel if choice.on_chip else _stream_backward_kernel
    launch(
        kernel, (B * cdiv(C, choice.constants["BC"]),),
        grad, x, *z, phi_h, phi_w, C, H, W, phi_w.shape[0], *grad.stride(), *x.stride(),
        **choice.constants, **access(channels_last, grad, x), num_warps=choice.num_warps,
    )  # fmt: skip
    launch(
        _shell_kernel, ((shells + 1) * cdiv(C, 8),),
        z, base_grad, gain_grad, *_modes_by_shell(H, W, radius_squared, x.device), B, C, count, shells,
        BB=128, BC=8, num_warps=4,
    )  # fmt: skip
    return base_grad, gain_grad
