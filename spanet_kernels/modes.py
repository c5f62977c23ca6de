"""Shells, real Fourier bases and radial profiles: the mathematics of the filters, in Python.

A radial filter gives every spatial frequency (u, v) of an H x W plane a gain that depends only on
the squared distance d^2 = u^2 + v^2 from the constant mode. The distinct values of d^2 are its
*shells*. With the real orthonormal Fourier basis of length n

    f = 0: 1/sqrt(n)     0 < f < n/2: sqrt(2/n) cos(2 pi f i/n), sqrt(2/n) sin(2 pi f i/n)
    f = n/2 (n even): (-1)^i / sqrt(n)

the products phi(i) psi(j) diagonalise the filter. Only functions with f <= radius are needed: A per axis.

Everything here depends on sizes alone and is cached; cached tensors are ordinary tensors even when
they are first asked for under inference mode, and must not be written to.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import torch
from torch import Tensor

MAX_RADIUS = 8192


@functools.lru_cache(maxsize=1024)
def squared_radius(radius: float) -> int:
    """Largest squared frequency inside the disc: floor(radius^2), exactly, whatever the rounding of radius.

    Raises TypeError if radius is no real number, ValueError if it is negative, NaN or above MAX_RADIUS.
    """
    if isinstance(radius, bool) or not isinstance(radius, (int, float)):
        raise TypeError(f"radius must be a float, got {type(radius).__name__}")
    if not 0 <= radius <= MAX_RADIUS:
        raise ValueError(f"radius must be a number between 0 and {MAX_RADIUS}, got {radius}")
    return math.floor(Fraction(radius) ** 2)


def on_circle(radius: float) -> bool:
    """Whether the lattice of integer frequencies can touch the circle d = radius: radius^2 is an integer."""
    return (Fraction(radius) ** 2).denominator == 1


@functools.lru_cache(maxsize=256)
def shells(radius_squared: int) -> tuple[int, ...]:
    """All squared distances d^2 = f_h^2 + f_w^2 <= radius_squared in ascending order.

    They do not depend on H and W, so that one learned profile serves every size; a shell that a small
    plane does not contain has no modes there.
    """
    top = math.isqrt(radius_squared)
    squares = torch.arange(top + 1) ** 2
    present = torch.zeros(radius_squared + 1, dtype=torch.bool)
    for square in squares.tolist():
        present[square + squares[: math.isqrt(radius_squared - square) + 1]] = True
    return tuple(present.nonzero().flatten().tolist())


def full_squared_radius(height: int, width: int) -> int:
    """Squared radius of the smallest disc that holds the whole spectrum of an H x W plane."""
    return (height // 2) ** 2 + (width // 2) ** 2


def functions(n: int, radius_squared: int) -> int:
    """A: how many real Fourier functions of length n have a frequency f with f^2 <= radius_squared."""
    return min(2 * math.isqrt(radius_squared) + 1, n)


@functools.lru_cache(maxsize=256)
def basis(n: int, radius_squared: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The (A, n) real Fourier functions with f^2 <= radius_squared, orthonormal rows, ordered 1, cos 1, sin 1, cos 2, ..."""
    with torch.inference_mode(False), torch.no_grad():
        index = torch.arange(functions(n, radius_squared))
        frequency = (index + 1) // 2
        # reduce f * i modulo n in integers, so that the angle is exact for any length
        angle = (frequency[:, None] * torch.arange(n) % n).double() * (2 * math.pi / n)
        rows = torch.where((index % 2 == 1)[:, None], angle.cos(), angle.sin())
        rows[0] = 1
        weight = 2 - ((frequency == 0) | (2 * frequency == n)).double()
        rows *= (weight / n).sqrt()[:, None]
        return rows.to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=256)
def shell_map(height: int, width: int, radius_squared: int, device: torch.device) -> Tensor:
    """(A_H, A_W) index of each mode's shell; S, one past the last shell, where the mode lies outside the disc."""
    with torch.inference_mode(False), torch.no_grad():
        rows = (torch.arange(functions(height, radius_squared)) + 1) // 2
        columns = (torch.arange(functions(width, radius_squared)) + 1) // 2
        squared = rows[:, None] ** 2 + columns**2
        found = torch.searchsorted(torch.tensor(shells(radius_squared)), squared)
        return found.to(device)


def disc(radius: float, boundary: float | None) -> int:
    """Squared radius up to which the pooling profile differs from its base: the circle counts if it has a value of its own."""
    squared = squared_radius(radius)
    return max(squared - 1, 0) if boundary is None and on_circle(radius) else squared


def pooling_profile(lam: Tensor, radius: float, boundary: float | None, radius_squared: int) -> tuple[Tensor, Tensor]:
    """Profile of the spectral pooling filter: lam where d < radius, boundary where d == radius, 1 - lam elsewhere.

    lam: (C,). Returns base (C,) = 1 - lam and gain (S, C) = mask - base for the shells up to radius_squared.
    """
    base = 1 - lam
    exact = Fraction(radius) ** 2
    inside = sum(squared < exact for squared in shells(radius_squared))
    on = len(shells(radius_squared)) - inside
    circle = torch.zeros_like(base) if boundary is None else boundary - base
    return base, torch.cat([(lam - base).expand(inside, -1), circle.expand(on, -1)])


@functools.lru_cache(maxsize=256)
def constant_pooling_profile(
    lam: float, radius: float, boundary: float | None, radius_squared: int, channels: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`pooling_profile` of one lam for every channel, computed in fp64, cached as tensors of the given dtype on the device."""
    with torch.inference_mode(False), torch.no_grad():
        lams = torch.full((channels,), lam, dtype=torch.float64)
        base, gain = pooling_profile(lams, radius, boundary, radius_squared)
        return base.to(device, dtype), gain.to(device, dtype).contiguous()


def profile_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of base, gain and accumulators for an input dtype: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def channels_last(x: Tensor) -> bool:
    """Whether the operators write their result for x as channels_last: x is not contiguous and its channels are adjacent."""
    return not x.is_contiguous() and x.stride(1) == 1
