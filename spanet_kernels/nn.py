"""Modules: the spectral pooling filter `SPF`, and the mixer `SPAM`, all of SPANet that is not standard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from . import modes
from .ops.axial_conv import axial_conv
from .ops.radial_filter import spectral_pool
from .ops.spectral_gate import spectral_gate


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


class SPAM(nn.Module):
    """Spectral pooling aggregation modulation, the token mixer of SPANet (arXiv 2308.11568, section 3.3).

    z = conv_kx1(conv_1xk(proj_in(x))),  out = proj_out(z o sum_i W_i SPF_i(z_i) + b_i), z_i the i-th channel chunk of z.
    The function and the parameter names of the published layer; its masks are a function of lams, radius and boundary.

    Args:
        dim: channels.
        kernel_size: k of the two depthwise convolutions, odd.
        lams: weight of the low frequencies of each gate; its length is the number of gates. Empty: one gate without a filter.
        radius: of the low-pass disc, in cycles per image.
        boundary: weight on the circle d == radius; the published code's 1/3, or None for the paper's 1 - lam.
        learnable: make lams a parameter.

    Shape: (B, dim, H, W) to the same, any size, dtype and layout.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        lams: Sequence[float] = (0.7, 0.8, 0.9),
        radius: float = 2,
        boundary: float | None = 1 / 3,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"SPAM: kernel_size must be odd, got {kernel_size}")
        self.radius = radius
        self.boundary = boundary
        self.lams = nn.Parameter(torch.tensor(lams)) if learnable else tuple(lams)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        pad = kernel_size // 2
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim, (1, kernel_size), padding=(0, pad), groups=dim),
            nn.Conv2d(dim, dim, (kernel_size, 1), padding=(pad, 0), groups=dim),
        )
        chunks = torch.empty(dim).chunk(max(len(lams), 1))
        if len(lams) > len(chunks):
            raise ValueError(f"SPAM: dim must give each of {len(lams)} gates a channel, got {dim}")
        self.pws = nn.ModuleList(nn.Conv2d(len(chunk), dim, 1) for chunk in chunks)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(x)
        base, gain, squared = self._profile(x)
        row, column = cast(tuple[nn.Conv2d, nn.Conv2d], tuple(self.conv))
        pws = cast(list[nn.Conv2d], list(self.pws))
        radius = None if squared < 0 else squared**0.5
        z, coefficients = axial_conv(x, row.weight, row.bias, column.weight, column.bias, radius)
        weight = torch.cat([pw.weight for pw in pws], 1)[:, :, 0, 0]
        bias = torch.stack([pw.bias for pw in pws if pw.bias is not None]).sum(0)
        y: Tensor = self.proj_out(spectral_gate(z, weight.to(z.dtype), bias.to(z.dtype), base, gain, radius, coefficients))
        return y

    def _profile(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """base (C,), gain (S, C) and squared radius of all gates' filters together; -1 without filters."""
        dtype, channels = modes.profile_dtype(x.dtype), x.shape[1]
        lams = torch.as_tensor(self.lams, dtype=dtype, device=x.device)
        if not len(lams):
            return x.new_ones(channels, dtype=dtype), x.new_empty(0, channels, dtype=dtype), -1
        sizes = [cast(nn.Conv2d, pw).in_channels for pw in self.pws]
        per_channel = torch.cat([lam.expand(size) for lam, size in zip(lams, sizes, strict=True)])
        return modes.pooling_profile(per_channel, self.radius, self.boundary, x.shape[2], x.shape[3])

    def extra_repr(self) -> str:
        return f"lams={self.lams}, radius={self.radius}, boundary={self.boundary}"
