"""What SPANet is compared with: the published network as it computes, the models of timm, the global filter of GFNet.

The published network is written here a second time, masks, shifts and complex transforms included, under the parameter names
of its checkpoints: it takes the state of ours, so that both compute the same function.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from spanet_kernels import modes, reference

LAMS = (0.7, 0.8, 0.9)
BOUNDARY = 1 / 3


class Filter(nn.Module):
    """fft2, shift, mask, shift, ifft2; through fp32 for 16-bit input, which the transforms refuse."""

    def __init__(self, radius: float, lam: float) -> None:
        super().__init__()
        self.radius, self.lam = radius, lam
        self.masks: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        dtype = modes.profile_dtype(x.dtype)
        key = (x.shape[2], x.shape[3], dtype, x.device)
        if key not in self.masks:
            mask = reference.spectral_mask(self.lam, self.radius, BOUNDARY, x.shape[2], x.shape[3])
            self.masks[key] = torch.fft.fftshift(mask).to(x.device, dtype)
        return reference.published_chain(x.to(dtype), self.masks[key]).to(x.dtype)


class Mixer(nn.Module):
    def __init__(self, dim: int, radius: float) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim, (1, 7), padding=(0, 3), groups=dim), nn.Conv2d(dim, dim, (7, 1), padding=(3, 0), groups=dim)
        )
        self.sps = nn.ModuleList(Filter(radius, lam) for lam in LAMS)
        self.pws = nn.ModuleList(nn.Conv2d(len(chunk), dim, 1) for chunk in torch.empty(dim).chunk(len(LAMS)))
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(self.proj_in(x))
        context = sum(pw(sp(part)) for part, sp, pw in zip(z.chunk(len(self.pws), 1), self.sps, self.pws, strict=True))
        return self.proj_out(z * context)


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, 4 * dim, 1), nn.Conv2d(4 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None]


class Block(nn.Module):
    def __init__(self, dim: int, radius: float, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, dim), nn.GroupNorm(1, dim)
        self.token_mixer, self.mlp = Mixer(dim, radius), Mlp(dim)
        self.res_scale1, self.res_scale2 = (Scale(dim) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_scale1(x) + self.token_mixer(self.norm1(x))
        return self.res_scale2(x) + self.mlp(self.norm2(x))


class Downsample(nn.Module):
    def __init__(self, channels: int, dim: int, size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PublishedSPANet(nn.Module):
    """(B, 3, H, W) to (B, 1000), the function of the published code at any size; the published one has masks for 224 x 224 alone."""

    def __init__(self, depths: tuple[int, ...], dims: tuple[int, ...]) -> None:
        super().__init__()
        self.patch_embed = Downsample(3, dims[0], 7, 4, 2)
        layers: list[nn.Module] = []
        for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            if stage:
                layers.append(Downsample(dims[stage - 1], dim, 3, 2, 1))
            layers.append(nn.Sequential(*(Block(dim, (2, 2, 1, 1)[stage], stage >= 2) for _ in range(depth))))
        self.network = nn.ModuleList(layers)
        self.norm, self.head = nn.GroupNorm(1, dims[-1]), nn.Linear(dims[-1], 1000)
        self.feature_info = [{"module": f"network.{2 * stage}", "reduction": 4 << stage} for stage in range(len(dims))]

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.network:
            x = layer(x)
        return self.head(self.norm(x).mean((2, 3)))


def global_filter(x: Tensor, weight: Tensor) -> Tensor:
    """The layer of GFNet (arXiv 2107.00645) on its tokens (B, H, W, C): rfft2, a complex weight (C, H, W // 2 + 1), irfft2, in fp32."""
    tokens = x.permute(0, 2, 3, 1).to(modes.profile_dtype(x.dtype)).contiguous()
    spectrum = torch.fft.rfft2(tokens, dim=(1, 2), norm="ortho") * weight.permute(1, 2, 0)
    filtered = torch.fft.irfft2(spectrum, s=x.shape[2:], dim=(1, 2), norm="ortho")
    return filtered.to(x.dtype).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Peer:
    """A model by timm's name; top-1 of ImageNet-1K training at 224 x 224, as the paper's tables or its own paper state it."""

    title: str
    top1: float
    quick: bool = False
    published: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # depths and dims of the published SPANet


S, B = (64, 128, 320, 512), (96, 192, 384, 768)
MODELS = {
    "spanet_small": Peer("SPANet-S", 83.1, quick=True),
    "published_small": Peer("published S", 83.1, quick=True, published=((4, 4, 12, 4), S)),
    "poolformer_s24": Peer("PoolFormer-S24", 80.3, quick=True),
    "convnext_tiny": Peer("ConvNeXt-T", 82.1, quick=True),
    "swin_tiny_patch4_window7_224": Peer("Swin-T", 81.3, quick=True),
    "focalnet_tiny_srf": Peer("FocalNet-T", 82.1, quick=True),
    "pvt_v2_b2": Peer("PVTv2-B2", 82.0, quick=True),
    "resnet50": Peer("RSB-ResNet-50", 79.8, quick=True),
    "spanet_medium": Peer("SPANet-M", 83.5),
    "published_medium": Peer("published M", 83.5, published=((6, 6, 18, 6), S)),
    "poolformer_s36": Peer("PoolFormer-S36", 81.4),
    "convnext_small": Peer("ConvNeXt-S", 83.1),
    "swin_small_patch4_window7_224": Peer("Swin-S", 83.0),
    "focalnet_small_srf": Peer("FocalNet-S", 83.4),
    "resnet101": Peer("RSB-ResNet-101", 81.3),
    "spanet_mediumx": Peer("SPANet-MX", 83.8),
    "published_mediumx": Peer("published MX", 83.8, published=((8, 8, 24, 8), S)),
    "spanet_base": Peer("SPANet-B", 84.0),
    "published_base": Peer("published B", 84.0, published=((6, 6, 18, 6), B)),
    "poolformer_m36": Peer("PoolFormer-M36", 82.1),
    "convnext_base": Peer("ConvNeXt-B", 83.8),
    "swin_base_patch4_window7_224": Peer("Swin-B", 83.5),
    "focalnet_base_srf": Peer("FocalNet-B", 83.7),
    "resnet152": Peer("RSB-ResNet-152", 81.8),
    "vit_base_patch16_224": Peer("ViT-B/16", 79.7),
    "spanet_basex": Peer("SPANet-BX", 84.4),
    "published_basex": Peer("published BX", 84.4, published=((8, 8, 24, 8), B)),
    "poolformer_m48": Peer("PoolFormer-M48", 82.5),
}


def is_ours(name: str) -> bool:
    return name.startswith("spanet_")


@functools.lru_cache(maxsize=2)
def create(name: str, size: int) -> nn.Module:
    """A model of MODELS for images of size x size, with random weights that bf16 holds and nothing dropped; not to be changed.

    The published network shares the weights of ours. Raises RuntimeError where a model has no form for that size.
    """
    torch.manual_seed(0)
    published = MODELS[name].published
    if published:
        with torch.device("meta"):
            model: nn.Module = PublishedSPANet(*published)
        model.load_state_dict(create(name.replace("published", "spanet"), size).state_dict(), assign=True)
        return model.eval()
    import spanet  # noqa: F401  registers the models

    fixed = size != 224 and name.startswith(("swin", "vit"))
    model = timm.create_model(name, drop_path_rate=0.0, **({"img_size": size} if fixed else {})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model
