"""The radial filter and the spectral pooling filter: public functions, checks, fake kernels, autograd formulas.

The operator is trilinear in (grad, x, profile), so two operators close under every derivative:
`radial_filter` is its own gradient with respect to x, and `radial_filter_backward` gives the gradients
of the profile, whose own derivatives are `radial_filter` again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import modes
from ..decompositions import call_in_graph
from .autograd import call_below_autograd, is_eager, is_traced, register
from .checks import PROFILE_DTYPE, check_boundary, check_input, check_radius, count_shells

_filter = torch.ops.spanet_kernels.radial_filter.default
_profile_grad = torch.ops.spanet_kernels.radial_filter_backward.default
_is_compiling = torch.compiler.is_compiling


def radial_filter(x: Tensor, base: Tensor, gain: Tensor, radius: float) -> Tensor:
    """Scale every spatial frequency of x by a gain that depends on its distance from the constant mode.

    y = Re F^-1(M . F(x)),  M_c(u, v) = base_c + gain_{s,c} where u^2 + v^2 is the s-th of `modes.shells`
    up to radius^2, and base_c outside the disc. Computed as base x plus a few Fourier modes, without an FFT; by real
    FFTs where the disc is so wide that they cost less.

    Args:
        x: (B, C, H, W), float64, float32, float16 or bfloat16, any strides, B and C may be 0.
        base: (C,), float32 (float64 for a float64 x), on the device of x.
        gain: (S, C), like base; S = len(modes.shells(modes.squared_radius(radius))): 2 shells at radius 1, 4 at 2, 7 at 3.
        radius: in cycles per image, at least 0; beyond the spectrum of x, shells without modes are ignored.

    Returns:
        The filtered x, same shape and dtype, accumulated in float32 (float64 for float64);
        channels_last if the channels of x are adjacent, else contiguous. Differentiable to any order in x, base and gain.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype, or radius is no number.
        ValueError: a wrong rank, shape or device, an empty plane, a negative or NaN radius.

    Source: arXiv 2308.11568, eqs. 5-18, with a free gain per shell and channel.
    """
    if (
        not _is_compiling()
        and type(radius) in _NUMBERS
        and radius in _SQUARED
        and type(x) in _TENSORS
        and type(base) in _TENSORS
        and type(gain) in _TENSORS
        and x.is_cpu
        and base.is_cpu
        and gain.is_cpu
    ):
        try:
            return _filter_eager(x, base, gain, _SQUARED[radius])
        except RuntimeError:  # the operator on the CPU takes nothing that does not fit, and finds out in less time
            _checked(x, base, gain, radius)  # says what does not
            raise
    return apply_profile(x, base, gain, _checked(x, base, gain, radius))


def spectral_pool(x: Tensor, lam: float | Tensor, radius: float, boundary: float | None = None) -> Tensor:
    """Spectral pooling filter: weigh the low frequencies of x by lam, the others by 1 - lam.

    y = Re F^-1(M . F(x)),  M(u, v) = lam where d < radius, 1 - lam elsewhere, d = sqrt(u^2 + v^2).

    Args:
        x: (B, C, H, W), float64, float32, float16 or bfloat16, any strides, B and C may be 0.
        lam: weight of the low frequencies: a finite number, or a floating-point tensor broadcastable to (C,), learned if it
            requires a gradient. 0.5 halves x, 1 keeps the low frequencies alone, 0 the high ones.
        radius: of the low-pass disc, in cycles per image, at least 0; beyond the spectrum of x the result is lam x.
        boundary: value of M on the circle d == radius; None is the paper's 1 - lam, the published code has 1/3.

    Returns:
        The filtered x, same shape and dtype; channels_last if the channels of x are adjacent, else contiguous.

    Raises:
        TypeError: x is no floating-point tensor, lam, radius or boundary no number.
        ValueError: a wrong rank, shape or device, an empty plane, a number lam or boundary that is not finite, a negative or NaN
            radius, a disc of too many modes.

    Source: arXiv 2308.11568, eqs. 5-18.
    """
    check_input("spectral_pool", x)
    radius = check_radius("spectral_pool", radius)
    if boundary is not None:
        boundary = check_boundary("spectral_pool", boundary)
    channels, height, width = x.shape[1], *deciding_size(x, radius)
    dtype = modes.profile_dtype(x.dtype)
    if isinstance(lam, np.number):
        lam = lam.item()
    if isinstance(lam, Tensor):
        _check_lam(x, lam)
        lams = lam.to(dtype).expand(channels)
    elif not isinstance(lam, (int, float)):
        raise TypeError(f"spectral_pool: lam must be a number or a tensor, got {type(lam).__name__}")
    elif not -math.inf < lam < math.inf:
        raise ValueError(f"spectral_pool: lam must be finite, got {lam}")
    elif _is_compiling():
        lams = torch.full((channels,), lam, dtype=dtype, device=x.device)
    else:
        return apply_profile(x, *modes.constant_profile((lam,), channels, radius, boundary, height, width, dtype, x.device))
    return apply_profile(x, *modes.pooling_profile(lams, radius, boundary, height, width))


def deciding_size(x: Tensor, radius: float) -> tuple[int, int]:
    """(H, W) by which a disc is found to hold the whole spectrum; traced, when no size may decide, one that is larger than the disc."""
    if is_traced() and radius < 1024:
        return (max(16, 2 * math.ceil(radius)),) * 2
    return x.shape[2], x.shape[3]


def apply_profile(x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    """`radial_filter` of arguments that are known to fit."""
    if _fft_pays(x, radius_squared):
        return _by_fft(x, base, gain, radius_squared)
    return linear(x, base, gain, radius_squared)


def _fft_pays(x: Tensor, radius_squared: int) -> bool:
    """Whether so many modes cost more than PyTorch's FFTs, whose cost does not grow with the radius; on a CPU the operator itself decides.

    Measured on an H200 from 14 x 14 to 200 x 334: in one pass over memory the modes win, in more never.
    """
    if x.is_cpu:
        return False
    functions = 2 * math.isqrt(radius_squared) + 1
    if functions <= (5 if x.device.type == "cuda" and is_eager() and x.shape[2] * x.shape[3] > _LARGE else 9):
        return False  # whatever the size: no guard on it under torch.compile
    return not is_traced() and x.shape[0] > 0 and x.shape[1] > 0  # traced no size may decide; an FFT of nothing is an error


_LARGE = 2**15  # pixels of planes that a GPU keeps in parts: 9 functions take 1054 us at 8 x 64 x 200 x 334 on an H200, FFTs 971


def _by_fft(x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    """The filter by real FFTs. The mask is over H W, what the inverse transform would take a pass of its own for."""
    height, width = x.shape[2:]
    shells = modes.half_spectrum_shells(height, width, radius_squared, x.device)
    if base.stride(0) == 0 and gain.stride(1) == 0:  # all channels alike
        base, gain = base[:1], gain[:, :1]
    values = (torch.cat([gain + base, base[None]]) / (height * width)).T.contiguous()
    learns = torch.is_grad_enabled() and (base.requires_grad or gain.requires_grad)
    spectrum = torch.fft.rfft2(x.to(values.dtype))
    if learns or not (is_eager() or _is_compiling()):  # under torch.func the mask can have dimensions that the spectrum does not show
        spectrum = spectrum * _spectral_mask(values, shells[..., 0])
    else:
        torch.view_as_real(spectrum).mul_(_spectral_mask(values, shells))
    return modes.like(torch.fft.irfft2(spectrum, s=x.shape[2:], norm="forward").to(x.dtype), x)


def _spectral_mask(values: Tensor, shells: Tensor) -> Tensor:
    """Of real and imaginary parts if the shells are: to multiply with a complex copy of the mask takes twice as long."""
    return values.index_select(1, shells.flatten()).unflatten(1, shells.shape)


class _RadialFilter(torch.autograd.Function):
    """y = F(x; base, gain): linear in x and in the profile, self-adjoint in x."""

    @staticmethod
    def forward(x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
        out: Tensor = call_below_autograd(_filter, x, base, gain, radius_squared)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, base, gain, ctx.radius_squared = inputs
        needed = ctx.needs_input_grad
        ctx.save_for_backward(x if needed[1] or needed[2] else None, base, gain)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(x, base, gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, base, gain = ctx.saved_tensors
        x_grad = linear(grad, base, gain, ctx.radius_squared) if ctx.needs_input_grad[0] else None
        if x is None:
            return x_grad, None, None, None
        return x_grad, *_bilinear(grad, x, ctx.radius_squared), None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, base_t: Tensor | None, gain_t: Tensor | None, _: None) -> Tensor | None:
        x, base, gain = ctx.saved_tensors
        out = None if x_t is None else linear(x_t, base, gain, ctx.radius_squared)
        if base_t is None and gain_t is None:
            return out
        base_t = torch.zeros_like(base) if base_t is None else base_t
        gain_t = torch.zeros_like(gain) if gain_t is None else gain_t
        profile = linear(x, base_t, gain_t, ctx.radius_squared)
        return profile if out is None else out + profile

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> tuple[Tensor, int]:
        size = info.batch_size
        x, base, gain = (_into_channels(arg, dim, size, at) for arg, dim, at in zip((x, base, gain), in_dims, (1, 0, 1), strict=False))
        return linear(x, base, gain, radius_squared).unflatten(1, (size, -1)), 1


class _ProfileGrad(torch.autograd.Function):
    """(base_grad, gain_grad) = P(grad, x): bilinear and symmetric, the transpose of F in the profile."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, radius_squared: int) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor] = call_below_autograd(_profile_grad, grad, x, radius_squared)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        grad, x, ctx.radius_squared = inputs
        ctx.save_for_backward(grad, x)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(grad, x)

    @staticmethod
    def backward(ctx: Any, base_grad: Tensor, gain_grad: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        to_grad = linear(x, base_grad, gain_grad, ctx.radius_squared) if ctx.needs_input_grad[0] else None
        to_x = linear(grad, base_grad, gain_grad, ctx.radius_squared) if ctx.needs_input_grad[1] else None
        return to_grad, to_x, None

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor | None, x_t: Tensor | None, _: None) -> tuple[Tensor, Tensor]:
        grad, x = ctx.saved_tensors
        grad_t = torch.zeros_like(grad) if grad_t is None else grad_t
        x_t = torch.zeros_like(x) if x_t is None else x_t
        left, right = _bilinear(grad_t, x, ctx.radius_squared), _bilinear(grad, x_t, ctx.radius_squared)
        return left[0] + right[0], left[1] + right[1]

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad: Tensor, x: Tensor, radius_squared: int) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        size = info.batch_size
        grad, x = (_into_channels(arg, dim, size, 1) for arg, dim in zip((grad, x), in_dims, strict=False))
        base_grad, gain_grad = _bilinear(grad, x, radius_squared)
        return (base_grad.unflatten(0, (size, -1)), gain_grad.unflatten(1, (size, -1))), (0, 1)


