"""Multiply-adds of a model, the MACs of the paper's tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def count_macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of all convolutions and linear layers of model for x; a model on the meta device computes nothing.

    Norms, filters, products of maps and attention are not counted, as in the paper.
    """
    count = 0

    def add(layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal count
        count += output.numel() // len(layer.weight) * layer.weight.numel()

    hooks = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return count
