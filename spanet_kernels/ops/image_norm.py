"""The norm of a residual branch on GPUs: a GroupNorm with one group in the layout of its input, which PyTorch's there is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import modes
from ..products import Branch
from .autograd import by_composition

_norm = torch.ops.spanet_kernels.image_norm.default
_gradient = torch.ops.spanet_kernels.image_norm_backward.default


def normalised(branch: Branch, x: Tensor) -> Tensor:
    """norm(x) of a branch, in the layout of x; graphs of torch.compile, which fuses it, and CPUs leave it to PyTorch."""
    if branch.norm_weight is None or not x.is_cuda or torch.compiler.is_compiling():
        return branch.normalised(x)
    y: Tensor = _call(x, branch.norm_weight, branch.norm_bias, branch.eps)[0]
    return y


def _gradients(grad: Tensor, needed: Any, by_products: tuple[Tensor, ...], x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_gradient(grad, x, *by_products, weight), None


def _composition(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    wide = modes.profile_dtype(x.dtype)
    return (modes.like(functional.group_norm(x.to(wide), 1, weight.to(wide), bias.to(wide), eps).to(x.dtype), x),)


_call = by_composition(_norm, _gradient, _gradients, _composition)


@torch.library.register_fake("spanet_kernels::image_norm")
def _norm_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=modes.memory_format(x)), x.new_empty((x.shape[0], 2), dtype=modes.profile_dtype(x.dtype))


@torch.library.register_fake("spanet_kernels::image_norm_backward")
def _gradient_fake(grad: Tensor, x: Tensor, moments: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, memory_format=modes.memory_format(x)), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.register_fake("spanet_kernels::column_sums")
def _sums_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=modes.profile_dtype(x.dtype))
