"""Modules: `SPF`, the spectral pooling filter as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ops.radial_filter import spectral_pool


class SPF(nn.Module):
    """Spectral pooling filter: lam for frequencies d < radius, 1 - lam for the others (arXiv 2308.11568, eqs. 5-18).

    Args:
        lam: weight of the low frequencies; a number, or a tensor of shape () or (C,) for one per channel.
        radius: of the low-pass disc, in cycles per image.
        boundary: weight on the circle d == radius; None is the paper's 1 - lam, the published code has 1/3.
        learnable: make lam a parameter; otherwise it is part of the module's description, not of its state.

    Shape: (B, C, H, W) to the same, any size, dtype and layout; the module has no activation memory of its own.

    Raises:
        what `spectral_pool` raises, on the first call.
    """

    def __init__(self, lam: float | Tensor, radius: float, boundary: float | None = None, learnable: bool = False) -> None:
        super().__init__()
        self.lam: float | Tensor
        if learnable:
            self.lam = nn.Parameter(torch.as_tensor(lam, dtype=torch.get_default_dtype()).clone())
        elif isinstance(lam, Tensor):
            self.register_buffer("lam", lam, persistent=False)
        else:
            self.lam = lam
        self.radius = radius
        self.boundary = boundary

    def forward(self, x: Tensor) -> Tensor:
        return spectral_pool(x, self.lam, self.radius, self.boundary)

    def extra_repr(self) -> str:
        lam = f"{tuple(self.lam.shape)} tensor" if isinstance(self.lam, Tensor) else self.lam
        return f"lam={lam}, radius={self.radius}, boundary={self.boundary}, learnable={isinstance(self.lam, nn.Parameter)}"
