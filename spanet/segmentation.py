"""Semantic segmentation: Semantic FPN (arXiv 1901.02446) on a registered backbone.

    pyramid = FPN(stages 1 - 4)                                        256 channels, strides 4, 8, 16, 32
    level i -> max(1, i) times (conv 3x3, BatchNorm, ReLU, up by 2)    128 channels, stride 4; no "up" for level 0
    logits = up by 4 (conv 1x1 (dropout (sum of the levels)))

These conventions give the counts of SPANet's table, 32.36M parameters and 45.51G multiply-adds for S, 45.44M and 56.93G
for M, at 512 x 512 with 150 classes: the pyramid's convolutions and the classifier have biases, the head's convolutions,
each before a BatchNorm, have none; the multiply-adds are those of convolutions, without norms and interpolation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.functional import normalize, pil_to_tensor, resize, to_pil_image, to_tensor
from torchvision.utils import draw_segmentation_masks

from .errors import as_value_error
from .pyramid import PyramidBackbone, check_classes

IGNORE = 255


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """x (B, C, h, w) bilinearly to a height and width, pixel areas aligned."""
    return functional.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class SemanticFPN(nn.Module):
    """A backbone, a feature pyramid and a head that brings all levels to stride 4 and sums them.

    Shape: (B, 3, H, W), normalized, to logits (B, num_classes, H, W), any H and W that the backbone takes.
    """

    def __init__(self, backbone: PyramidBackbone, num_classes: int, channels: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.backbone = backbone
        self.levels = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(channels if step else backbone.out_channels, channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                )
                for step in range(max(1, level))
            )
            for level in range(len(backbone.channels))
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        maps = list(self.backbone(x).values())
        total = torch.zeros((), dtype=maps[0].dtype, device=x.device)
        for level, y in enumerate(maps):
            for step, block in enumerate(cast(nn.ModuleList, self.levels[level])):
                y = block(y)
                if level:
                    y = upsample(y, maps[level - step - 1].shape[2:])
            total = total + y
        return upsample(self.classifier(self.dropout(total)), x.shape[2:])


def semantic_fpn(name: str, num_classes: int = 150, **backbone: Any) -> SemanticFPN:
    """Semantic FPN on a registered model; 150 classes are those of ADE20K.

    Args:
        name: of the backbone, such as spanet_small.
        num_classes: channels of the result.
        backbone: options of `timm.create_model`, such as drop_path_rate or pretrained.

    Raises:
        ValueError: an unknown name, no classes.
    """
    return SemanticFPN(PyramidBackbone(name, (0, 1, 2, 3), **backbone), check_classes(num_classes))


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy over the pixels that have a label, 0 if none has; target (B, H, W) integers, 255 where there is no label."""
    return functional.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum") / (target != IGNORE).sum().clamp(min=1)


@torch.inference_mode()
def segment(model: SemanticFPN, image: Image.Image, size: int = 512) -> Tensor:
    """(H, W) class of each pixel of a photograph, seen by the model with its shorter side scaled to `size` pixels.

    Raises ValueError if the model does not take an image of this size.
    """
    x = normalize(to_tensor(resize(image.convert("RGB"), size)), *model.backbone.normalization)
    with as_value_error(f"size: the backbone does not take an image of {x.shape[1]} x {x.shape[2]}"):
        logits = model.eval()(x[None].to(model.classifier.weight))
    return upsample(logits, (image.height, image.width)).argmax(1)[0].cpu()


def draw_segmentation(image: Image.Image, classes: Tensor, alpha: float = 0.6) -> Image.Image:
    """The photograph under the colours of its classes, a class's the same in every picture; classes (H, W) of the image's size."""
    present = classes.unique()
    colours = (present[:, None] + 1) * torch.tensor([2**25 - 1, 2**15 - 1, 2**21 - 1]) % 255
    masks = classes == present[:, None, None]
    return to_pil_image(draw_segmentation_masks(pil_to_tensor(image.convert("RGB")), masks, alpha, [tuple(c) for c in colours.tolist()]))
