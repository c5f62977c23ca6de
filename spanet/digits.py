"""A training that proves the model learns: handwritten digits, and what the spectral filter contributes.

scikit-learn's digits are 1,797 scans of 8 x 8 pixels by 13 writers, the test part of UCI's optical digits; which writer wrote
which is not recorded. Split: stratified, 1,437 for training and 360 for the test, drawn with random state 0.
A small SPANet of two stages sees them at 32 x 32, so that its first stage mixes 8 x 8 tokens and its second 4 x 4.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import spanet_kernels

from .data import Images
from .images import save_picture
from .model import SPANet
from .processes import progress_bar
from .recipe import Recipe, load_recipe, seed_all
from .runs import write_json
from .train import fit

WANTED = 0.98  # accuracy of the first variant
PAPER = {"lams": (0.7, 0.8, 0.9), "radius": 2, "boundary": 1 / 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "SPANet, r = 2": PAPER,
    "r = 1": PAPER | {"radius": 1},
    "r = 4": PAPER | {"radius": 4},
    "boundary 1 - lam": PAPER | {"boundary": "paper"},
    "high-pass only": PAPER | {"lams": (0.0, 0.0, 0.0), "boundary": "paper"},
    "no filter": PAPER | {"lams": ()},
}


def digits(seed: int = 0) -> tuple[Images, Images]:
    """Training and test images, the first with random shifts, turns and scales."""
    scans = load_digits()
    pictures = [Image.fromarray((scan * 15.9375).astype("uint8")) for scan in scans.images]  # 0..16 to 0..255
    parts = train_test_split(pictures, scans.target.tolist(), test_size=360, stratify=scans.target, random_state=0)
    resize = transforms.Resize(32, InterpolationMode.BICUBIC)
    jitter = transforms.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), 10, InterpolationMode.BILINEAR)
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    training = Images(list(zip(parts[0], parts[2], strict=True)), transforms.Compose([resize, jitter, normalise]), seed)
    return training, Images(list(zip(parts[1], parts[3], strict=True)), transforms.Compose([resize, normalise]))


def network(recipe: Recipe, lams: tuple[float, ...], radius: float, boundary: float | str) -> SPANet:
    """SPANet of two stages for images of one channel."""
    seed_all(recipe.seed, "weights")
    return SPANet(
        depths=(2, 2),
        dims=(32, 64),
        radii=(radius, radius),
        lams=lams,
        boundary=boundary,
        in_chans=1,
        num_classes=10,
        drop_path_rate=recipe.drop_path_rate,
    )


def demo(out: Path, seeds: int = 1, recipe: Recipe | None = None) -> dict[str, Any]:
    """Train every variant with every seed, one per core at a time; writes OUT/digits.json and OUT/digits.png.

    Raises:
        OSError: out cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    recipe = recipe or load_recipe("digits")
    jobs = [(name, replace(recipe, seed=seed)) for seed in range(seeds) for name in VARIANTS]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    started, rows = time.perf_counter(), []
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool, progress_bar() as bar:
        task = bar.add_task(f"{len(jobs)} trainings on {cores} cores", total=len(jobs))
        for done in as_completed([pool.submit(training, *job) for job in jobs]):
            rows.append(done.result())
            bar.advance(task)
    result = {
        "recipe": asdict(recipe),
        "environment": {
            "torch": torch.__version__,
            "spanet_kernels": spanet_kernels.__version__,
            "machine": platform.machine(),
            "cores": cores,
            "seconds": round(time.perf_counter() - started, 1),
        },
        "rows": sorted(rows, key=lambda row: (list(VARIANTS).index(row["variant"]), row["seed"])),
    }
    write_json(out / "digits.json", result)
    save_picture(figure(result), out / "digits.png")
    return result


def training(variant: str, recipe: Recipe) -> dict[str, Any]:
    """One training on one thread: accuracy and losses by epoch."""
    torch.set_num_threads(1)
    images, held_out = digits(recipe.seed)
    model = network(recipe, **VARIANTS[variant])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fit(recipe, model, images, held_out, [str(digit) for digit in range(10)], Path(folder), torch.device("cpu"), show=False)
        epochs = list(csv.DictReader((Path(folder) / "epochs.csv").open()))
        steps = list(csv.DictReader((Path(folder) / "steps.csv").open()))
    losses = [[float(row["loss"]) for row in steps if row["epoch"] == epoch["epoch"]] for epoch in epochs]
    return {
        "variant": variant,
        "seed": recipe.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.perf_counter() - started, 1),
        "top1": [float(row["top1"]) for row in epochs],
        "test loss": [float(row["loss"]) for row in epochs],
        "training loss": [statistics.fmean(values) for values in losses],
    }


def last_accuracies(result: dict[str, Any]) -> dict[str, list[float]]:
    """Test accuracy after the last epoch, of every seed, by variant."""
    found: dict[str, list[float]] = {}
    for row in result["rows"]:
        found.setdefault(row["variant"], []).append(row["top1"][-1])
    return found


def check(result: dict[str, Any]) -> None:
    """Raises ValueError where a training of the first variant has not learned."""
    lowest = min(next(iter(last_accuracies(result).values())))
    if lowest < WANTED:
        raise ValueError(f"digits: test accuracy must reach {WANTED:.0%}, got {lowest:.2%}")


def table(result: dict[str, Any]) -> Table:
    """One row per variant: accuracy after the last epoch (mean of the seeds, and each), errors of 360, seconds."""
    shown = Table(title=f"Digits: test accuracy after {result['recipe']['epochs']} epochs, 360 images")
    for column in ("variant", "parameters", "mean", "by seed", "test loss", "seconds"):
        shown.add_column(column, justify="left" if column == "variant" else "right")
    for variant, accuracies in last_accuracies(result).items():
        rows = [row for row in result["rows"] if row["variant"] == variant]
        shown.add_row(
            variant,
            f"{rows[0]['parameters']:,}",
            f"{statistics.fmean(accuracies):.2%}",
            " ".join(f"{accuracy:.1%}" for accuracy in accuracies),
            f"{statistics.fmean(row['test loss'][-1] for row in rows):.3f}",
            f"{statistics.fmean(row['seconds'] for row in rows):.0f}",
        )
    return shown


def figure(result: dict[str, Any]) -> Figure:
    """Errors on the test images and loss by epoch, means over the seeds, one curve per variant."""
    drawn = Figure((10, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for variant in last_accuracies(result):
        rows = [row for row in result["rows"] if row["variant"] == variant]
        means = {key: [statistics.fmean(at) for at in zip(*(row[key] for row in rows), strict=True)] for key in ("top1", "test loss")}
        epochs = range(1, len(means["top1"]) + 1)
        half_an_image = 50 / 360  # where no error would be
        left.plot(epochs, [max(100 * (1 - accuracy), half_an_image) for accuracy in means["top1"]], label=variant)
        right.plot(epochs, means["test loss"])
    left.axhline(100 * (1 - WANTED), color="black", linewidth=0.8, linestyle=":")
    left.set(yscale="log", xlabel="epoch", ylabel="test errors, percent")
    right.set(yscale="log", xlabel="epoch", ylabel="test loss")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return drawn
