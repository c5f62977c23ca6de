"""Training and evaluation of the dense tasks by a recipe, on the folders of ADE20K and of COCO as they are published.

    lr(step) = lr min(1, ratio + (1 - ratio) step / warmup_steps) 0.1^(milestones passed) (1 - step / steps)^power

All randomness is a function of the seed, the epoch and the image, or of the step and the process. The last checkpoint is whole at any
moment, and a run that finds one in its folder goes on from there as if it had not been interrupted. Several processes share the images of
a batch, and those that are evaluated.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import encode
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import MaskRCNN
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from .checkpoint import load_checkpoint
from .detection import detect, mask_rcnn, retinanet
from .errors import as_value_error
from .images import read_image
from .processes import copied, of_all, progress_bar, rank_and_world
from .recipe import RECIPES, check_ranges, read_recipe, seed_all
from .runs import Run
from .segmentation import IGNORE, SemanticFPN, segment, segmentation_loss, semantic_fpn
from .train import mean_over_processes, memory_kept, uncollected

BUILDERS: dict[str, Callable[..., nn.Module]] = {"semantic_fpn": semantic_fpn, "retinanet": retinanet, "mask_rcnn": mask_rcnn}

_RANGES = {
    **dict.fromkeys(("num_classes", "batch_size", "checkpoint_steps"), (1, math.inf)),
    **dict.fromkeys(("lr", "weight_decay", "steps", "epochs", "warmup_steps", "warmup_ratio", "power"), (0, math.inf)),
    "size": (3, math.inf),
}


@dataclass(frozen=True)
class TaskRecipe:
    """How a model of a dense task is trained, from a YAML file; its length is in steps, or in epochs if steps is 0."""

    task: str
    """semantic_fpn, retinanet or mask_rcnn"""
    num_classes: int
    batch_size: int
    lr: float
    weight_decay: float
    size: int
    """side of the crops of segmentation; shorter side of the images of detection, the longer one at most 5 / 3 of it"""
    steps: int = 0
    epochs: int = 0
    milestones: list[int] = field(default_factory=list)
    """epochs after which the learning rate is a tenth"""
    warmup_steps: int = 0
    warmup_ratio: float = 0.001
    power: float = 0.0
    """of the polynomial decay"""
    model: str = "spanet_small"
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    """checkpoint of the backbone"""
    seed: int = 0
    checkpoint_steps: int = 1000

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)
        if not all(type(epoch) is int for epoch in self.milestones):
            raise ValueError(f"recipe: milestones must be a list of epochs, got {self.milestones}")
        if self.task not in BUILDERS:
            raise ValueError(f"recipe: task must be one of {', '.join(BUILDERS)}, got {self.task}")
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(f"recipe: either steps or epochs must be at least 1, got {self.steps} and {self.epochs}")

    def rate(self, step: int, steps: int, per_epoch: int) -> float:
        """Learning rate at a step of `steps`."""
        warmup = min(1.0, self.warmup_ratio + (1 - self.warmup_ratio) * step / self.warmup_steps) if self.warmup_steps else 1.0
        passed = sum(step >= epoch * per_epoch for epoch in self.milestones)
        return self.lr * warmup * 0.1**passed * (1 - step / steps) ** self.power


def load_task_recipe(config: str, overrides: Iterable[str] = ()) -> TaskRecipe:
    """The recipe of a YAML file or of its name in the package, with `key=value` overrides; errors as of `spanet.recipe.read_recipe`."""
    return read_recipe(TaskRecipe, RECIPES / "tasks", config, overrides)


def build_task(recipe: TaskRecipe) -> nn.Module:
    """The recipe's model, from its seed, its backbone from the recipe's weights."""
    seed_all(recipe.seed, "weights")
    sizes = {} if recipe.task == "semantic_fpn" else {"min_size": recipe.size, "max_size": recipe.size * 5 // 3}
    model = BUILDERS[recipe.task](recipe.model, recipe.num_classes, **sizes, **recipe.model_args)
    if recipe.weights:
        load_checkpoint(model, recipe.weights)
    return model


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """ADE20K: ROOT/images/SPLIT/*.jpg and ROOT/annotations/SPLIT/*.png, in whose pixels 0 is no label; SPLIT training or validation.

    Raises:
        FileNotFoundError: no images, or one without annotation; ValueError: on reading one, that it does not hold `classes` classes.
    """

    def __init__(self, root: Path, split: str, classes: int, transform: Callable[..., Any]) -> None:
        self.images = sorted((root / "images" / split).glob("*.jpg"))
        self.labels = [root / "annotations" / split / f"{path.stem}.png" for path in self.images]
        self.classes = classes
        self.transform = transform
        if missing := next((path for path in self.labels if not path.is_file()), None if self.images else root / "images" / split):
            raise FileNotFoundError(f"data: there is no {missing}" + ("" if self.images else "/*.jpg"))

    def __len__(self) -> int:
        return len(self.images)

    def target(self, index: int) -> Tensor:
        """(1, H, W) bytes: classes from 0, and 255 where there is no label."""
        path = self.labels[index]
        with as_value_error(f"{path}: not an image that can be read"), Image.open(path) as file:
            mode, extremes, labels = file.mode, file.getextrema(), pil_to_tensor(file)
        if mode not in ("L", "P") or labels.max() > self.classes:
            raise ValueError(f"data: {path} must hold a byte per pixel, from 0 to {self.classes}, got mode {mode} and {extremes}")
        return labels - 1  # bytes: 0 becomes 255

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.transform(tv_tensors.Image(read_image(self.images[index], upright=False)), tv_tensors.Mask(self.target(index)))
        return image, target[0]


class Objects(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """COCO: ROOT/SPLIT/*.jpg and ROOT/annotations/instances_SPLIT.json, images that have boxes; SPLIT train2017 or val2017.

    Labels are in the order of the categories' ids, from 0 on, or with masks from 1.

    Raises:
        FileNotFoundError: no annotations; ValueError: they cannot be read, have more categories than `classes`, or one of them has an
        image or a category that is not in the file, or no segmentation where there are to be masks.
    """

    def __init__(self, root: Path, split: str, classes: int, masks: bool, transform: Callable[..., Any]) -> None:
        annotations = root / "annotations" / f"instances_{split}.json"
        if not annotations.is_file():
            raise FileNotFoundError(f"data: there is no {annotations}")
        with as_value_error(f"data: {annotations} cannot be read"), contextlib.redirect_stdout(io.StringIO()):  # the reader prints
            self.coco = CocoDetection(root / split, annotations)
            self.coco.ids = sorted({a["image_id"] for a in self.coco.coco.anns.values() if not a["iscrowd"] and min(a["bbox"][2:]) >= 1})
        truth = self.coco.coco
        for index, a in truth.anns.items():
            if a.get("image_id") not in truth.imgs or a.get("category_id") not in truth.cats or (masks and not a.get("segmentation")):
                wanted = "an image and a category of the file" + " and a segmentation" * masks
                raise ValueError(f"data: {annotations} must have {wanted} for every annotation, has not for that of id {index}")
        self.first = int(masks)
        self.categories = sorted(truth.cats)
        if len(self.categories) > classes:
            raise ValueError(f"data: {annotations} must have at most {classes} categories, num_classes, got {len(self.categories)}")
        self.labels = {category: label for label, category in enumerate(self.categories, self.first)}
        self.samples = wrap_dataset_for_transforms_v2(self.coco, target_keys=("boxes", "labels", *["masks"] * masks))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.coco)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = self.transform(*self.samples[index])
        crowd = [a["iscrowd"] for a in self.coco.coco.imgToAnns[self.coco.ids[index]]]
        keep = (target["boxes"][:, 2:] - target["boxes"][:, :2]).amin(1).ge(1) & ~torch.tensor(crowd, dtype=torch.bool)
        target["labels"] = torch.tensor([self.labels[label] for label in target["labels"].tolist()])
        return image, {name: values[keep].as_subclass(Tensor) for name, values in target.items()}


def training_data(recipe: TaskRecipe, model: nn.Module, root: Path) -> Dataset[Any]:
    """The task's training images: scaled, cropped, distorted in colour and flipped for segmentation, flipped for detection."""
    tail: list[nn.Module] = [v2.RandomHorizontalFlip(0.5), v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
    if recipe.task != "semantic_fpn":
        return Objects(root, "train2017", recipe.num_classes, recipe.task == "mask_rcnn", v2.Compose([v2.ToImage(), *tail]))
    scale = v2.RandomShortestSize(list(range(recipe.size // 2, 2 * recipe.size + 1)))
    crop = v2.RandomCrop(recipe.size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORE})
    backbone = cast(SemanticFPN, model).backbone
    steps = [scale, crop, v2.RandomPhotometricDistort(), *tail, v2.Normalize(*backbone.normalization)]
    return Scenes(root, "training", recipe.num_classes, v2.Compose(steps))


def losses(model: nn.Module, batch: Sequence[tuple[Tensor, Any]], device: torch.device) -> Tensor:
    """The task's loss of one batch."""
    images, targets = zip(*batch, strict=True)
    if not isinstance(targets[0], dict):
        return segmentation_loss(model(torch.stack(images).to(device)), torch.stack(targets).long().to(device))
    found = model([image.to(device) for image in images], [{name: t.to(device) for name, t in target.items()} for target in targets])
    return torch.stack(list(found.values())).sum()


class Seeded(Dataset[Any]):
    """Samples of other data by (epoch, index), whose random numbers are a function of the seed and of these."""

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        seed_all(self.seed, *key)
        return self.data[key[1]]


def keys(images: int, recipe: TaskRecipe, start: int, steps: int) -> Iterator[list[tuple[int, int]]]:
    """Epoch and index of the images of each batch from step `start` on; an epoch is a permutation, without what fills no batch."""
    per_epoch = images // recipe.batch_size
    for epoch in range(start // per_epoch, -(-steps // per_epoch)):
        order = torch.randperm(images, generator=torch.Generator().manual_seed(recipe.seed + epoch)).tolist()
        for step in range(max(start, epoch * per_epoch), min(steps, (epoch + 1) * per_epoch)):
            place = step % per_epoch * recipe.batch_size
            yield [(epoch, index) for index in order[place : place + recipe.batch_size]]


def train_task(recipe: TaskRecipe, root: Path, out: Path, device: torch.device, workers: int = 4) -> list[float]:
    """Train by a recipe in the folder of a run (`spanet.runs`); OUT/model.safetensors is the result.

    Processes that are connected share the images of every batch; each computes the loss of its own, and gradients are means. On GPUs
    BatchNorm sees all of them.

    Returns:
        the losses of the steps of this call.

    Raises:
        FileNotFoundError: the data is not there; ValueError: fewer images than a batch, batches that the processes cannot share, a
        checkpoint of another recipe or other data; FloatingPointError: a loss that is no number.
    """
    rank, world = rank_and_world()
    if recipe.batch_size % world:
        raise ValueError(f"recipe: batch_size must be a multiple of {world}, the processes, got {recipe.batch_size}")
    model = build_task(recipe).to(device)
    data = training_data(recipe, model, root)
    images = len(cast(Sized, data))
    per_epoch = images // recipe.batch_size
    if not per_epoch:
        raise ValueError(f"recipe: batch_size must be at most the {images} training images, got {recipe.batch_size}")
    steps = recipe.steps or recipe.epochs * per_epoch
    if dist.is_initialized() and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    trained = copied(model, device) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    run = Run(out, {"recipe": asdict(recipe), "images": images}, (out / "last.pt").exists(), evaluates=False)
    if run.state:
        model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
    share = slice(rank * recipe.batch_size // world, (rank + 1) * recipe.batch_size // world)
    batches = [batch[share] for batch in keys(images, recipe, run.start, steps)]
    loader = DataLoader(Seeded(data, recipe.seed), batch_sampler=batches, num_workers=workers, collate_fn=list)
    course: list[float] = []
    model.train()
    with progress_bar() as bar, uncollected(), memory_kept(device):
        task = bar.add_task(recipe.task, total=steps, completed=run.start)
        for step, batch in enumerate(loader, run.start):
            for group in optimizer.param_groups:
                group["lr"] = lr = recipe.rate(step, steps, per_epoch)
            seed_all(recipe.seed, "step", step, rank)
            loss = losses(trained, batch, device)
            [mean] = mean_over_processes([loss.detach()])
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss of step {step} is {mean}; the last checkpoint is {run.last}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            course.append(mean)
            run.log_step(step=step, epoch=step // per_epoch, lr=lr, loss=mean)
            bar.update(task, advance=1, description=f"{recipe.task}, loss {mean:.4f}")
            if (step + 1) % recipe.checkpoint_steps == 0 or step + 1 == steps:
                run.save_last({"model": model.state_dict(), "step": step + 1, "optimizer": optimizer.state_dict()})
    run.save_weights("model.safetensors", model.state_dict())
    if dist.is_initialized():
        dist.barrier()  # until it is written
    return course


def evaluate_task(recipe: TaskRecipe, model: nn.Module, root: Path) -> dict[str, float]:
    """mIoU of segmentation on ROOT's validation images; AP of detection's boxes, and masks, as COCO defines it.

    Processes that are connected share the images, and all get the result.
    """
    rank, world = rank_and_world()
    if isinstance(model, SemanticFPN):
        scenes = Scenes(root, "validation", recipe.num_classes, lambda *sample: sample)
        counts = torch.zeros(recipe.num_classes, recipe.num_classes, dtype=torch.long)
        with progress_bar() as bar:
            for index in bar.track(range(rank, len(scenes), world), description="validation"):
                classes = segment(model, read_image(scenes.images[index], upright=False), recipe.size)
                counts += confusion(classes, scenes.target(index)[0].long(), recipe.num_classes)
        return {"mIoU": mean_iou(torch.stack(of_all(counts)).sum(0))}
    objects = Objects(root, "val2017", recipe.num_classes, recipe.task == "mask_rcnn", lambda *sample: sample)
    mine = sorted(objects.coco.coco.imgs)[rank::world]
    with progress_bar() as bar:
        found = [_found(cast(MaskRCNN, model), objects, image) for image in bar.track(mine, description="validation")]
    everywhere = [of_image for of_process in of_all(found) for of_image in of_process]
    return {
        f"AP {kind}": _average_precision(objects.coco.coco, [one for of_image in everywhere for one in of_image[kind]], kind)
        for kind in ("bbox", "segm")[: 1 + (recipe.task == "mask_rcnn")]
    }


def _found(model: MaskRCNN, objects: Objects, image: int) -> dict[str, list[dict[str, Any]]]:
    """The boxes in a photograph, and the masks of a model that has them, as COCO writes them."""
    path = Path(objects.coco.root) / objects.coco.coco.imgs[image]["file_name"]
    found, results = detect(model, read_image(path, upright=False)), {"bbox": list[dict[str, Any]](), "segm": list[dict[str, Any]]()}
    for index, (box, label, score) in enumerate(zip(found["boxes"], found["labels"].tolist(), found["scores"].tolist(), strict=True)):
        common = {"image_id": image, "category_id": objects.categories[label - objects.first], "score": score}
        x1, y1, x2, y2 = box.tolist()
        results["bbox"].append(common | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
        if "masks" in found:
            mask = (found["masks"][index, 0] >= 0.5).byte().numpy()
            results["segm"].append(common | {"segmentation": encode(np.asfortranarray(mask))})
    return results


def confusion(found: Tensor, target: Tensor, classes: int) -> Tensor:
    """(classes, classes) pixels by their class, row, and the one found, column; without those that have no label."""
    known = target < classes
    return (target[known] * classes + found[known]).bincount(minlength=classes * classes).view(classes, classes)


def mean_iou(counts: Tensor) -> float:
    """Mean over the classes that occur of intersection over union, from their confusion matrix."""
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    return float((counts.diag()[union > 0] / union[union > 0]).mean())


def _average_precision(truth: COCO, results: list[dict[str, Any]], kind: str) -> float:
    """AP over IoU 0.50 to 0.95, 0 if nothing was found."""
    if not results:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(truth, truth.loadRes(results), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0])
