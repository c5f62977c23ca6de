"""Photographs in: files, folders, and what a model wants of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn


def read_image(path: Path) -> Image.Image:
    """The image of a file, as RGB. Raises ValueError if there is none that can be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image that can be read: {error}") from error


def image_files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder whose names end as images' do, sorted. Raises ValueError if there are none."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    endings = Image.registered_extensions()
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in endings)
    if not found:
        raise ValueError(f"{path}: no image in this folder")
    return found


def preprocessing(model: nn.Module, size: int | None = None) -> Callable[[Image.Image], Tensor]:
    """What the model was made for: resize, square centre crop of `size` (the model's own without), normalization."""
    return create_transform(**resolve_data_config({"img_size": size}, model=model))


def read_images(model: nn.Module, path: Path, size: int | None = None) -> Iterator[Tensor]:
    """(1, 3, S, S) input of the model for one file or each of a folder's."""
    transform = preprocessing(model, size)
    for file in image_files(path):
        yield transform(read_image(file))[None]
