"""A backbone with a feature pyramid (FPN, arXiv 1612.03144) on its last stages: what the dense tasks share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from .errors import as_value_error


def check_classes(num_classes: int) -> int:
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return num_classes


class PyramidBackbone(nn.Module):
    """Stages of a registered model; each goes through a 1x1 and a 3x3 convolution, both with bias, to 256 channels.

    Args:
        name: of a model that timm knows; importing `spanet` registers the SPANets.
        stages: which feature maps to take, 0 the finest.
        extra: makes the module that appends coarser levels, from the channels of the last stage and of the pyramid.
        options: of `timm.create_model`, such as drop_path_rate.

    Shape: (B, 3, H, W) to a dictionary of maps (B, 256, h, w), the finest first, named "0", "1" and so on.

    Raises:
        ValueError: an unknown name, stages that the model lacks, options that it does not take.
    """

    out_channels = 256
    features: Any  # timm's extractor: a module with feature_info and pretrained_cfg

    def __init__(
        self, name: str, stages: tuple[int, ...], extra: Callable[[int, int], ExtraFPNBlock] | None = None, **options: Any
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise ValueError(f"name must be a registered model such as spanet_small, got {name!r}")
        with as_value_error(f"model: {name} is no backbone of stages {stages} with {options}"):
            self.features = timm.create_model(name, features_only=True, out_indices=stages, **options)
        self.channels: list[int] = self.features.feature_info.channels()
        self.pyramid = FeaturePyramidNetwork(self.channels, self.out_channels, extra and extra(self.channels[-1], self.out_channels))

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the images that the backbone was made for, on a scale of 0 to 1."""
        return self.features.pretrained_cfg["mean"], self.features.pretrained_cfg["std"]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels: dict[str, Tensor] = self.pyramid({str(index): stage for index, stage in enumerate(self.features(x))})
        return levels


def load_task(model: nn.Module, path: Path) -> None:
    """Load a file with all weights of a task's model; `checkpoint.load_checkpoint` takes one of its backbone.

    Raises:
        ValueError: it is missing, cannot be read or does not fit.
    """
    with as_value_error(f"checkpoint: {path} does not fit {type(model).__name__}"):
        model.load_state_dict(load_state_dict(str(path), weights_only=True))
