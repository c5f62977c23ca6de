"""The MLP of a block, two 1x1 convolutions around a GELU: one operator on a CPU, else PyTorch's, put together so that few bytes move
and stay."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import modes
from ..composed import exact
from ..products import (
    Branch,
    cast,
    linear,
    multiplied_in,
    onednn_serves,
    outer,
    pair,
    pair_fits,
    pair_serves,
    parts,
    place,
    product,
    rows,
    settle,
    some,
    summed,
    write,
)
from .autograd import below_autograd, infers, infers_plainly, is_eager, is_traced
from .branch import Body, record
from .checks import UNFIT, autocast_dtype, check_branch, check_input, check_parameter, unchecked_branch
from .image_norm import normalised

_gelu = torch.ops.spanet_kernels.gelu.default
PART = 8 * 2**20  # bytes of h of the images that a CPU takes at a time in training, all products of which find it in the cache
WIDENED_PART = 5 * 2**19  # the same in the backward pass if h was widened: the fewer, the less memory beside what is kept


def pointwise_mlp(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    inplace: bool = False,
    drop_path: tuple[Tensor, float] | None = None,
) -> Tensor:
    """residual_scale o residual + W_out gelu(W_in norm(x) + b_in) + b_out at every position, with the exact GELU.

    For gradients x and h = W_in norm(x) + b_in are kept; gelu(h), as large as h, is computed again, on a CPU norm(x), too. Without
    gradients, on a CPU, h never leaves the cache; of few positions the GELU is done where oneDNN writes h. In other graphs of
    torch.compile, which fuses and chooses what to keep by itself, and under torch.func it is what `Conv2d`, `GELU`, `Conv2d` compute.

    Args:
        x: (B, C, H, W), float64, float32, float16 or bfloat16; under autocast it is cast to autocast's dtype.
        weight_in: (D, C, 1, 1); weight_out: (E, D, 1, 1), of any of these dtypes, like the biases (D,) and (E,) or None; they are
            multiplied in that of x.
        residual: (B, E, H, W), added to the result; None for nothing.
        residual_scale: (E,), a factor per channel of the residual; None for 1.
        norm: weight (C,), bias (C,) and eps of a GroupNorm with one group; None for no norm.
        inplace: the result may take the memory of the residual, which is then lost; eager inference on a CPU does where the residual
            is x itself or in memory of its own, which saves the time to map new memory.
        drop_path: stochastic depth, as kept (B,), floating, 1 or 0, and a factor: what is added to the residual is 0 for the images that
            are not kept, and multiplied by the factor for the others. A CPU computes gradients of the images alone that are kept.

    Returns:
        (B, E, H, W), dtype of x and residual, channels_last if x is; differentiable to any order in everything.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a wrong rank, shape or device, an empty plane, no channels.
    """
    if infers_plainly(x):
        with contextlib.suppress(*UNFIT), below_autograd():
            around = unchecked_branch(norm, residual, residual_scale, drop_path)
            if around is not None and weight_in.shape[2:] == weight_out.shape[2:] == (1, 1) and around.has(x.dtype):
                matrices = weight_in.flatten(1), weight_out.flatten(1)
                if pair_serves(x, *matrices):
                    return _fused(x, matrices[0], bias_in, matrices[1], bias_out, around, inplace)
    check_input("pointwise_mlp", x)
    hidden, out = (weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 0 for weight in (weight_in, weight_out))
    check_parameter("pointwise_mlp", "weight_in", weight_in, (hidden, x.shape[1], 1, 1), x)
    check_parameter("pointwise_mlp", "weight_out", weight_out, (out, hidden, 1, 1), x)
    if not (x.shape[1] and hidden and out):
        raise ValueError(f"pointwise_mlp: C, D and E must be at least 1, got {x.shape[1]}, {hidden} and {out}")
    for name, bias, size in (("bias_in", bias_in, hidden), ("bias_out", bias_out, out)):
        if bias is not None:
            check_parameter("pointwise_mlp", name, bias, (size,), x)
    branch = check_branch("pointwise_mlp", x, (x.shape[0], out, *x.shape[2:]), norm, residual, residual_scale, drop_path)
    weights: Any = weight_in, bias_in, weight_out, bias_out
    inferred, dtype = infers(x, *weights, *branch) and not is_traced(), autocast_dtype(x) or x.dtype
    if not inferred and is_eager() and not is_traced():
        return record(_BODY, (), branch, dtype, x, *weights)
    weights = tuple(None if weight is None else weight.to(dtype) for weight in weights)
    if inferred and dtype == x.dtype:
        return _inferred(x, *(*weights, branch, inplace and is_eager()))
    x = normalised(branch, x).to(dtype)
    return branch.added(_inferred(x, *(*weights, Branch())) if inferred else _composition(x, *weights))


def _inferred(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    branch: Branch,
    inplace: bool = False,
) -> Tensor:
    if branch.drop_path is not None or not branch.has(x.dtype):
        return branch.added(_inferred(normalised(branch, x), weight_in, bias_in, weight_out, bias_out, Branch()))
    matrix_in, matrix_out = weight_in[:, :, 0, 0], weight_out[:, :, 0, 0]
    if pair_serves(x, matrix_in, matrix_out):
        return _fused(x, matrix_in, bias_in, matrix_out, bias_out, branch, inplace)
    x = normalised(branch, x)
    if is_eager() and onednn_serves(x) and x.is_contiguous(memory_format=torch.channels_last):
        y = linear(linear(x.movedim(1, -1), matrix_in, bias_in, gelu=True), matrix_out, bias_out).movedim(-1, 1)
    elif is_eager() and x.is_cuda:
        y, _ = _by_parts(x, matrix_in, bias_in, matrix_out, bias_out)
    else:
        y = _composition(x, weight_in, bias_in, weight_out, bias_out)
    return branch.added(y)


def _fused(
    x: Tensor, matrix_in: Tensor, bias_in: Tensor | None, matrix_out: Tensor, bias_out: Tensor | None, branch: Branch, inplace: bool
) -> Tensor:
    """The branch by a pair of products."""
    layout, residual = modes.memory_format(x), branch.residual
    if inplace and x.is_cpu and residual is not None and residual.is_contiguous(memory_format=layout) and _is_apart(residual, x):
        pair(residual, x, matrix_in, bias_in, matrix_out, bias_out, branch=branch)
        if not residual.is_inference():
            torch.autograd.graph.increment_version(residual)
        return residual
    return pair(_memory(x, matrix_out, layout), x, matrix_in, bias_in, matrix_out, bias_out, branch=branch)


def _is_apart(residual: Tensor, x: Tensor) -> bool:
    """Whether what is written to the residual is read from x before, or not at all."""
    return residual is x or residual.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def _composition(x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None) -> Tensor:
    return functional.conv2d(functional.gelu(functional.conv2d(x, weight_in, bias_in)), weight_out, bias_out)


def _body(x: Tensor, *weights: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The MLP in the dtype of x, with weights of any."""
    if _fuses_body(x, *weights):
        return _fused_body(Branch(), x, *weights)
    matrix_in, row_in, matrix_out, row_out = _in_dtype_of(x, *weights)
    y, h = _by_parts(x, matrix_in, row_in, matrix_out, row_out)
    return y, (h, matrix_in, row_in, matrix_out)


