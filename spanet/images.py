"""Photographs: from files and folders to a model's input, and back to pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from .data import as_rgb, evaluation_transform
from .errors import as_value_error
from .runs import replacing

ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE}  # of pictures that can be written


def read_image(path: Path, upright: bool = True) -> Image.Image:
    """The image of a file, `as_rgb`, turned as its EXIF data tell unless not upright. Raises ValueError if none can be read."""
    with as_value_error(f"{path}: not an image that can be read"), Image.open(path) as image:
        return as_rgb(ImageOps.exif_transpose(image) if upright else image)


def image_files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder whose names end as images' do, sorted. Raises ValueError if there are none."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in endings)
    if not found:
        raise ValueError(f"{path}: no image in this folder")
    return found


def read_input(model: nn.Module, path: Path, size: int | None = None) -> Tensor:
    """(1, 3, S, S) what the model is evaluated on, of one file. Raises ValueError if no image can be read from it."""
    return evaluation_transform(size, model)(read_image(path))[None]


def read_images(model: nn.Module, path: Path, size: int | None = None) -> Iterator[Tensor]:
    """`read_input` of a file, or of each of a folder's."""
    return (read_input(model, file, size) for file in image_files(path))


def save_picture(picture: Figure | Image.Image, path: Path, **options: Any) -> None:
    """Write a picture in one step, in the format that its ending tells. Raises OSError if it cannot be written."""
    with replacing(path) as file:
        if isinstance(picture, Image.Image):
            picture.save(file, Image.registered_extensions()[path.suffix.lower()], **options)
        else:
            picture.savefig(file, format=path.suffix[1:].lower(), dpi=100, facecolor="white", **options)


def as_picture(model: nn.Module, x: Tensor) -> Tensor:
    """(S, S, 3) on a scale of 0 to 1 from a model's input (1, 3, S, S): the normalization undone."""
    config = resolve_data_config({}, model=model)
    return (x[0].permute(1, 2, 0) * torch.tensor(config["std"]) + torch.tensor(config["mean"])).clamp(0, 1)
