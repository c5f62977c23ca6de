"""A training recipe: every choice that the result depends on, as a flat YAML file. The defaults are the ImageNet recipe of SPANet-S."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin, get_type_hints

import numpy as np
import timm
import torch
import yaml
from torch import nn

from .errors import as_value_error

R = TypeVar("R")
RECIPES = Path(__file__).parent / "recipes"
_RANGES = {
    **dict.fromkeys(("epochs", "batch_size", "micro_batch", "image_size", "checkpoint_steps"), (1, math.inf)),
    **dict.fromkeys(("lr", "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "color_jitter", "mixup", "cutmix"), (0, math.inf)),
    **dict.fromkeys(("drop_path_rate", "ema", "crop_scale", "flip", "random_erasing", "label_smoothing"), (0, 1)),
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Numbers of the machine (workers, devices) are not part of it.

    One step sees `batch_size` images, cut into chunks of `micro_batch`, which the processes share evenly: two processes, or one
    that accumulates two chunks, do the same arithmetic. Source of the values: arXiv 2308.11568, section 4.1.
    """

    model: str = "spanet_small"
    """registered name, of spanet or of timm"""
    model_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of the model"""
    weights: str | None = None
    """checkpoint to start from; its head is kept if both have as many classes as the model by default"""
    drop_path_rate: float = 0.1
    image_size: int = 224

    epochs: int = 300
    batch_size: int = 1024
    micro_batch: int = 128
    optimizer: str = "adamw"
    lr: float = 1e-3
    """at `batch_size`, taken as it stands"""
    weight_decay: float = 0.05
    scheduler: str = "cosine"
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    amp: bool = True
    """forward passes in bfloat16"""
    ema: float = 0.0
    """decay of averaged weights, which are then the ones evaluated; 0 is without"""

    augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of the policy; empty is none"""
    crop_scale: float = 0.08
    """smallest share of an image's area that a training crop takes"""
    flip: float = 0.5
    color_jitter: float = 0.4
    """where `augment` is empty"""
    random_erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1

    seed: int = 0
    checkpoint_steps: int = 1000
    """steps between checkpoints inside an epoch; the end of an epoch always writes one"""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)
        if self.batch_size % self.micro_batch:
            raise ValueError(f"recipe: batch_size must be a multiple of micro_batch {self.micro_batch}, got {self.batch_size}")
        if self.mixes and self.micro_batch % 2:
            raise ValueError(f"recipe: micro_batch must be even where mixup or cutmix is on, got {self.micro_batch}")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


def check_ranges(recipe: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raises ValueError for a value of a recipe that is not within the range of its name."""
    for name, (least, most) in ranges.items():
        if not least <= (value := getattr(recipe, name)) <= most:
            wanted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"recipe: {name} must be {wanted}, got {value}")


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_recipe(config: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a YAML file or of a name in `recipe_names()`, with `key=value` overrides; errors as of `read_recipe`."""
    return read_recipe(Recipe, RECIPES, config, overrides)


def read_recipe(kind: type[R], folder: Path, config: str | Path, overrides: Iterable[str]) -> R:
    """A recipe, a dataclass, from a YAML file or a name in `recipe_names(folder)`, with `key=value` overrides.

    Raises:
        FileNotFoundError: config is neither; ValueError: no YAML, unknown or missing keys, wrong types or values out of range.
    """
    names = recipe_names(folder)
    path = folder / f"{config}.yaml" if config in names else Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"config: {config} is neither a file nor one of {', '.join(names)}")
    with as_value_error(f"config: {config} is not YAML"):
        values = yaml.safe_load(path.read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"config: {config} must hold `key: value` lines, got a {type(values).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"set: must be key=value, got {override}")
        with as_value_error(f"set: {override} is not YAML behind the equals sign"):
            values[key] = yaml.safe_load(value)
    hints = get_type_hints(kind)
    typed = {str(key): _typed(hints, str(key), value) for key, value in values.items()}
    required = [f.name for f in fields(cast(Any, kind)) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in typed]:
        raise ValueError(f"recipe: {', '.join(missing)} must be given")
    return kind(**typed)


def _typed(hints: Mapping[str, Any], key: str, value: Any) -> Any:
    """value as the type of the field; YAML reads 1e-3, without a point, as text."""
    if key not in hints:
        near = difflib.get_close_matches(key, hints, n=1, cutoff=0)[0]
        raise ValueError(f"recipe: unknown key {key}, the nearest known one is {near}")
    if key == "weights" and value is None:
        return None
    wanted = str if key == "weights" else get_origin(hints[key]) or hints[key]
    if wanted is str and value is None:  # `augment:` with nothing behind it
        return ""
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not wanted:
        raise ValueError(f"recipe: {key} must be of type {wanted.__name__}, got {value!r}")
    return value


def build(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's model, initialised from its seed or from its weights file, which may lack a head of this size.

    Raises:
        ValueError: no registered model has this name, or it does not take the recipe's model_args or weights;
        FileNotFoundError: there are no such weights.
    """
    if not timm.is_model(recipe.model):
        raise ValueError(f"recipe: model must be a registered name, got {recipe.model}")
    if "num_classes" in recipe.model_args:
        raise ValueError(f"recipe: model_args must leave num_classes to the data, got {recipe.model_args}")
    if nothing := [key for key, value in recipe.model_args.items() if value is None]:
        raise ValueError(f"recipe: model_args must have values, got none for {', '.join(nothing)}; boundary: paper is that of 1 - lam")
    if recipe.weights and not Path(recipe.weights).is_file():
        raise FileNotFoundError(f"recipe: weights must be a file, there is no {recipe.weights}")
    arguments = {"num_classes": num_classes, "drop_path_rate": recipe.drop_path_rate, **recipe.model_args}
    if recipe.weights:
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"file": recipe.weights}}
    seed_all(recipe.seed, "weights")
    given = f"model_args {recipe.model_args}" + (f" or weights {recipe.weights}" if recipe.weights else "")
    with as_value_error(f"recipe: model {recipe.model} does not take {given}"):
        return timm.create_model(recipe.model, **arguments)


def seed_all(*key: int | str) -> None:
    """Make the random state of python, numpy and torch (every device) a function of key."""
    bits = random.Random(repr(key)).getrandbits(32)
    random.seed(bits)
    np.random.seed(bits)  # noqa: NPY002  what timm draws from
    torch.manual_seed(bits)
