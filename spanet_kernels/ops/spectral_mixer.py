"""The spectral mixer: proj_in, axial convolution, spectral gate and proj_out as one operator."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import composed, modes
from ..products import Branch, cast, pair_fits, pair_serves
from .autograd import below_autograd, by_composition, infers, infers_plainly, is_eager, is_traced
from .axial_conv import axial_conv, coefficients_fake
from .branch import Body, record
from .checks import (
    PROFILE_DTYPE,
    UNFIT,
    autocast_dtype,
    check_branch,
    check_input,
    check_parameter,
    check_radius,
    count_shells,
    odd_size,
    unchecked_branch,
)
from .image_norm import normalised
from .radial_filter import apply_profile

_mixer = torch.ops.spanet_kernels.spectral_mixer.default
_gradient = torch.ops.spanet_kernels.spectral_mixer_backward.default


def spectral_mixer(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    row_weight: Tensor,
    row_bias: Tensor | None,
    column_weight: Tensor,
    column_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    base: Tensor,
    gain: Tensor,
    radius: float | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    drop_path: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Mix the positions of x: the whole token mixer of SPANet, with what stands around it on a residual branch.

    z = axial_conv(W_in norm(x) + b_in),  y = residual_scale o residual + W_out (z o (W F(z) + b)) + b_out.

    Channels stay adjacent from the first product to the last, for either layout of x. For gradients t = W_in norm(x) + b_in is kept,
    on GPUs z and its coefficients too, elsewhere W F(z) + b of many channels; the rest is computed again. On a CPU norm and residual
    are part of the products where these are ours: channels in multiples of 32, fp32 or bf16 throughout. Compiled for inference on a CPU it
    is that one operator, else its parts: operators of this package where they serve, else what Inductor fuses.

    Args:
        x: (B, C, H, W), float64, float32, float16 or bfloat16; under autocast it is cast to autocast's dtype.
        in_weight, weight, out_weight: (C, C), any floating dtype; computed with in the dtype of x, like the biases (C,) or None.
        row_weight, row_bias, column_weight, column_bias: as for `axial_conv`.
        base, gain, radius: as for `radial_filter`; a radius of None is an empty disc, with gain of shape (0, C).
        residual, residual_scale, norm, drop_path: as for `pointwise_mlp`.

    Returns:
        y, of the shape of x, channels_last if the channels of x are adjacent, else contiguous; differentiable to any order in everything.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype, or radius is no number.
        ValueError: a wrong rank, shape or device, an even k, an empty plane, a negative or NaN radius.

    Source: arXiv 2308.11568, section 3.3.
    """
    if infers_plainly(x):
        given = in_weight, in_bias, row_weight, row_bias, column_weight, column_bias, weight, bias, base, gain, out_weight, out_bias
        y = _unchecked(x, given, radius, norm, residual, residual_scale, drop_path)
        if y is not None:
            return y
    check_input("spectral_mixer", x)
    branch = check_branch("spectral_mixer", x, tuple(x.shape), norm, residual, residual_scale, drop_path)
    dtype = autocast_dtype(x) or x.dtype
    squared = -1 if radius is None else modes.squared_radius(check_radius("spectral_mixer", radius))
    channels, wide = x.shape[1], PROFILE_DTYPE[dtype]
    size = odd_size("spectral_mixer", row_weight)
    square, flat = (channels, channels), (channels,)
    args: list[Any] = [
        check_parameter("spectral_mixer", name, value, shape, x)
        for name, value, shape in (
            ("in_weight", in_weight, square),
            ("in_bias", in_bias, flat),
            ("row_weight", row_weight, (channels, 1, 1, size)),
            ("row_bias", row_bias, flat),
            ("column_weight", column_weight, (channels, 1, size, 1)),
            ("column_bias", column_bias, flat),
            ("weight", weight, square),
            ("bias", bias, flat),
            ("base", base, flat),
            ("gain", gain, (count_shells("spectral_mixer", squared), channels)),
            ("out_weight", out_weight, square),
            ("out_bias", out_bias, flat),
        )
    ]
    args[8], args[9] = args[8].to(wide), args[9].to(wide)
    inferred, traced = infers(x, *args, *branch), is_traced()
    if not inferred and not traced and is_eager():
        return record(_BODY, (squared,), branch, dtype, x, *args)
    args = _as_matrices(args)
    if traced:
        return branch.added(_parts(branch.normalised(x).to(dtype), *args, squared))
    compiling = torch.compiler.is_compiling()
    if inferred:
        args = cast(args, (dtype, dtype, wide, wide, wide, wide, dtype, dtype, wide, wide, dtype, dtype))
    if inferred and branch.drop_path is None and branch.has(dtype) and x.dtype == dtype and _fuses(x, branch, args[6], args[10]):
        fused: Tensor = composed.spectral_mixer(x, *(*args, squared, False, branch))[0]
        return fused
    x = normalised(branch, x).to(dtype)
    if inferred and compiling and x.device.type == "cpu":
        return branch.added(_parts(x, *args, squared))
    keep = torch.is_grad_enabled() and any(arg.requires_grad for arg in (x, *args))
    return branch.added(_call(x, *args, squared, keep)[0])


