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
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

MAX_RADIUS = 8192
CPU = torch.device("cpu")  # where tables are made, whatever the default device

P = ParamSpec("P")
T = TypeVar("T")


def constant(function: Callable[P, T]) -> Callable[P, T]:
    """Cache a function of plain numbers; under torch.compile its result is a constant of the graph."""
    cached = functools.lru_cache(maxsize=1024)(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return cached(*args, **kwargs)  # type: ignore[arg-type]

    # the mark that torch.compiler.assume_constant_result sets, without its import of the whole compiler
    call._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return call


# what a cached tensor must not be made under: transforms of torch.func, whose tensors end with them, and modes such as FakeTensorMode
_is_transformed, _count_modes = torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack


def cached(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Cache a function of plain numbers that gives tensors, made outside of inference mode; under torch.compile, torch.func and modes of
    the dispatcher they are made anew."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        def make(*args: P.args, **kwargs: P.kwargs) -> T:
            with torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)

        remembered: Callable[P, T] = functools.lru_cache(maxsize)(make)  # type: ignore[assignment]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if torch.compiler.is_compiling() or _is_transformed() or _count_modes():
                return make(*args, **kwargs)
            trace = torch._C._get_tracing_state()
            if trace is None:
                return remembered(*args, **kwargs)
            # how a constant comes about is no part of TorchScript's graph
            torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
            try:
                return remembered(*args, **kwargs)
            finally:
                torch._C._set_tracing_state(trace)  # type: ignore[attr-defined]

        return call

    return decorate


@constant
def squared_radius(radius: float) -> int:
    """Largest squared frequency inside the disc: floor(radius^2), exactly, whatever the rounding of radius."""
    return sys.maxsize if radius == math.inf else math.floor(Fraction(radius) ** 2)


@constant
def radius_of(radius_squared: int) -> float | None:
    """A radius with this `squared_radius`; None for the empty disc, -1."""
    return None if radius_squared < 0 else math.nextafter(math.sqrt(radius_squared), math.inf)


@constant
def on_circle(radius: float) -> bool:
    """Whether integer frequencies can lie on the circle d = radius itself: radius^2 is an integer."""
    return radius != math.inf and (Fraction(radius) ** 2).denominator == 1


@constant
def shells(radius_squared: int) -> tuple[int, ...]:
    """All squared distances d^2 = f_h^2 + f_w^2 <= radius_squared in ascending order.

    They do not depend on H and W, so that one learned profile serves every size; a shell that a small
    plane does not contain has no modes there. The disc of -1 is empty. Raises ValueError above MAX_RADIUS.
    """
    if radius_squared < 0:
        return ()
    if radius_squared > MAX_RADIUS**2:
        raise ValueError(f"radius must be at most {MAX_RADIUS}, got {math.sqrt(radius_squared):g}")
    top = math.isqrt(radius_squared)
    squares = np.arange(top + 1) ** 2
    present = np.zeros(radius_squared + 1, dtype=bool)
    for square in squares.tolist():
        present[square + squares[: math.isqrt(radius_squared - square) + 1]] = True
    return tuple(present.nonzero()[0].tolist())


def functions(n: int, radius_squared: int) -> int:
    """A: how many real Fourier functions of length n have a frequency f with f^2 <= radius_squared."""
    return min(2 * math.isqrt(radius_squared) + 1, n) if radius_squared >= 0 else 0


@cached(maxsize=256)
def basis(n: int, radius_squared: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The (A, n) real Fourier functions with f^2 <= radius_squared, orthonormal rows, ordered 1, cos 1, sin 1, cos 2, ..."""
    index = torch.arange(functions(n, radius_squared), device=CPU)
    frequency = (index + 1) // 2
    # reduce f * i modulo n in integers, so that the angle is exact for any length
    angle = (frequency[:, None] * torch.arange(n, device=CPU) % n).double() * (2 * math.pi / n)
    rows = torch.where((index % 2 == 1)[:, None], angle.cos(), angle.sin())
    rows[:1] = 1
    weight = 2 - ((frequency == 0) | (2 * frequency == n)).double()
    rows *= (weight / n).sqrt()[:, None]
    return rows.to(device=device, dtype=dtype)


@cached(maxsize=64)
def half_spectrum_shells(height: int, width: int, radius_squared: int, device: torch.device) -> Tensor:
    """(H, W // 2 + 1, 2) index of the shell of both parts of each bin of `torch.fft.rfft2`; S, past the last shell, outside the disc."""
    rows = torch.arange(height, device=CPU)
    squared = torch.minimum(rows, height - rows)[:, None] ** 2 + torch.arange(width // 2 + 1, device=CPU) ** 2
    found = torch.searchsorted(torch.tensor(shells(radius_squared), device=CPU), squared)
    return found.int()[..., None].expand(-1, -1, 2).contiguous().to(device)


@cached(maxsize=256)
def shell_map(height: int, width: int, radius_squared: int, device: torch.device) -> Tensor:
    """(A_H, A_W) index of each mode's shell; S, one past the last shell, where the mode lies outside the disc."""
    rows = (torch.arange(functions(height, radius_squared), device=CPU) + 1) // 2
    columns = (torch.arange(functions(width, radius_squared), device=CPU) + 1) // 2
    squared = rows[:, None] ** 2 + columns**2
    found = torch.searchsorted(torch.tensor(shells(radius_squared), device=CPU), squared)
    return found.to(device)


def count(height: int, width: int, radius_squared: int) -> int:
    """K: how many modes a plane of this size has in the disc."""
    return sum(functions(width, radius_squared - ((a + 1) // 2) ** 2) for a in range(functions(height, radius_squared)))


def pooling_profile(lam: Tensor, radius: float, boundary: float | None, height: int, width: int) -> tuple[Tensor, Tensor, int]:
    """Profile of the spectral pooling filter: lam where d < radius, boundary where d == radius, 1 - lam elsewhere.

    lam: (C,). Returns base (C,), gain (S, C) and the squared radius of the disc they cover: the one given, less the circle
    where it has no value of its own; the constant mode alone, without gain, if the disc given holds the whole spectrum.
    """
    squared, circle = squared_radius(radius), on_circle(radius)
    full = (height // 2) ** 2 + (width // 2) ** 2
    if squared > full or (squared == full and not circle):
        return lam, torch.zeros_like(lam)[None], 0
    base = 1 - lam
    inside = len(shells(squared)) - circle
    if boundary is not None and circle:
        return base, torch.cat([(lam - base).expand(inside, -1), (boundary - base)[None]]), squared
    if inside == 0:
        return base, torch.zeros_like(lam)[None], 0
    return base, (lam - base).expand(inside, -1), shells(squared)[inside - 1]


def chunks(channels: int, gates: int) -> list[int]:
    """Sizes of the chunks of channels, as `torch.chunk` makes them: all alike but the last, fewer than gates if they run out."""
    size = -(-channels // gates)
    return [min(size, channels - start) for start in range(0, channels, size)]


def chunked_profile(
    lams: Tensor, channels: int, radius: float, boundary: float | None, height: int, width: int
) -> tuple[Tensor, Tensor, int]:
    """`pooling_profile` of (gates,) lams, one for each chunk of the channels; without gates, base 1 on an empty disc (-1)."""
    if not len(lams):
        return lams.new_ones(channels), lams.new_empty(0, channels), -1
    sizes = chunks(channels, len(lams))
    per_channel = torch.cat([lam.expand(size) for lam, size in zip(lams, sizes, strict=True)])
    return pooling_profile(per_channel, radius, boundary, height, width)


@cached(maxsize=256)
def constant_profile(
    lams: tuple[float, ...],
    channels: int,
    radius: float,
    boundary: float | None,
    height: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, int]:
    """`chunked_profile` of constant lams, computed in fp64, cached as tensors of the given dtype on the device."""
    if len(lams) == 1:  # the same for every channel: one value, repeated by stride
        base, gain, squared = pooling_profile(torch.tensor(lams, dtype=torch.float64, device=CPU), radius, boundary, height, width)
        return base.to(device, dtype).expand(channels), gain.to(device, dtype).expand(-1, channels), squared
    base, gain, squared = chunked_profile(torch.tensor(lams, dtype=torch.float64, device=CPU), channels, radius, boundary, height, width)
    return base.to(device, dtype), gain.to(device, dtype).contiguous(), squared


def profile_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of base, gain and accumulators for an input dtype: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def channels_last(x: Tensor) -> bool:
    """Whether the operators write their result for x as channels_last: x is not contiguous and its channels are adjacent."""
    return not x.is_contiguous() and x.stride(1) == 1


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout that the operators give their result for x."""
    return torch.channels_last if channels_last(x) else torch.contiguous_format


def like(y: Tensor, x: Tensor) -> Tensor:
    """y in the layout that the operators give their result for x."""
    return y.contiguous(memory_format=memory_format(x))
