"""The token mixer as the published code computes it, FFTs, masks and all: the judge of the layer."""

from __future__ import annotations

import torch
from torch import nn

from spanet_kernels import reference


class PublishedSPF(nn.Module):
    def __init__(self, height, width, r, lamb):
        super().__init__()
        mask = torch.fft.fftshift(reference.spectral_mask(lamb, r, 1 / 3, height, width))[None].float()
        self.filter = nn.Parameter(mask, requires_grad=False)

    def forward(self, x):
        spectrum = torch.fft.fftshift(torch.fft.fft2(x, dim=(2, 3), norm="ortho"), dim=(2, 3))
        return torch.fft.ifft2(torch.fft.ifftshift(spectrum * self.filter, dim=(2, 3)), dim=(2, 3), norm="ortho").real


class PublishedSPAM(nn.Module):
    """Of fixed size, float32 and float64 only."""

    def __init__(self, dim, k_size, height, width, r, lams=(0.7, 0.8, 0.9)):
        super().__init__()
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim, (1, k_size), padding=(0, k_size // 2), groups=dim),
            nn.Conv2d(dim, dim, (k_size, 1), padding=(k_size // 2, 0), groups=dim),
        )
        sizes = [len(chunk) for chunk in torch.empty(dim).chunk(len(lams))]
        self.sps = nn.ModuleList(PublishedSPF(height, width, r, lam) for lam in lams)
        self.pws = nn.ModuleList(nn.Conv2d(size, dim, 1) for size in sizes)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        z = self.conv(self.proj_in(x))
        gates = zip(z.chunk(len(self.pws), 1), self.sps, self.pws, strict=True)
        return self.proj_out(z * sum(pw(sp(chunk)) for chunk, sp, pw in gates))
