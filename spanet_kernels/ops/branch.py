"""A residual branch, scale o residual + drop_path(f(norm(x))), as one autograd function: eager training pays for every node of a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import modes
from ..products import Branch, DropPath, cast
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
    gradients: Callable[..., tuple[Any, ...]]  # (gradient of f, which of n and the tensors need one, what was held, n, ...)
    composition: Callable[..., Tensor]  # (n, ...) to f, differentiable to any order


def record(body: Body, constants: tuple[Any, ...], branch: Branch, dtype: torch.dtype, x: Tensor, *tensors: Tensor | None) -> Tensor:
    """The branch with a body that is computed in a dtype, for gradients of eager code; where a CPU has no kernels of its norm and sum in
    their dtypes, PyTorch's stand around the body."""
    norm_weight, norm_bias, eps, residual, scale, drop_path = branch
    own = residual is x and not x.is_cuda  # then x has one gradient, in place of two to be added up
    kept, factor = (None, 1.0) if drop_path is None else drop_path
    if x.is_cuda or _around(branch, own, dtype, x):
        given = x, norm_weight, norm_bias, None if own else residual, scale
        y: Tensor = _Recorded.apply(body, constants, eps, dtype, own, factor, kept, *given, *tensors)
        return y
    n = normalised(branch, x).to(dtype)
    return branch.added(_Recorded.apply(body, constants, eps, dtype, False, 1.0, None, n, None, None, None, None, *tensors))


def _around(branch: Branch, own: bool, dtype: torch.dtype, x: Tensor) -> bool:
    """Whether a CPU has kernels of the norm, of the sum with x itself and of their gradients: the body may be narrower than x, whose dtype
    the sum has, and is not where a bfloat16 x is scaled in float32."""
    serves = own and branch.norm_weight is not None and x.dtype in _FLOATS and dtype in (x.dtype, torch.bfloat16) and x.numel() > 0
    return serves and (branch.scale is None or x.dtype == torch.float32 or branch.scale.dtype == x.dtype)


class _Recorded(torch.autograd.Function):
    """The branch with what it keeps: x, on GPUs n and the moments of x, which a CPU computes again, and what the body does. A CPU has norm
    and sum around the body in the branch that is the `own` of x, the residual, and computes the body of the images that are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        body: Body,
        constants: tuple[Any, ...],
        eps: float,
        dtype: torch.dtype,
        own: bool,
        factor: float,
        kept: Tensor | None,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        scale: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        n = moments = images = None
        drop_path = None if kept is None else DropPath(kept, factor)
        with below_autograd(), _without_autocast():
            if not own:
                n, moments = (x, None) if norm_weight is None else _norm(x, norm_weight, norm_bias, eps)
                n = n.to(dtype)
                f, held = body.forward(n, *tensors, *constants)
                y = Branch(residual=residual, scale=scale, drop_path=drop_path).added(f)
            elif drop_path is None:
                y, held = _own_forward(body, constants, Branch(norm_weight, norm_bias, eps, x, scale), dtype, x, tensors)
            else:
                dense, images, held = modes.like(x, x), _KeptImages(drop_path), ()
                y = given = images.take(dense)
                if given.shape[0]:
                    branch = Branch(norm_weight, norm_bias, eps, given, scale)
                    y, held = _own_forward(body, constants, branch, dtype, given, images.factored(tensors))
                y = images.merge(y, dense, scale)
        ctx.constants = body, constants, eps, dtype, factor, len(tensors)
        ctx.own, ctx.images = own, images
        residual = None if scale is None else residual  # nothing asks for it
        ctx.save_for_backward(kept, x, norm_weight, norm_bias, residual, scale, *tensors, n, moments, *held)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        body, constants, eps, dtype, factor, count = ctx.constants
        kept, *saved = ctx.saved_tensors  # activation checkpointing hands them out once
        args, (n, moments, *held) = saved[: 5 + count], saved[5 + count :]
        x, norm_weight, norm_bias, residual, scale, *tensors = args
        drop_path = None if kept is None else DropPath(kept, factor)
        needed = ctx.needs_input_grad[7:]
        if torch.is_grad_enabled():

            def composition(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, scale: Tensor, *tensors: Tensor) -> Tensor:
                branch = Branch(weight, bias, eps, x if ctx.own else residual, scale, drop_path)
                return branch.added(body.composition(normalised(branch, x).to(dtype), *tensors, *constants))

            in_graph = list(gradients_in_graph(composition, grad, needed, args))
            in_graph[3] = grad if needed[3] and scale is None else in_graph[3]
            return *(None,) * 7, *in_graph
        if ctx.own:
            branch = Branch(norm_weight, norm_bias, eps, scale=scale)
            found = _own_backward(body, constants, branch, dtype, x, grad, needed, held, tensors, ctx.images)
            return *(None,) * 7, *(value if need else None for value, need in zip(found, needed, strict=True))
        residual_grad: Tensor | None = grad
        scale_grad: Tensor | None = None
        if scale is not None:
            with below_autograd(), _without_autocast():
                residual_grad = grad * scale[:, None, None] if needed[3] else None
                scale_grad = (grad * residual).sum((0, 2, 3)) if needed[4] else None
        needs_n = needed[0] or needed[1] or needed[2]
        f_grad = grad if drop_path is None else grad * drop_path.factors(grad)
        n_grad, *grads = body.gradients(f_grad.to(dtype), (needs_n, *needed[5:]), held, n, *tensors, *constants)
        norm_grads: tuple[Tensor | None, ...] = n_grad, None, None
        if needs_n and norm_weight is not None:
            norm_grads = _norm_gradient(n_grad.to(x.dtype), x, moments, norm_weight)
        found = *norm_grads, residual_grad, scale_grad, *grads
        return *(None,) * 7, *(value if need else None for value, need in zip(found, needed, strict=True))


def _own_forward(
    body: Body, constants: tuple[Any, ...], branch: Branch, dtype: torch.dtype, x: Tensor, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The branch of x on a CPU, and what the gradients of its body need."""
    if x.dtype == dtype and body.fuses(x, *tensors):
        weight, bias, scale = cast((branch.norm_weight, branch.norm_bias, branch.scale), (dtype,) * 3)
        return body.fused(Branch(weight, bias, branch.eps, x, scale), x, *tensors, *constants)
    dense = modes.like(x, x)
    f, held = body.forward(_normal(dense, branch, dtype)[0], *tensors, *constants)
    y = torch.empty_like(dense)
    _ops.branch_sum.default(y, modes.like(f, dense), dense, *cast((branch.scale,), _WIDE))
    return y, held


