"""Accuracy of a classifier over a folder of images, shared by any number of processes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from rich.progress import Progress
from timm.models import load_checkpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from .checkpoint import read_metadata, read_state
from .data import Images, evaluation_transform, find_images
from .errors import as_value_error
from .processes import progress_bar, rank_and_world
from .recipe import Recipe, build


@dataclass(frozen=True)
class Accuracy:
    """Shares of the images whose class is the first, or among the first five; mean cross entropy; images read and broken ones."""

    top1: float
    top5: float
    loss: float
    images: int
    broken: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images,
    batch_size: int,
    device: torch.device,
    amp: bool = False,
    workers: int = 0,
    bar: Progress | None = None,
) -> Accuracy:
    """Evaluate model on all images; broken ones are counted and left out. The model is left in evaluation mode.

    Where processes are connected, each takes its share and all get the result. They run the same number of batches, of which
    the last may repeat images that do not count, because a sharded model needs all of them at every step.
    """
    rank, world = rank_and_world()
    shares = range(rank, -(-len(images) // world) * world, world)
    batches = [shares[place : place + batch_size] for place in range(0, len(shares), batch_size)]
    keys = [[(0, place % len(images)) for place in batch] for batch in batches]
    loader = DataLoader(images, batch_sampler=keys, num_workers=workers, pin_memory=device.type == "cuda")
    totals = torch.zeros(5, dtype=torch.float64, device=device)
    model.eval()
    bar = bar or progress_bar(False)
    task = bar.add_task("validation", total=len(batches))
    for batch, (pixels, targets, broken) in zip(batches, loader, strict=True):
        mine = torch.tensor(batch) < len(images)
        counted = (mine & (broken < 0)).to(device)
        targets = targets.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(pixels.to(device, memory_format=torch.channels_last)).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        losses = F.cross_entropy(logits, targets, reduction="none")
        rows = torch.stack([hits[:, 0], hits.any(1), losses, torch.ones_like(losses)]).double()
        totals[:4] += torch.where(counted, rows, 0).sum(1)
        totals[4] += (mine & (broken >= 0)).sum()
        bar.advance(task)
    bar.remove_task(task)
    if world > 1:
        dist.all_reduce(totals)
    top1, top5, loss, read, lost = totals.tolist()
    return Accuracy(top1 / max(read, 1), top5 / max(read, 1), loss / max(read, 1), int(read), int(lost))


def evaluate_checkpoint(
    checkpoint: Path,
    data: Path,
    device: torch.device,
    model: str | None = None,
    batch_size: int = 128,
    amp: bool = False,
    workers: int = 4,
) -> Accuracy:
    """Accuracy on DATA/CLASS/*.jpg of the best weights of a run, or of any checkpoint of a registered model, at its own image size.

    Raises:
        FileNotFoundError: no such file or images; ValueError: the file does not tell its model and none is given, it does not fit
        the model, or the classes are not those of the model.
    """
    network, classes, size = load_classifier(checkpoint, model)
    samples, found = find_images(data, classes)
    if len(found) != network.num_classes:
        raise ValueError(f"data: {data} must hold {network.num_classes} classes, those of the model, got {len(found)}")
    images = Images(samples, evaluation_transform(size, network))
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with progress_bar() as bar:
        return evaluate(network, images, batch_size, device, amp, workers, bar)


def load_classifier(checkpoint: Path, model: str | None = None) -> tuple[nn.Module, list[str] | None, int | None]:
    """The model of a file, its classes and its image size: of the best weights of a run, or of any checkpoint of a registered model.

    Raises:
        FileNotFoundError: no such file; ValueError: it does not tell its model and none is given, or cannot be read as the model's.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {checkpoint}")
    if model and not timm.is_model(model):
        raise ValueError(f"model: must be a registered name such as spanet_small, got {model}")
    metadata = read_metadata(checkpoint)
    if "run" not in metadata:
        if not model:
            raise ValueError(f"checkpoint: {checkpoint} does not tell its model, give its name")
        state = read_state(checkpoint)
        head = {"num_classes": state["head.weight"].shape[0]} if "head.weight" in state else {}
        with as_value_error(f"checkpoint: {checkpoint} does not fit {model}"):
            return timm.create_model(model, checkpoint_path=str(checkpoint), **head), None, None
    with as_value_error(f"checkpoint: {checkpoint} tells no model that can be made"):
        facts = json.loads(metadata["run"])
        recipe, classes = Recipe(**facts["recipe"]), facts["classes"]
        network = build(replace(recipe, weights=None), len(classes))
        load_checkpoint(network, str(checkpoint))
    if model not in (None, recipe.model):
        raise ValueError(f"model: must be {recipe.model}, which {checkpoint} is of, got {model}")
    return network, classes, recipe.image_size