def _into_channels(arg: Tensor, dim: int | None, size: int, channel_dim: int) -> Tensor:
    """Move a vmapped dimension (absent: repeated) in front of the channels and merge the two."""
    if dim is None:
        moved = arg.unsqueeze(channel_dim).expand(*arg.shape[:channel_dim], size, *arg.shape[channel_dim:])
    else:
        moved = arg.movedim(dim, channel_dim)
    return moved.flatten(channel_dim, channel_dim + 1)


_filter_eager: Callable[[Tensor, Tensor, Tensor, int], Tensor] = register(_filter, _RadialFilter)
_profile_grad_eager: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = register(_profile_grad, _ProfileGrad)


def linear(x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    """The operator, differentiable to any order; arguments are those of `radial_filter`, checked."""
    args = x, base, gain, radius_squared
    return call_in_graph(_filter, *args) if _is_compiling() else _filter_eager(*args)


def _bilinear(grad: Tensor, x: Tensor, radius_squared: int) -> tuple[Tensor, Tensor]:
    return (_profile_grad if _is_compiling() else _profile_grad_eager)(grad, x, radius_squared)


@torch.library.register_fake("spanet_kernels::radial_filter")
def _filter_fake(x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    return torch.empty_like(x, memory_format=modes.memory_format(x))


@torch.library.register_fake("spanet_kernels::radial_filter_backward")
def _profile_grad_fake(grad: Tensor, x: Tensor, radius_squared: int) -> tuple[Tensor, Tensor]:
    dtype = modes.profile_dtype(x.dtype)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(len(modes.shells(radius_squared)), x.shape[1], dtype=dtype)


def _checked(x: Tensor, base: Tensor, gain: Tensor, radius: float) -> int:
    """Squared radius of valid arguments, or an error that names what is wrong."""
    check_input("radial_filter", x)
    radius = check_radius("radial_filter", radius)
    squared = modes.squared_radius(radius)
    channels, dtype = x.shape[1], PROFILE_DTYPE[x.dtype]
    shells = count_shells("radial_filter", squared)
    for name, tensor, shape in (("base", base, (channels,)), ("gain", gain, (shells, channels))):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"radial_filter: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise TypeError(f"radial_filter: {name} must be {dtype} for an x of {x.dtype}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(
                f"radial_filter: {name} must have shape {shape} for radius {radius:g} and {channels} channels, got {tuple(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"radial_filter: {name} must be on {x.device} like x, got {tensor.device}")
    if len(_SQUARED) < 1024 and not _is_compiling():
        _SQUARED[radius] = squared
    return squared


def _check_lam(x: Tensor, lam: Tensor) -> None:
    if not lam.is_floating_point():
        raise TypeError(f"spectral_pool: lam must be a floating-point tensor, got {lam.dtype}")
    if lam.dim() > 1 or (lam.dim() == 1 and lam.shape[0] != 1 and lam.shape[0] != x.shape[1]):
        raise ValueError(f"spectral_pool: lam must broadcast to ({x.shape[1]},), one value per channel, got shape {tuple(lam.shape)}")
    if lam.device != x.device:
        raise ValueError(f"spectral_pool: lam must be on {x.device} like x, got {lam.device}")


_NUMBERS = int, float
_TENSORS = (Tensor, torch.nn.Parameter)
_SQUARED: dict[float, int] = {}  # of radii that have been checked
