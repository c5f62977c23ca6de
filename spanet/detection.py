"""Object detection and instance segmentation: RetinaNet and Mask R-CNN of torchvision on a registered backbone.

Both take a list of images (3, H, W) on a scale of 0 to 1 and, in training, a list of targets with `boxes` (N, 4) in
pixels as x1, y1, x2, y2, `labels` (N,) and, for Mask R-CNN, `masks` (N, H, W); they return a dictionary of losses in
training and one dictionary per image with `boxes`, `labels`, `scores` (and `masks`) in evaluation. They normalize,
scale and pad the images themselves.

Counts of SPANet's table, with the 80 classes of COCO: RetinaNet 38M for S and 51M for M, Mask R-CNN 48M and 61M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms.functional import pil_to_tensor, to_pil_image, to_tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from .errors import as_value_error
from .pyramid import PyramidBackbone, check_classes


def retinanet(name: str, num_classes: int = 80, min_size: int = 800, max_size: int = 1333, **backbone: Any) -> RetinaNet:
    """RetinaNet (arXiv 1708.02002): FPN on the last 3 stages, 2 extra levels by strided convolutions from the last stage.

    Args:
        name: of the backbone, such as spanet_small.
        num_classes: of objects; their labels are 0 to num_classes - 1.
        min_size, max_size: images are scaled so that the shorter side is min_size, or the longer one max_size.
        backbone: options of `timm.create_model`, such as drop_path_rate or pretrained.

    Raises:
        ValueError: an unknown name, no classes.
    """
    pyramid = PyramidBackbone(name, (1, 2, 3), LastLevelP6P7, **backbone)
    mean, std = pyramid.normalization
    return RetinaNet(pyramid, check_classes(num_classes), min_size=min_size, max_size=max_size, image_mean=mean, image_std=std)


def mask_rcnn(name: str, num_classes: int = 80, min_size: int = 800, max_size: int = 1333, **backbone: Any) -> MaskRCNN:
    """Mask R-CNN (arXiv 1703.06870): FPN on the 4 stages and a fifth level by subsampling.

    Arguments and errors are those of `retinanet`; labels are 1 to num_classes, for 0 is the background.
    """
    pyramid = PyramidBackbone(name, (0, 1, 2, 3), lambda *_: LastLevelMaxPool(), **backbone)
    mean, std = pyramid.normalization
    return MaskRCNN(pyramid, check_classes(num_classes) + 1, min_size=min_size, max_size=max_size, image_mean=mean, image_std=std)


@torch.inference_mode()
def detect(model: RetinaNet | MaskRCNN, image: Image.Image) -> dict[str, Tensor]:
    """What a model finds in one photograph: boxes, labels, scores and, of Mask R-CNN, masks.

    Raises ValueError if the photograph, scaled to the model's min_size and max_size, has no pixels or not those of the backbone.
    """
    scale = (
        f"{image.height} x {image.width} pixels, scaled to min_size {model.transform.min_size[0]} and max_size {model.transform.max_size}"
    )
    with as_value_error(f"size: {type(model).__name__} does not take a photograph of {scale}"):
        found = model.eval()([to_tensor(image.convert("RGB")).to(next(model.parameters()))])[0]
    return {name: values.cpu() for name, values in found.items()}


def draw_detections(
    image: Image.Image, found: dict[str, Tensor], names: Sequence[str] | None = None, threshold: float = 0.5
) -> Image.Image:
    """The photograph with one image's boxes, labels, scores and masks, of those that score at least the threshold.

    names: of the labels; the labels' numbers without.
    """
    keep = found["scores"] >= threshold
    if not keep.any():
        return image.convert("RGB")
    labels = [
        f"{names[label] if names else label} {score:.2f}" for label, score in zip(found["labels"][keep], found["scores"][keep], strict=True)
    ]
    pixels = pil_to_tensor(image.convert("RGB"))
    if "masks" in found:
        pixels = draw_segmentation_masks(pixels, found["masks"][keep, 0] >= 0.5, alpha=0.6)
    return to_pil_image(draw_bounding_boxes(pixels, found["boxes"][keep], labels, width=2))
