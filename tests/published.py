"""SPANet as the published code computes it, of a fixed size, with FFTs and masks that are part of the state: the judge of the models."""

from __future__ import annotations

import torch
from published_layer import PublishedSPAM
from torch import nn
from torch.nn import functional


class Projection(nn.Module):
    def __init__(self, *conv):
        super().__init__()
        self.proj = nn.Conv2d(*conv)

    def forward(self, x):
        return self.proj(x)


class Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.scale.view(1, -1, 1, 1)


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class PublishedBlock(nn.Module):
    def __init__(self, dim, radius, height, width, scaled):
        super().__init__()
        self.norm1 = nn.GroupNorm(1, dim)
        self.token_mixer = PublishedSPAM(dim, 7, height, width, radius)
        self.norm2 = nn.GroupNorm(1, dim)
        self.mlp = MLP(dim)
        if scaled:
            self.res_scale1 = Scale(dim)
            self.res_scale2 = Scale(dim)
        self.scaled = scaled

    def forward(self, x):
        y = self.token_mixer(self.norm1(x)) + (self.res_scale1(x) if self.scaled else x)
        return self.mlp(self.norm2(y)) + (self.res_scale2(y) if self.scaled else y)


class PublishedSPANet(nn.Module):
    """Its features() are those of the code for dense tasks, through norm0, norm2, norm4 and norm6; these exist if dense."""

    def __init__(self, depths, dims, image=(224, 224), classes=1000, dense=False):
        super().__init__()
        self.patch_embed = Projection(3, dims[0], 7, 4, 2)
        height, width = ((size - 3) // 4 + 1 for size in image)
        layers = []
        for stage, (depth, dim, radius) in enumerate(zip(depths, dims, (2, 2, 1, 1), strict=True)):
            if stage:
                layers.append(Projection(dims[stage - 1], dim, 3, 2, 1))
                height, width = (height + 1) // 2, (width + 1) // 2
            layers.append(nn.Sequential(*(PublishedBlock(dim, radius, height, width, stage > 1) for _ in range(depth))))
        self.network = nn.ModuleList(layers)
        self.dense = dense
        if dense:
            for stage, dim in enumerate(dims):
                setattr(self, f"norm{2 * stage}", nn.GroupNorm(1, dim))
        else:
            self.norm = nn.GroupNorm(1, dims[-1])
            self.head = nn.Linear(dims[-1], classes)

    def features(self, x):
        x = self.patch_embed(x)
        features = []
        for index, layer in enumerate(self.network):
            x = layer(x)
            if index % 2 == 0:
                features.append(getattr(self, f"norm{index}")(x) if self.dense else x)
        return features

    def forward(self, x):
        return self.head(self.norm(self.features(x)[-1]).mean((2, 3)))
