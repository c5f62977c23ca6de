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
_native_norm, _native_gradient = torch.ops.aten.native_group_norm.default, torch.ops.aten.native_group_norm_backward.default
_without_autocast = torch._C._DisableAutocast


class Body(NamedTuple):
    """f, of n = norm(x), of tensors, which may be None, and of constants."""

    forward: Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]]  # (n, ...) to f and what its gradients need
    fuses: Callable[..., bool]  # (x, tensors) to whether, on a CPU, the whole branch is one operator in the dtype of x
    fused: Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]]  # (branch, x, ...) to the branch and what the gradients of f need
    gradients: Callable[..., tuple[Tensor | None, ...]]  # (gradient of f, which of n and the tensors need one, what was kept, n, ...)
    composition: Callable[..., Tensor]  # (n, ...) to f, differentiable to any order


def record(body: Body, constants: tuple[Any, ...], branch: Branch, dtype: torch.dtype, x: Tensor, *tensors: Tensor | None) -> Tensor:
    """The branch with a body that is computed in a dtype, for gradients of eager code; where a CPU does not have all of it as one operator,
    PyTorch's norm and sum stand around the body."""
    norm_weight, norm_bias, eps, residual, scale = branch
    sum_alike = all(tensor is None or tensor.dtype == dtype for tensor in (residual, scale))  # else the sum has another dtype
    one = branch.is_there and x.dtype == dtype and sum_alike and body.fuses(x, *tensors)
    if x.is_cuda or one:
        y: Tensor = _Recorded.apply(body, constants, eps, dtype, x, norm_weight, norm_bias, residual, scale, *tensors)
        return y
    return branch.added(_Recorded.apply(body, constants, eps, dtype, normalised(branch, x).to(dtype), None, None, None, None, *tensors))


class _Recorded(torch.autograd.Function):
    """The branch with what it keeps: x, on GPUs n and the moments of x, which a CPU computes again, and what the body does."""

    @staticmethod
    def forward(
        ctx: Any,
        body: Body,
        constants: tuple[Any, ...],
        eps: float,
        dtype: torch.dtype,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        scale: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        n = moments = None
        with below_autograd(), _without_autocast():
            if x.is_cuda or (norm_weight is None and residual is None):
                n, moments = (x, None) if norm_weight is None else _norm(x, norm_weight, norm_bias, eps)
                n = n.to(dtype)
                f, kept = body.forward(n, *tensors, *constants)
                y = Branch(residual=residual, scale=scale).added(f)
            else:
                weight, bias = cast((norm_weight, norm_bias), (dtype, dtype))
                y, kept = body.fused(Branch(weight, bias, eps, residual, scale), x, *tensors, *constants)
        ctx.constants = body, constants, eps, dtype, len(tensors)
        residual = None if scale is None else residual  # nothing asks for it
        ctx.save_for_backward(x, norm_weight, norm_bias, residual, scale, *tensors, n, moments, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        body, constants, eps, dtype, count = ctx.constants
        saved = ctx.saved_tensors  # activation checkpointing hands them out once
        args, (n, moments, *kept) = saved[: 5 + count], saved[5 + count :]
        x, norm_weight, _, residual, scale, *tensors = args
        needed = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():

            def composition(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, scale: Tensor, *tensors: Tensor) -> Tensor:
                branch = Branch(weight, bias, eps, residual, scale)
                return branch.added(body.composition(normalised(branch, x).to(dtype), *tensors, *constants))

            in_graph = list(gradients_in_graph(composition, grad, needed, args))
            in_graph[3] = grad if needed[3] and scale is None else in_graph[3]
            return None, None, None, None, *in_graph
        residual_grad: Tensor | None = grad
        scale_grad: Tensor | None = None
        if scale is not None:
            with below_autograd(), _without_autocast():
                residual_grad = grad * scale[:, None, None] if needed[3] else None
                scale_grad = (grad * residual).sum((0, 2, 3)) if needed[4] else None
        needs_n = needed[0] or needed[1] or needed[2]
        if n is None:
            x = modes.like(x, x)
            n, *by_products = (x,) if norm_weight is None else _native_norm(x, norm_weight, args[2], *_sizes(x), 1, eps)
        n_grad, *grads = body.gradients(grad.to(dtype), (needs_n, *needed[5:]), kept, n, *tensors, *constants)
        norm_grads: tuple[Tensor | None, ...] = n_grad, None, None
        if needs_n and norm_weight is not None and moments is None:
            norm_grads = _native_gradient(n_grad, x, *by_products, norm_weight, *_sizes(x), 1, needed[:3])
        elif needs_n and norm_weight is not None:
            norm_grads = _norm_gradient(n_grad.to(x.dtype), x, moments, norm_weight)
        found = *norm_grads, residual_grad, scale_grad, *grads
        return None, None, None, None, *(value if need else None for value, need in zip(found, needed, strict=True))


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Images, channels and positions."""
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