def _fuses_body(x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None) -> bool:
    return x.is_cpu and pair_fits(x, weight_in, weight_out)


def _fused_body(branch: Branch, x: Tensor, *weights: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    matrix_in, row_in, matrix_out, row_out = _in_dtype_of(x, *weights)
    y, h = _memory(x, matrix_out, modes.memory_format(x)), _memory(x, matrix_in, torch.channels_last)
    pair(y, x, matrix_in, row_in, matrix_out, row_out, branch=branch, before=h)
    return y, (h, matrix_in, None, matrix_out)  # the bias is in h


def _body_gradients(grad: Tensor, needed: Any, kept: Any, x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    h, matrix_in, row_in, matrix_out = kept
    dtypes = [x.dtype if weight is None else weight.dtype for weight in weights]
    return _gradients_by_parts(grad, x, matrix_in, row_in, matrix_out, h, needed[0], dtypes)


def _body_composition(x: Tensor, *weights: Any) -> Tensor:
    cast_weights: Any = (None if weight is None else weight.to(x.dtype) for weight in weights)
    return _composition(x, *cast_weights)


_BODY = Body(_body, _fuses_body, _fused_body, _body_gradients, _body_composition)


def _in_dtype_of(x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None) -> Any:
    """The weights as matrices and the biases, in the dtype of x."""
    matrix_in, row_in, matrix_out, row_out = cast((weight_in, bias_in, weight_out, bias_out), (x.dtype,) * 4)
    return matrix_in.flatten(1), row_in, matrix_out.flatten(1), row_out


def _memory(x: Tensor, weight: Tensor, layout: torch.memory_format) -> Tensor:
    """For the 1x1 convolution of x with a weight (D, C)."""
    return torch.empty((x.shape[0], weight.shape[0], *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=layout)


def _by_parts(x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """The MLP of x, in its layout, and h as channels_last, without the bias that the GELU adds; weights (D, C) and (E, D)."""
    y, h = _memory(x, weight_out, modes.memory_format(x)), _memory(x, weight_in, torch.channels_last)
    wide = multiplied_in(x)
    bias_in, bias_out = (None if bias is None else bias.to(wide) for bias in (bias_in, bias_out))
    in_product, in_gelu = _places(bias_in)
    for part in parts(h, PART):
        h_part, y_part = some(h, part), some(y, part)
        hidden, out = place(h_part, wide), place(y_part, wide)
        write(hidden, rows(some(x, part)).to(wide), weight_in, in_product)
        write(out, _gelu(rows(hidden), in_gelu, None)[0], weight_out, bias_out)
        settle(h_part, hidden)
        settle(y_part, out)
    return y, h


def _places(bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """b_in for the product and for the GELU, which adds it in passing; to h of 16 bits before it is rounded."""
    if bias is None or bias.element_size() < 4:
        return bias, None
    return None, bias.contiguous()


@exact
def _gradients_by_parts(
    grad: Tensor,
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    h: Tensor,
    needs_x: bool,
    dtypes: Sequence[torch.dtype],
) -> tuple[Tensor, ...]:
    """Gradients to x (nothing if it needs none) and, in these dtypes, weight_in, bias_in, weight_out and bias_out; h as `_by_parts` returns
    it."""
    fused = bias_in is None and x.is_cpu and pair_fits(x, weight_in, weight_out)
    if fused:
        grad = modes.like(grad, grad)
    x_grad = torch.empty_like(x, memory_format=modes.memory_format(x)) if needs_x or fused else x
    sums: list[Tensor] = []
    wide = multiplied_in(x)
    pieces = parts(h, PART if h.dtype == wide else WIDENED_PART)
    for part in pieces:
        given = some(grad, part), some(x, part), some(h, part), weight_in, weight_out
        if fused:
            found = _fused_gradients(*given, some(x_grad, part))
        else:
            found = _gradients(*given, None if bias_in is None else bias_in.to(wide), some(x_grad, part) if needs_x else None)
        sums = summed(sums, found, part is pieces[-1])
    weight_in_grad, bias_in_grad, weight_out_grad, bias_out_grad = cast(sums, dtypes)
    return x_grad, weight_in_grad[:, :, None, None], bias_in_grad, weight_out_grad[:, :, None, None], bias_out_grad


def _fused_gradients(grad: Tensor, x: Tensor, h: Tensor, weight_in: Tensor, weight_out: Tensor, x_grad: Tensor) -> list[Tensor]:
    """Those of some images to weight_in, bias_in, weight_out and bias_out; x_grad is written. gelu(h) is nowhere in memory."""
    h_grad = torch.empty_like(h)
    torch.ops.spanet_kernels.pointwise_mlp_backward.default(x_grad, h_grad, grad, h, weight_in, weight_out)
    return [*outer(rows(h_grad), rows(x)), *outer(rows(grad), rows(h), gelu=True)]


def _gradients(
    grad: Tensor, x: Tensor, h: Tensor, weight_in: Tensor, weight_out: Tensor, bias_in: Tensor | None, x_grad: Tensor | None
) -> list[Tensor]:
    """The same in operators that any device has, x_grad where it is wanted."""
    wide = multiplied_in(x)
    grad, hidden, x = (rows(images).to(wide) for images in (grad, h, x))
    h_grad = product(grad, weight_out)  # of gelu(h), then of h
    a, bias_in_grad = _gelu(hidden, _places(bias_in)[1], h_grad)
    del hidden
    weight_out_grad, bias_out_grad = outer(grad, a)
    del a
    if x_grad is not None:
        written = place(x_grad, wide)
        write(written, h_grad, weight_in.mT)
        settle(x_grad, written)
    return [outer(h_grad, x)[0], bias_in_grad, weight_out_grad, bias_out_grad]


@torch.library.register_fake("spanet_kernels::gelu")
def _gelu_fake(x: Tensor, bias: Tensor | None, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0 if grad is None else x.shape[1], dtype=modes.profile_dtype(x.dtype))


@torch.library.register_fake("spanet_kernels::outer_sum")
def _outer_fake(left: Tensor, left_factor: Tensor | None, right: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return left.new_empty(left.shape[1], right.shape[1], dtype=torch.float32), left.new_empty(left.shape[1], dtype=torch.float32)


@torch.library.register_fake("spanet_kernels::pointwise_mlp_backward")
def _mlp_backward_fake(x_grad: Tensor, h_grad: Tensor, *_: Tensor) -> None:
    pass


@torch.library.register_fake("spanet_kernels::image_moments")
def _moments_fake(x: Tensor, eps: float) -> Tensor:
    return x.new_empty((x.shape[0], 2), dtype=torch.float32)


@torch.library.register_fake("spanet_kernels::pointwise_pair")
def _pair_fake(y: Tensor, x: Tensor, *args: Tensor | None) -> None:
    pass
