"""Images in folders, one per class, in an order and with augmentations that are functions of the seed alone.

Sample (epoch, index) is augmented by random numbers of (seed, epoch, index), and the order of an epoch is one of (seed, epoch).
Nothing depends on how many workers or processes there are, or on where a run was interrupted: there is no random state to save.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from .errors import as_value_error
from .recipe import Recipe, seed_all

Key = tuple[int, int]  # epoch, index


class Images(Dataset[tuple[Tensor, int, int]]):
    """Images by (epoch, index): the tensor (C, H, W), its class, and the index if its file is broken, else -1.

    In the place of a broken image comes the next one that is not.

    Args:
        samples: path or decoded image, and class.
        transform: from a PIL image to a tensor; its random numbers come from the global generators.
        seed: of these.

    Raises:
        OSError: TRIES images in a row are broken.
    """

    TRIES = 20

    def __init__(self, samples: Sequence[tuple[str | Image.Image, int]], transform: Callable[[Image.Image], Tensor], seed: int = 0) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int]:
        epoch, index = key
        for place in range(index, index + self.TRIES):
            source, target = self.samples[place % len(self)]
            try:
                image = _decode(source)
            except Exception:  # decoders meet broken files with errors of every kind
                continue
            seed_all(self.seed, epoch, index)
            return self.transform(image), target, -1 if place == index else index
        raise OSError(f"data: {self.TRIES} broken images in a row, from {self.samples[index][0]} on")


def _decode(source: str | Image.Image) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    with Image.open(source) as file:
        return as_rgb(file)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB of 8 bits, of 16 bits the upper ones. Raises ValueError for pixels of 32 bits, which do not tell what is white."""
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, save it with 8 or 16")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def find_images(root: Path, classes: Sequence[str] | None = None) -> tuple[list[tuple[str | Image.Image, int]], list[str]]:
    """Samples and class names of ROOT/CLASS/.../IMAGE, both sorted; with classes, those are the ones that must be there.

    Raises:
        FileNotFoundError: no such folder, no class in it or no image in a class; ValueError: other classes than wanted.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data: there is no folder {root}")
    try:
        found, index = find_classes(root)
    except FileNotFoundError:
        raise FileNotFoundError(f"data: {root} must hold one folder of images per class, it holds no folder") from None
    if classes is not None and found != list(classes):
        differ = sorted(set(found) ^ set(classes))
        raise ValueError(f"data: {root} must hold the {len(classes)} classes of the training set, differing: {', '.join(differ[:5])}")
    samples: list[tuple[str | Image.Image, int]] = list(make_dataset(root, index, IMG_EXTENSIONS, allow_empty=True))
    if empty := sorted(set(found) - {found[target] for _, target in samples}):
        raise FileNotFoundError(f"data: {root} has no image in {len(empty)} of {len(found)} classes: {', '.join(empty[:5])}")
    return samples, found


def training_transform(recipe: Recipe, model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """Random crop, flip, augmentation, normalisation and erasing of a recipe, with the model's mean, std and interpolation.

    Raises ValueError if timm has no such policy.
    """
    config = _data_config(recipe.image_size, model)
    del config["crop_pct"], config["crop_mode"]
    with as_value_error(f"recipe: augment must be a policy of timm, got {recipe.augment}"):
        transform = create_transform(
            **config,
            is_training=True,
            scale=(recipe.crop_scale, 1.0),
            hflip=recipe.flip,
            auto_augment=recipe.augment or None,
            color_jitter=recipe.color_jitter,
            re_prob=recipe.random_erasing,
            re_mode="pixel",
        )
    for policy in transform.transforms:
        for op in getattr(policy, "ops", None) or itertools.chain(*getattr(policy, "policy", ())):
            if op.aug_fn is auto_augment.posterize:
                op.level_fn = functools.partial(_a_bit_at_least, op.level_fn)
    return transform


def _a_bit_at_least(level_fn: Callable[..., tuple[int]], level: float, hparams: Any) -> tuple[int]:
    """The bits of a colour that are kept at a level: timm's scale ends at 0, which Pillow refuses from version 13 on."""
    return (max(1, *level_fn(level, hparams)),)


def evaluation_transform(image_size: int | None, model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """Resize, centre crop by the model's own share, and normalisation; without a size, to the model's own."""
    return create_transform(**_data_config(image_size, model))


def _data_config(image_size: int | None, model: nn.Module) -> dict[str, Any]:
    return resolve_data_config({"img_size": image_size}, model=model)


class Chunks(Sampler[list[Key]]):
    """Keys of the chunks of one process, from step `start` to the end of the training.

    A step takes the next batch_size images of its epoch's permutation, cut into chunks of micro_batch; process r of n takes the
    r-th n-th of them. What does not fill a batch at the end of an epoch is left for another epoch.

    Raises:
        ValueError: fewer images than a batch, or chunks that n processes cannot share.
    """

    def __init__(self, images: int, recipe: Recipe, rank: int = 0, world: int = 1) -> None:
        if images < recipe.batch_size:
            raise ValueError(f"recipe: batch_size must be at most the {images} training images, got {recipe.batch_size}")
        if recipe.batch_size % (recipe.micro_batch * world):
            raise ValueError(
                f"recipe: batch_size must be a multiple of micro_batch {recipe.micro_batch} x {world} processes, got {recipe.batch_size}"
            )
        self.images, self.recipe = images, recipe
        self.steps_per_epoch = images // recipe.batch_size
        self.steps = recipe.epochs * self.steps_per_epoch
        self.start = 0
        self.per_step = recipe.batch_size // recipe.micro_batch // world
        self.first = rank * self.per_step

    def __iter__(self) -> Iterator[list[Key]]:
        for epoch in range(self.start // self.steps_per_epoch, self.recipe.epochs):
            random_of_epoch = torch.Generator().manual_seed(random.Random(repr((self.recipe.seed, epoch))).getrandbits(32))
            order = torch.randperm(self.images, generator=random_of_epoch).tolist()
            for step in range(max(self.start - epoch * self.steps_per_epoch, 0), self.steps_per_epoch):
                for chunk in range(self.first, self.first + self.per_step):
                    place = step * self.recipe.batch_size + chunk * self.recipe.micro_batch
                    yield [(epoch, index) for index in order[place : place + self.recipe.micro_batch]]

    def __len__(self) -> int:
        return (self.steps - self.start) * self.per_step