def _own_backward(
    body: Body,
    constants: tuple[Any, ...],
    branch: Branch,
    dtype: torch.dtype,
    x: Tensor,
    grad: Tensor,
    needed: Sequence[bool],
    held: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    images: _KeptImages | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of the branch on a CPU to x, norm's weight and bias, nothing for the residual, scale, and the tensors."""
    whole = x = modes.like(x, x)
    whole_grad = grad = modes.like(grad, x)
    if images is not None:
        x, grad, tensors = images.take(whole), images.take(whole_grad), images.factored(tensors)
    x_grad, around = torch.empty_like(x), (branch.norm_weight, branch.norm_bias, branch.scale)
    if x.shape[0]:
        n, moments = _normal(x, branch, dtype)
        n_grad, *grads = body.gradients(grad.to(dtype), (True, *needed[5:]), held, n, *tensors, *constants)
        weight, scale = cast((branch.norm_weight, branch.scale), _WIDE * 2)
        sums = list(_ops.branch_norm_backward.default(x_grad, modes.like(n_grad, x), x, moments, weight, grad, scale))
    else:
        grads = [None if tensor is None else torch.zeros_like(tensor) for tensor in tensors]
        sums = [x.new_zeros(x.shape[1], dtype=torch.float32) for _ in around]
    if images is not None:
        x_grad, grads = images.merge(x_grad, whole_grad, branch.scale), images.factored(grads)
        if branch.scale is not None:
            sums[2] = sums[2] + images.dropped_products(whole_grad, whole)
    norm_weight_grad, norm_bias_grad, scale_grad = cast(sums, [x.dtype if value is None else value.dtype for value in around])
    return x_grad, norm_weight_grad, norm_bias_grad, None, scale_grad, *grads


class _KeptImages:
    """Stochastic depth on a CPU: the images of a batch that are kept, alone."""

    def __init__(self, drop_path: DropPath) -> None:
        self.index, self.dropped = drop_path.kept.nonzero().flatten(), (drop_path.kept == 0).nonzero().flatten()
        self.factor = drop_path.factor

    def take(self, x: Tensor) -> Tensor:
        """Of a dense x, in its layout; x itself if all are kept."""
        return _images(x, self.index) if self.dropped.numel() else x

    def merge(self, of_kept: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
        """All images: what is given for those that are kept, scale o x, which is dense, for the others."""
        if not self.dropped.numel():
            return of_kept
        y, others = torch.empty_like(x), _images(x, self.dropped)
        others = others if scale is None else (others * scale[:, None, None]).to(x.dtype)
        for index, images in ((self.index, of_kept), (self.dropped, others)):
            _as_rows(y).index_copy_(0, index, _as_rows(modes.like(images, x)))
        return y

    def dropped_products(self, grad: Tensor, x: Tensor) -> Tensor:
        """(C,) sums of grad o x over the images that are dropped, of a dense gradient and a dense x."""
        return (_images(grad, self.dropped).float() * _images(x, self.dropped)).sum((0, 2, 3))

    def factored(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The tensors of a body, or their gradients, the last two times the factor: those of its last product, and so is f."""
        return [*tensors[:-2], *(None if tensor is None else tensor * self.factor for tensor in tensors[-2:])]


def _as_rows(x: Tensor) -> Tensor:
    """(B, C H W): the images of a dense tensor as they stand in memory."""
    size = math.prod(x.shape[1:])
    return x.as_strided((x.shape[0], size), (size, 1))


def _images(x: Tensor, index: Tensor) -> Tensor:
    """x[index] of a dense x, in its layout."""
    rows = _as_rows(x).index_select(0, index)
    return rows.as_strided((index.numel(), *x.shape[1:]), (rows.shape[1], *x.stride()[1:]))


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


def _normal(x: Tensor, branch: Branch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """norm(x) in a dtype, on a CPU, and the moments of x, which is dense."""
    n, moments = torch.empty_like(x, dtype=dtype), _ops.image_moments.default(x, branch.eps)
    _ops.branch_norm.default(n, x, moments, *cast((branch.norm_weight, branch.norm_bias), _WIDE * 2))
    return n, moments
