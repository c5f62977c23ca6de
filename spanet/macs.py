"""Multiply-adds of a model, the MACs of the paper's tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spanet_kernels import SPAM

from .model import Mlp


def count_macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of all convolutions and linear layers of model for x; a model on the meta device computes nothing.

    Norms, filters, products of maps and attention are not counted, as in the paper.
    """
    count = 0

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal count
        # mixer and MLP run their convolutions as one operator, each on as many pixels as come out
        weights = [part.weight for part in layer.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
        pixels = output[0, 0].numel() if output.dim() == 4 else 1
        count += len(output) * pixels * sum(weight.numel() for weight in weights)

    hooks = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, SPAM | Mlp | nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return count
