"""A residual branch, scale o residual + f(norm(x)), as one autograd function: eager training pays for every node of its graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import modes
from ..products import Branch, cast
from .autograd import below_autograd, gradients_in_graph
from .image_norm import normalised

_norm = torch.ops.spanet_kernels.image_norm.default._op
_norm_gradient = torch.ops.spanet_kernels.image_norm_backward.default._op
_ops = torch.ops.spanet_kernels
_FLOATS, _WIDE = (torch.float32, torch.bfloat16), (torch.float32,)
_without_autocast = torch._C._DisableAutocast


class Body(NamedTuple):
    """f, of n = norm(x), of tensors, which may be None, and of constants."""

    forward: Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]]  # (n, ...) to f and what its gradients need
    fuses: Callable[..., bool]  # (x, tensors) to whether, on a CPU, the whole branch is one operator in the dtype of x
    fused: Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]]  # (branch, x, ...) to the branch and what the gradients of f need
    gradients: Callable[..., tuple[Tensor | None, ...]]  # (gradient of f, which of n and the tensors need one, what was kept, n, ...)
    composition: Callable[..., Tensor]  # (n, ...) to f, differentiable to any order


def record(body: Body, constants: tuple[Any, ...], branch: Branch, dtype: torch.dtype, x: Tensor, *tensors: Tensor | None) -> Tensor:
    """The branch with a body that is computed in a dtype, for gradients of eager code; where a CPU has no kernels of its norm and sum in
    their dtypes, PyTorch's stand around the body."""
    norm_weight, norm_bias, eps, residual, scale = branch
    own = residual is x and not x.is_cuda  # then x has one gradient, in place of two to be added up
    if x.is_cuda or _around(branch, own, dtype, x):
        y: Tensor = _Recorded.apply(body, constants, eps, dtype, own, x, norm_weight, norm_bias, None if own else residual, scale, *tensors)
        return y
    n = normalised(branch, x).to(dtype)
    return branch.added(_Recorded.apply(body, constants, eps, dtype, False, n, None, None, None, None, *tensors))


def _around(branch: Branch, own: bool, dtype: torch.dtype, x: Tensor) -> bool:
    """Whether a CPU has kernels of the norm, of the sum with x itself and of their gradients: the body may be narrower than x, whose dtype
    the sum has, and is not where a bfloat16 x is scaled in float32."""
    serves = own and branch.norm_weight is not None and x.dtype in _FLOATS and dtype in (x.dtype, torch.bfloat16) and x.numel() > 0
    return serves and (branch.scale is None or x.dtype == torch.float32 or branch.scale.dtype == x.dtype)


class _Recorded(torch.autograd.Function):
    """The branch with what it keeps: x, on GPUs n and the moments of x, which a CPU computes again, and what the body does. A CPU has norm
    and sum around the body in the branch that is the `own` of x, the residual."""

    @staticmethod
    def forward(
        ctx: Any,
        body: Body,
        constants: tuple[Any, ...],
        eps: float,
        dtype: torch.dtype,
        own: bool,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        scale: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        n = moments = None
        with below_autograd(), _without_autocast():
            if not own:
                n, moments = (x, None) if norm_weight is None else _norm(x, norm_weight, norm_bias, eps)
                n = n.to(dtype)
                f, kept = body.forward(n, *tensors, *constants)
                y = Branch(residual=residual, scale=scale).added(f)
            elif x.dtype == dtype and body.fuses(x, *tensors):
                weight, bias, fused_scale = cast((norm_weight, norm_bias, scale), (dtype,) * 3)
                y, kept = body.fused(Branch(weight, bias, eps, x, fused_scale), x, *tensors, *constants)
            else:
                dense = modes.like(x, x)
                f, kept = body.forward(_normal(dense, norm_weight, norm_bias, eps, dtype)[0], *tensors, *constants)
                y = torch.empty_like(dense)
                _ops.branch_sum.default(y, modes.like(f, dense), dense, *cast((scale,), _WIDE))
        ctx.constants = body, constants, eps, dtype, own, len(tensors)
        residual = None if scale is None else residual  # nothing asks for it
        ctx.save_for_backward(x, norm_weight, norm_bias, residual, scale, *tensors, n, moments, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        body, constants, eps, dtype, own, count = ctx.constants
        saved = ctx.saved_tensors  # activation checkpointing hands them out once
        args, (n, moments, *kept) = saved[: 5 + count], saved[5 + count :]
        x, norm_weight, norm_bias, residual, scale, *tensors = args
        needed = ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():

            def composition(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, scale: Tensor, *tensors: Tensor) -> Tensor:
                branch = Branch(weight, bias, eps, x if own else residual, scale)
                return branch.added(body.composition(normalised(branch, x).to(dtype), *tensors, *constants))

            in_graph = list(gradients_in_graph(composition, grad, needed, args))
            in_graph[3] = grad if needed[3] and scale is None else in_graph[3]
            return None, None, None, None, None, *in_graph
        residual_grad: Tensor | None = grad
        scale_grad: Tensor | None = None
        if scale is not None and not own:
            with below_autograd(), _without_autocast():
                residual_grad = grad * scale[:, None, None] if needed[3] else None
                scale_grad = (grad * residual).sum((0, 2, 3)) if needed[4] else None
        needs_n = needed[0] or needed[1] or needed[2]
        if own:
            x = modes.like(x, x)
            n, moments = _normal(x, norm_weight, norm_bias, eps, dtype)
        n_grad, *grads = body.gradients(grad.to(dtype), (needs_n, *needed[5:]), kept, n, *tensors, *constants)
        norm_grads: tuple[Tensor | None, ...] = n_grad, None, None
        if own:
            x_grad = torch.empty_like(x)
            given = modes.like(n_grad, x), x, moments, *cast((norm_weight,), _WIDE), modes.like(grad, x), *cast((scale,), _WIDE)
            sums = _ops.branch_norm_backward.default(x_grad, *given)
            weight_grad, bias_grad, scale_grad = cast(
                sums, [x.dtype if like is None else like.dtype for like in (norm_weight, norm_bias, scale)]
            )
            norm_grads, residual_grad = (x_grad, weight_grad, bias_grad), None
        elif needs_n and norm_weight is not None:
            norm_grads = _norm_gradient(n_grad.to(x.dtype), x, moments, norm_weight)
        found = *norm_grads, residual_grad, scale_grad, *grads
        return None, None, None, None, None, *(value if need else None for value, need in zip(found, needed, strict=True))


@torch.library.register_fake("spanet_kernels::branch_norm")
def _norm_fake(n: Tensor, *_: Tensor) -> None:
    pass


@torch.library.register_fake("spanet_kernels::branch_norm_backward")
def _norm_gradient_fake(x_grad: Tensor, n_grad: Tensor, x: Tensor, *args: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    sizes = x.shape[1], x.shape[1], 0 if args[-1] is None else x.shape[1]
    weight_grad, bias_grad, scale_grad = (x.new_empty(size, dtype=torch.float32) for size in sizes)
    return weight_grad, bias_grad, scale_grad


@torch.library.register_fake("spanet_kernels::branch_sum")
def _sum_fake(y: Tensor, *_: Tensor | None) -> None:
    pass


def _normal(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """norm(x) in a dtype, on a CPU, and the moments of x, which is dense."""
    n, moments = torch.empty_like(x, dtype=dtype), _ops.image_moments.default(x, eps)
    _ops.branch_norm.default(n, x, moments, *cast((weight, bias), _WIDE * 2))
    return n, moments