def _unchecked(x: Tensor, args: Any, radius: float | None, *around: Any) -> Tensor | None:
    """The mixer of eager inference on a CPU; None where that is not the way, or arguments do not fit."""
    with contextlib.suppress(*UNFIT), below_autograd():
        squared, branch = -1 if radius is None else modes.squared_radius(check_radius("spectral_mixer", radius)), unchecked_branch(*around)
        if branch is not None and squared <= _FEW:
            return composed.mixer_unchecked(x, args, squared, branch)
    return None


_FEW = 64  # squared radius up to which the operator finds out about the number of shells in no time


def _fuses(x: Tensor, branch: Branch, weight: Tensor, out_weight: Tensor) -> bool:
    """Whether norm and residual are part of the products: there are such products, on a GPU only for them."""
    if x.is_cuda:
        return branch.is_there and pair_serves(x, None, out_weight)
    return x.device.type == "cpu" and (pair_serves(x, weight, out_weight) if torch.compiler.is_compiling() else branch.is_there)


def _gradients(grad: Tensor, needed: Any, kept: tuple[Tensor, ...], x: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    in_weight, _, row_weight, row_bias, column_weight, column_bias, weight, bias, base, gain, out_weight, _, radius_squared, keep = args
    if not keep:
        raise RuntimeError("spectral_mixer: the operator must be called with keep=True where gradients are wanted")
    learns = needed[9] or needed[10]
    given = (in_weight, row_weight, row_bias, column_weight, column_bias, weight, bias, base, gain, out_weight)
    *grads, base_grad, gain_grad, out_weight_grad, out_bias_grad = _gradient._op(grad, x, *kept, *given, radius_squared, learns)
    return *grads, *((base_grad, gain_grad) if learns else (None, None)), out_weight_grad, out_bias_grad, None, None


def _parts(x: Tensor, in_weight: Tensor, in_bias: Tensor, *args: Any) -> Tensor:
    """The mixer in smaller operators, in the layout that these give it."""
    row_weight, row_bias, column_weight, column_bias, weight, bias, base, gain, out_weight, out_bias, squared = args
    in_weight, in_bias, weight, bias, out_weight, out_bias = (
        value.to(x.dtype) for value in (in_weight, in_bias, weight, bias, out_weight, out_bias)
    )
    t = functional.conv2d(x, in_weight[:, :, None, None], in_bias)
    z, _ = axial_conv(t, row_weight[:, None, None], row_bias, column_weight[:, None, :, None], column_bias)
    filtered = (z * base[:, None, None]).to(z.dtype) if squared < 0 else apply_profile(z, base, gain, squared)
    y = functional.conv2d(filtered, weight[:, :, None, None], bias) * z
    return functional.conv2d(y, out_weight[:, :, None, None], out_bias)


def _composition(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return (modes.like(_parts(x, *args[:-1]), x),)


_call = by_composition(_mixer, _gradient, _gradients, _composition)


def _as_matrices(args: Sequence[Any]) -> list[Any]:
    """The arguments after x with the weights of the axial convolution as (C, k)."""
    return [*args[:2], args[2].flatten(1), args[3], args[4].flatten(1), *args[5:]]


def _body(x: Tensor, *args: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    if _fuses_body(x, *args):
        return _fused_body(Branch(), x, *args)
    y, *kept = _mixer._op(x, *_as_matrices(args), True)
    return y, tuple(kept)


def _fuses_body(x: Tensor, *args: Any) -> bool:
    return x.is_cpu and pair_fits(x, args[6], args[10])


def _fused_body(branch: Branch, x: Tensor, *args: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    y, *kept = composed.spectral_mixer(x, *(*_as_matrices(args), True, branch, True))
    return y, tuple(kept)


def _body_gradients(grad: Tensor, needed: Any, kept: tuple[Tensor, ...], x: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    found: Any = _gradients(grad, needed, kept, x, *_as_matrices(args), True)
    return *found[:3], found[3].view_as(args[2]), found[4], found[5].view_as(args[4]), *found[6:-2]


_BODY = Body(_body, _fuses_body, _fused_body, _body_gradients, lambda x, *args: _call(x, *_as_matrices(args), True)[0])


@torch.library.register_fake("spanet_kernels::spectral_mixer")
def _mixer_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, radius_squared, keep = args
    y = torch.empty_like(x, memory_format=modes.memory_format(x))
    nothing = x.new_empty(0), x.new_empty(0, dtype=modes.profile_dtype(x.dtype))
    if not keep:
        return y, x.new_empty(0), *nothing
    t = torch.empty_like(x, memory_format=torch.channels_last)
    if x.device.type == "cuda":
        return y, t, torch.empty_like(t), coefficients_fake(x, radius_squared if composed.takes_coefficients(x) else -1)
    return y, t, torch.empty_like(t), nothing[1]


@torch.library.register_fake("spanet_kernels::mixer_branch_backward")
def _branch_backward_fake(
    x_grad: Tensor, grad: Tensor, x: Tensor, t: Tensor, context: Tensor, added: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    in_weight, *convs, weight, bias, base, gain, out_weight, _, learns = args
    shapes = [in_weight, bias, *convs, weight, bias, *((base, gain) if learns else (None, None)), out_weight, bias]
    return tuple(x.new_empty(0 if like is None else like.shape, dtype=torch.float32) for like in shapes)


@torch.library.register_fake("spanet_kernels::spectral_mixer_backward")
def _gradient_fake(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *_, in_weight, row_weight, row_bias, column_weight, column_bias, weight, bias, base, gain, out_weight, _, learns = args
    return (
        torch.empty_like(x, memory_format=modes.memory_format(x)),
        in_weight.new_empty(in_weight.shape),
        in_weight.new_empty(bias.shape),
        *(like.new_empty(like.shape) for like in (row_weight, row_bias, column_weight, column_bias, weight, bias)),
        *(like.new_empty(like.shape if learns else 0) for like in (base, gain)),
        out_weight.new_empty(out_weight.shape),
        out_weight.new_empty(bias.shape),
    )


@torch.library.register_fake("spanet_kernels::mixer_branch")
def _branch_fake(y: Tensor, t: Tensor | None, context: Tensor | None, x: Tensor, *args: Any) -> Tensor:
    images, channels, height, width = x.shape
    count = 0 if t is None or args[-1] < 0 else modes.count(height, width, args[-1])
    keeps = 0 < 8 * count <= height * width
    return x.new_empty(images * count if keeps else 0, channels if keeps else 0, dtype=torch.float32)
