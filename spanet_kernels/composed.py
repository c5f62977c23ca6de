"""Operators composed of matrix products, which a library does best, and of smaller operators: one code for every device.

The gate is y = z o (W F(z) + b), with the filter F by its own operator: on a CPU that costs less than adding the modes to the product.
The mixer around it keeps its channels adjacent from its first matrix product to its last, whatever the layout of its input, because
a matrix product reads and writes either at no cost. On a CPU it takes few images at a time, so that what it writes between its first
product and its last stays in the cache, in memory that is used again and not mapped anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import modes
from .products import (
    Branch,
    cast,
    image,
    linear,
    multiplied_in,
    outer,
    outer_sum_serves,
    pair,
    pair_serves,
    parts,
    product,
    rows,
    some,
    summed,
    write,
)

PART = 2 * 2**20  # bytes of a tensor of the images that a CPU takes at a time; in the backward pass, with more of them in use:
BACKWARD_PART = 7 * 2**18

_ops = torch.ops.spanet_kernels
P = ParamSpec("P")
T = TypeVar("T")


def exact(function: Callable[P, T]) -> Callable[P, T]:
    """Every product in the dtypes that it is given, also under autocast; eager code is below autograd, whose keys take time."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.compiler.is_compiling():
            with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():  # in a fifth of the time of torch.autocast
                return function(*args, **kwargs)
        x = args[0]
        assert isinstance(x, Tensor)
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return function(*args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(*args, **kwargs)

    return call


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The 1x1 convolution of x, as channels_last."""
    return image(linear(rows(x), weight, bias), x.shape)


def _pointwise_like(x: Tensor, weight: Tensor, bias: Tensor, like: Tensor) -> Tensor:
    """The 1x1 convolution of x in the layout of like."""
    return modes.like(_pointwise(x, weight, bias), like)


def _applied(weight: Tensor, base: Tensor, radius_squared: int) -> Tensor:
    """The weight that applies to F(z); of an empty disc F is diag(base), which it takes in."""
    return weight if radius_squared >= 0 or _is_one(base) else (weight * base).to(weight.dtype)


def _is_one(base: Tensor) -> bool:
    """Whether a CPU need not multiply with it: the layer without filters has ones."""
    return base.is_cpu and not torch.compiler.is_compiling() and bool((base == 1).all())


def _filtered(z: Tensor, weight: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> tuple[Tensor, Tensor]:
    """F(z), or z where the weight has taken F in, and the weight that applies to it."""
    filtered = z if radius_squared < 0 else _ops.radial_filter(z, base, gain, radius_squared)
    return filtered, _applied(weight, base, radius_squared)


def _of_applied(grad: Tensor, weight: Tensor, base: Tensor, gain: Tensor, profile_learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to weight, base and gain of an empty disc, of that to W diag(base); base's and gain's are empty if they do not learn."""
    if not profile_learns:
        return grad if _is_one(base) else grad * base, base.new_empty(0), gain.new_empty(0)
    return grad * base, (weight * grad).sum(0, dtype=base.dtype), torch.zeros_like(gain)


@exact
def spectral_gate(
    z: Tensor, coefficients: Tensor | None, weight: Tensor, bias: Tensor, base: Tensor, gain: Tensor, radius_squared: int
) -> Tensor:
    """`reference.spectral_gate`."""
    filtered, applied = _filtered(modes.like(z, z), weight, base, gain, radius_squared)
    return _pointwise_like(filtered, applied, bias, z).mul_(z)


@exact
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
    """`reference.spectral_gate_backward`; the context is computed again, not saved."""
    pixels = z.contiguous(memory_format=torch.channels_last)
    args = weight, bias, base, gain, radius_squared, profile_learns
    z_grad, weight_grad, bias_grad, base_grad, gain_grad = _gate_gradients(rows(grad), pixels, *args)
    return modes.like(z_grad, z), weight_grad.to(weight.dtype), bias_grad.to(bias.dtype), base_grad, gain_grad


def _gate_gradients(
    grad: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    base: Tensor,
    gain: Tensor,
    radius_squared: int,
    profile_learns: bool,
    out_weight: Tensor | None = None,
    context: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the gate to z, weight, bias, base and gain: grad o ctx + F(W^T c), c F(z)^T, sum c and the profile's; c = grad o z.

    z is channels_last, grad in rows: with an out_weight that of what it makes of the gate, and then its gradient comes last.
    ctx = W F(z) + b, in rows, is computed again if it was not kept. Nothing is held longer than it is needed, nor is z if it is the
    caller's temporary.
    """
    filtered, applied = _filtered(z, weight, base, gain, radius_squared)
    z_rows, filtered = rows(z), rows(filtered)
    kept, context = context, linear(filtered, applied, bias) if context is None else context
    last: list[Tensor] = []
    if out_weight is not None:
        last += outer(grad, z_rows * context)
        grad = product(grad, out_weight)
    through = context.mul_(grad) if kept is None else context * grad
    c = grad * z_rows if out_weight is None else grad.mul_(z_rows)
    shape, learns_from = z.shape, z if profile_learns else None
    del grad, context, kept, z_rows, z
    wide = base.dtype if radius_squared < 0 else c.dtype  # not to round before base scales it and after that again
    weight_grad, bias_grad = outer(c.to(wide), filtered.to(wide))
    del filtered
    mixed = image(product(c, applied), shape)
    del c
    if radius_squared < 0:
        weight_grad, *profile_grads = _of_applied(weight_grad, weight, base, gain, profile_learns)
        return [mixed.add_(image(through, mixed.shape)), weight_grad.to(weight.dtype), bias_grad, *profile_grads, *last]
    profile_grads = [base.new_empty(0), gain.new_empty(0)]
    if learns_from is not None:
        profile_grads[:] = _ops.radial_filter_backward(mixed, learns_from, radius_squared)
    z_grad = _ops.radial_filter(mixed, base, gain, radius_squared)
    return [z_grad.add_(image(through, mixed.shape)), weight_grad, bias_grad, *profile_grads, *last]


def takes_coefficients(x: Tensor) -> bool:
    """Whether the gate of such planes is the fused one of GPUs, which needs the coefficients of z."""
    return x.is_cuda and x.element_size() == 2


def _placed(whole: Tensor | None, part: slice, value: Tensor) -> Tensor:
    if whole is None:
        return value
    whole[part] = value
    return whole


@exact
def spectral_mixer(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    row_weight: Tensor,
    row_bias: Tensor,
    column_weight: Tensor,
    column_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    base: Tensor,
    gain: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    radius_squared: int,
    keep: bool,
    branch: Branch = Branch(),  # noqa: B008  an immutable value
    keep_added: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.spectral_mixer`; keep returns for the gradients t and, on GPUs, z and its coefficients, elsewhere W F(z) + b in place of
    z, which costs less to compute again, and with keep_added in place of the coefficients what `reference.mixer_branch` returns; what it
    does not keep is empty. The weights may be of any dtype.

    With a branch, the residual branch that the mixer makes; x and its residual are then in one dtype with all the weights, and on a GPU
    `pair_serves` them.
    """
    in_weight, in_bias, weight, bias, out_weight, out_bias, row_weight, row_bias, column_weight, column_bias = cast(
        (in_weight, in_bias, weight, bias, out_weight, out_bias, row_weight, row_bias, column_weight, column_bias),
        (x.dtype,) * 6 + (base.dtype,) * 4,
    )
    before, after = (in_weight, in_bias, row_weight, row_bias, column_weight, column_bias), (bias, base, gain, out_weight, out_bias)
    if not x.is_cpu or not pair_serves(x, weight, out_weight):
        return mixer_in_parts(x, *before, weight, *after, radius_squared, keep, branch=branch)
    y = torch.empty_like(x, memory_format=modes.memory_format(x))
    t, context = (torch.empty_like(x, memory_format=torch.channels_last) if keep else None for _ in range(2))
    branch = branch if branch.residual is None else branch._replace(residual=modes.like(branch.residual, y))
    dense = (value.contiguous() for value in (*before, _applied(weight, base, radius_squared), *after))
    added = _ops.mixer_branch(y, t, context, modes.like(x, x), *branch[:5], *dense, radius_squared)
    if t is None or context is None:
        return y, x.new_empty(0), x.new_empty(0), base.new_empty(0)
    return y, t, context, added if keep_added else base.new_empty(0)


def mixer_unchecked(x: Tensor, args: Sequence[Any], radius_squared: int, branch: Branch) -> Tensor | None:
    """The mixer of eager inference on a CPU, of the tensors of `spectral_mixer` that nobody has looked at, by the operator that refuses
    what does not fit it. None where it is not the way.

    Between the products of a network, which leave nothing of Python in the cache, to look at twenty arguments takes 2 to 3 % of it.
    """
    *before, weight, bias, base, gain, out_weight, out_bias = args
    row_weight, column_weight = before[2], before[4]
    channels, taps = x.shape[1], row_weight.shape[-1]
    fits = row_weight.shape == (channels, 1, 1, taps) and column_weight.shape == (channels, 1, taps, 1) and base.dtype == torch.float32
    if radius_squared < 0:  # the operator does not see these
        fits = fits and base.shape == (channels,) and gain.shape == (0, channels)
    if not (fits and branch.has(x.dtype) and pair_serves(x, weight, out_weight)):
        return None
    y = torch.empty_like(x, memory_format=modes.memory_format(x))
    branch = branch if branch.residual is None else branch._replace(residual=modes.like(branch.residual, y))
    after = _applied(weight, base, radius_squared), bias, base, gain, out_weight, out_bias
    _ops.mixer_branch(y, None, None, modes.like(x, x), *branch[:5], *before, *after, radius_squared)
    return y


def mixer_in_parts(
    x: Tensor,
    *args: Any,
    branch: Branch = Branch(),  # noqa: B008  an immutable value
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`spectral_mixer` in operators that any device has, with weights of its dtypes: on a CPU of a few images at a time."""
    in_weight, in_bias, row_weight, row_bias, column_weight, column_bias, weight, bias, base, gain, *last = args
    out_weight, out_bias, radius_squared, keep = last
    wanted = radius_squared if takes_coefficients(x) else -1
    with_context, pieces = keep and not x.is_cuda, parts(x, PART)
    # memory for the results of all parts; of a single one the result is the whole
    out, all_t, all_context = (
        torch.empty_like(x, memory_format=layout) if wants and len(pieces) > 1 else None
        for wants, layout in ((True, modes.memory_format(x)), (keep, torch.channels_last), (with_context, torch.channels_last))
    )
    for part in pieces:
        around, given = branch.of(part), some(x, part)
        outer = around.residual_alone()
        if around.norm_weight is not None and x.is_cuda:
            t = torch.empty_like(given, memory_format=torch.channels_last)
            pair(t, given, None, None, in_weight, in_bias, branch=around.norm_alone())
        else:
            t = _pointwise(around.normalised(given), in_weight, in_bias)
        z, coefficients = _ops.axial_conv(t, row_weight, row_bias, column_weight, column_bias, wanted)
        if keep:
            all_t = _placed(all_t, part, t)
        if with_context:
            filtered, applied = _filtered(z, weight, base, gain, radius_squared)
            context = _pointwise(filtered, applied, bias)
            all_context = _placed(all_context, part, context)
            y = z.mul_(context)
        else:
            y = _ops.spectral_gate(z, coefficients if takes_coefficients(z) else None, weight, bias, base, gain, radius_squared)
        if z.is_cuda and outer.is_there:
            out = torch.empty_like(x, memory_format=modes.memory_format(x))
            pair(out, y, None, None, out_weight, out_bias, branch=outer)
        else:
            out = _placed(out, part, outer.added(_pointwise_like(y, out_weight, out_bias, x)))
    assert out is not None
    if not keep or all_t is None:
        return out, x.new_empty(0), x.new_empty(0), base.new_empty(0)
    if x.is_cuda:
        return out, all_t, z, coefficients
    return out, all_t, x.new_empty(0) if all_context is None else all_context, base.new_empty(0)


@exact
def spectral_mixer_backward(grad: Tensor, x: Tensor, t: Tensor, z: Tensor, coefficients: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of `spectral_mixer` to x and, in its order, to every weight, bias, base and gain, each in its dtype, of in_bias and
    out_bias that of their weights; what was not kept is computed again. The arguments after coefficients are in_weight, row_weight,
    row_bias, column_weight, column_bias, weight, bias, base, gain, out_weight, radius_squared and whether the profile learns."""
    in_weight, row_weight, row_bias, column_weight, column_bias, weight, bias, base, gain, out_weight, radius_squared, learns = args
    convs = row_weight, row_bias, column_weight, column_bias
    dtypes = [like.dtype for like in (in_weight, in_weight, *convs, weight, bias, base, gain, out_weight, out_weight)]
    in_weight, weight, bias, out_weight, row_weight, row_bias, column_weight, column_bias = cast(
        (in_weight, weight, bias, out_weight, *convs), (x.dtype,) * 4 + (base.dtype,) * 4
    )
    weights = in_weight, row_weight, row_bias, column_weight, column_bias, weight, bias, base, gain, out_weight
    if x.numel() and outer_sum_serves(x) and pair_serves(x, weight, out_weight):
        x_grad = torch.empty_like(x, memory_format=modes.memory_format(x))
        dense = (value.contiguous() for value in (*weights[:5], _applied(weight, base, radius_squared), *weights[6:]))
        maps = modes.like(grad, grad), modes.like(x, x), t, z, coefficients
        found = list(_ops.mixer_branch_backward(x_grad, *maps, *dense, radius_squared, learns and radius_squared >= 0))
        if radius_squared < 0:
            found[6], found[8], found[9] = _of_applied(found[6], weight, base, gain, learns)
    else:
        x_grad, *found = gradients_in_parts(grad, x, t, z, coefficients, *weights, radius_squared, learns)
    return x_grad, *cast(found, dtypes)


def gradients_in_parts(
    grad: Tensor,
    x: Tensor,
    t: Tensor,
    z: Tensor,
    coefficients: Tensor,
    in_weight: Tensor,
    row_weight: Tensor,
    row_bias: Tensor,
    column_weight: Tensor,
    column_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    base: Tensor,
    gain: Tensor,
    out_weight: Tensor,
    radius_squared: int,
    profile_learns: bool,
) -> tuple[Tensor, ...]:
    """`spectral_mixer_backward` in operators that any device has, with weights of its dtypes: on a CPU of a few images at a time."""
    x_grad = torch.empty_like(x, memory_format=modes.memory_format(x))
    gate_args = weight, bias, base, gain, radius_squared
    sums: list[Tensor] = []
    # as many positions as channels at least are worth a sum of products of channels
    pieces = parts(x, max(BACKWARD_PART, x.shape[1] ** 2 * multiplied_in(x).itemsize))
    for part in pieces:
        g, t_part = rows(some(grad, part)), some(t, part)
        if takes_coefficients(t):
            y_grad, y = image(product(g, out_weight), z.shape), _ops.spectral_gate(z, coefficients, *gate_args)
            gate = [*_ops.spectral_gate_backward(y_grad, z, coefficients, *gate_args, profile_learns), *outer(g, rows(y))]
        else:
            # GPUs kept z, which is whole there, others the context
            again = [z if t.is_cuda else _ops.axial_conv(t_part, row_weight, row_bias, column_weight, column_bias, -1)[0]]
            context = None if t.is_cuda else rows(some(z, part))
            gate = _gate_gradients(g, again.pop(), *gate_args, profile_learns, out_weight, context)
        t_grad, *conv = _ops.axial_conv_backward(gate.pop(0), t_part, row_weight, row_bias, column_weight)
        t_grad = rows(t_grad)
        write(some(x_grad, part), t_grad, in_weight.mT)
        grads = [*outer(t_grad, rows(some(x, part))), *conv, *gate]
        sums = summed(sums, grads, part is pieces[-1])
        del t_grad, grads
    return x_grad, *sums
