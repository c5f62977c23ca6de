"""The command line: `spanet COMMAND`, or `python -m spanet COMMAND`."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, cast

import timm
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from .checkpoint import model_of, read_metadata, read_state, save_checkpoint
from .macs import count_macs

app = typer.Typer(help="SPANet: models, checkpoints, training and analyses.", no_args_is_help=True, pretty_exceptions_enable=False)

# the poster's parameters and MACs, and the paper's accuracies
POSTER = {
    "spanet_small": ("29M", "4.6G", "83.1"),
    "spanet_medium": ("42M", "6.8G", "83.5"),
    "spanet_mediumx": ("-", "-", "83.8"),
    "spanet_base": ("76M", "12.0G", "84.0"),
    "spanet_basex": ("-", "-", "84.4"),
}


@app.command()
def info(size: Annotated[int, typer.Option(min=3, help="Height and width of the image for the MACs.")] = 224) -> None:
    """Count parameters and MACs of the five variants, beside the poster's."""
    table = Table("model", "parameters", "MACs", "poster: parameters", "MACs", "paper: top-1", title=f"SPANet at {size} x {size}")
    for name, published in POSTER.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        macs = count_macs(model, torch.empty(1, 3, size, size, device="meta"))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        table.add_row(name, f"{parameters:,}", f"{macs / 1e9:.3f}G", *published)
    Console().print(table)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A checkpoint of any published layout, or safetensors.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="*.safetensors; any other name for the published layout and its masks.")],
) -> None:
    """Convert a checkpoint between the published layout and safetensors, which keeps the metadata of a run's best.safetensors."""
    from .evaluate import load_classifier

    metadata = read_metadata(source)
    if "run" in metadata:
        model = load_classifier(source)[0]
    else:
        state = read_state(source)
        model = model_of(state)
        if not any(".sps." in key for key in state):
            print(f"spanet: {source} tells no radii, lams and boundary: the published ones are assumed", file=sys.stderr)
    save_checkpoint(model, target, metadata)
    _say(f"{target}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")]
Override = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="In place of the recipe's; any number.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Folder of train/CLASS/*.jpg and val/CLASS/*.jpg.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: logs, last checkpoint, best weights.")],
    config: Annotated[str, typer.Option(help="A recipe of the package, or a YAML file, see spanet.recipe.")] = "spanet_small",
    override: Override = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT.")] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Under torchrun: shard the model instead of copying it.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    device: Device = None,
    workers: Workers = 4,
) -> None:
    """Train by a recipe; several processes: `torchrun --nproc-per-node N -m spanet train ...`."""
    from . import train as training
    from .processes import processes
    from .recipe import load_recipe

    _check_folder(out)
    recipe = load_recipe(config, override or ())
    with processes(device) as place:
        best = training.train(recipe, data, out, place, workers, fsdp, compiled, resume)
    _say(f"{out / 'best.safetensors'}: top-1 {best.top1:.2%}, top-5 {best.top5:.2%} of {best.images} images")


@app.command()
def evaluate(
    data: Annotated[Path, typer.Option(help="Folder of CLASS/*.jpg, all classes of the model.")],
    checkpoint: Annotated[Path, typer.Option(help="best.safetensors of a run, or with --model any checkpoint.")],
    model: Annotated[str | None, typer.Option(help="Registered name; best.safetensors tells it itself.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 128,
    amp: Annotated[bool, typer.Option("--amp", help="In bfloat16.")] = False,
    device: Device = None,
    workers: Workers = 4,
) -> None:
    """Accuracy of a checkpoint; several processes: `torchrun --nproc-per-node N -m spanet evaluate ...`."""
    from .evaluate import evaluate_checkpoint
    from .processes import processes

    with processes(device) as place:
        found = evaluate_checkpoint(checkpoint, data, place, model, batch, amp, workers)
    _say(f"top-1 {found.top1:.2%}, top-5 {found.top5:.2%}, loss {found.loss:.4f} of {found.images} images, {found.broken} broken")


Model = Annotated[str, typer.Option(help="Registered name.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights; without, they are random.")]
ImageFile = Annotated[Path, typer.Argument(metavar="IMAGE", help="A photograph.")]


@app.command()
def predict(
    image: ImageFile,
    model: Annotated[str | None, typer.Option(help="Registered name; best.safetensors of a run tells it itself.")] = None,
    checkpoint: Checkpoint = None,
    out: Annotated[Path | None, typer.Option(help="Picture of the aggregated contexts and of the best class's activation.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to print.")] = 5,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the square that the model sees; by default its own.")] = None,
) -> None:
    """Classify a photograph, and show where the model looks."""
    from . import images, predict

    if out:
        _check_picture(out, predict.ENDINGS)
    network, classes, own_size = _classifier(model, checkpoint)
    x = images.read_input(network, image, size or own_size)
    guesses = predict.predict(network, x, classes, top)
    if out:
        images.save_picture(predict.prediction_figure(network, x, guesses[0]), out)
    for guess in guesses:
        _say(f"{guess.probability:7.2%}  {guess.name}")


@app.command()
def segment(
    image: ImageFile,
    out: Annotated[Path, typer.Option(help="The photograph under the colours of its classes.")],
    model: Model = "spanet_small",
    checkpoint: Checkpoint = None,
    num_classes: Annotated[int, typer.Option(min=1, help="Classes; 150 are those of ADE20K.")] = 150,
    size: Annotated[int, typer.Option(min=1, help="Shorter side that the model sees.")] = 512,
) -> None:
    """Segment a photograph by Semantic FPN."""
    from . import images, segmentation
    from .pyramid import load_task

    _check_picture(out, images.ENDINGS)
    photograph = images.read_image(image)
    network = segmentation.semantic_fpn(model, num_classes)
    load_task(network, checkpoint) if checkpoint else _warn_random()
    classes = segmentation.segment(network, photograph, size)
    images.save_picture(segmentation.draw_segmentation(photograph, classes), out)
    shares = classes.flatten().bincount(minlength=num_classes) / classes.numel()
    for share, index in zip(*shares.topk(min(5, int((shares > 0).sum()))), strict=True):
        _say(f"{share:7.2%}  class {index}")


@app.command()
def detect(
    image: ImageFile,
    out: Annotated[Path, typer.Option(help="The photograph with boxes, and masks if there are any.")],
    model: Model = "spanet_small",
    checkpoint: Checkpoint = None,
    masks: Annotated[bool, typer.Option("--masks", help="By Mask R-CNN instead of RetinaNet.")] = False,
    num_classes: Annotated[int, typer.Option(min=1, help="Classes of objects; 80 are those of COCO.")] = 80,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Least score of what is drawn.")] = 0.5,
    size: Annotated[int, typer.Option(min=1, help="Shorter side that the model sees.")] = 800,
) -> None:
    """Detect objects in a photograph by RetinaNet, or by Mask R-CNN."""
    from . import detection, images
    from .pyramid import load_task

    _check_picture(out, images.ENDINGS)
    photograph = images.read_image(image)
    network = (detection.mask_rcnn if masks else detection.retinanet)(model, num_classes, min_size=size, max_size=size * 5 // 3)
    load_task(network, checkpoint) if checkpoint else _warn_random()
    found = detection.detect(network, photograph)
    images.save_picture(detection.draw_detections(photograph, found, threshold=threshold), out)
    _say(f"{out}: {int((found['scores'] >= threshold).sum())} objects that score at least {threshold:g}")


@app.command()
def spectra(
    source: Annotated[Path, typer.Argument(metavar="IMAGE", help="A photograph, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="Folder of fourier.png, amplitude.png, context.png and response.png.")],
    model: Annotated[str | None, typer.Option(help="Registered name of a SPANet; best.safetensors of a run tells it itself.")] = None,
    checkpoint: Checkpoint = None,
    peer: Annotated[list[str] | None, typer.Option(help="A model of timm beside it, with timm's weights; any number.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Download the peers' weights, or leave them random.")] = True,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the square that the models see; by default their own.")] = None,
) -> None:
    """Draw the paper's analyses: Fourier maps, relative log amplitudes, aggregated contexts, responses of the filters."""
    from . import spectra

    _check_folder(out)
    network, _, own_size = _classifier(model, checkpoint)
    own_name = cast(dict[str, str], network.pretrained_cfg)["architecture"]
    for name in peer or ():
        _check_name(name, "peer")
        if name == own_name:
            raise ValueError(f"peer: must be another model than {own_name}")
    peers = {name: timm.create_model(name, pretrained=pretrained) for name in peer or ()}
    for path in spectra.save_figures({own_name: network} | peers, source, out, size or own_size):
        _say(str(path))


@app.command()
def train_task(
    config: Annotated[str, typer.Argument(help="ade20k_semantic_fpn, coco_retinanet, coco_mask_rcnn, or a YAML file, see spanet.tasks.")],
    data: Annotated[Path, typer.Option(help="Folder of ADE20K or COCO, as they are published.")],
    out: Annotated[Path, typer.Option(help="Folder of the run, which goes on from its last checkpoint.")],
    override: Override = None,
    device: Device = None,
    workers: Workers = 4,
) -> None:
    """Train segmentation or detection by a recipe, and evaluate the result; several processes as for `spanet train`."""
    from . import tasks
    from .processes import processes
    from .pyramid import load_task

    _check_folder(out)
    recipe = tasks.load_task_recipe(config, override or ())
    with processes(device) as place:
        tasks.train_task(recipe, data, out, place, workers)
        model = tasks.build_task(recipe)
        load_task(model, out / "model.safetensors")
        for name, value in tasks.evaluate_task(recipe, model.to(place), data).items():
            _say(f"{name}: {value:.2%}")


def _check_picture(out: Path, endings: Collection[str]) -> None:
    if out.suffix.lower() not in endings:
        raise ValueError(f"out: must end as a picture's name does, such as .png, got {out}")
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"out: must be a file in a folder that is there, got {out}")


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: must be a folder, got the file {out}")


def _check_name(name: str, option: str = "model") -> None:
    if not timm.is_model(name):
        raise ValueError(f"{option}: must be a registered name such as spanet_small, got {name}")


def _classifier(model: str | None, checkpoint: Path | None) -> tuple[nn.Module, list[str] | None, int | None]:
    """A classifier, the names of its classes and its image size; without a checkpoint the weights are random."""
    from .evaluate import load_classifier

    if checkpoint:
        return load_classifier(checkpoint, model)
    _check_name(model or "spanet_small")
    _warn_random()
    return timm.create_model(model or "spanet_small"), None, None


def _warn_random() -> None:
    print("spanet: no checkpoint: the weights are random, and so is the result", file=sys.stderr)


@app.command()
def train_demo(
    out: Annotated[Path, typer.Option(help="Folder of digits.json and digits.png.")] = Path("benchmarks/out"),
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each variant.")] = 1,
) -> None:
    """Train a small SPANet on handwritten digits, with other filters and without: it must get 98 % of the test images right."""
    from . import digits

    _check_folder(out)
    result = digits.demo(out, seeds)
    Console().print(digits.table(result))
    digits.check(result)


def _say(line: str) -> None:
    """Print on the first process."""
    if os.environ.get("RANK", "0") == "0":
        Console(markup=False, emoji=False, highlight=False).print(line, soft_wrap=True)


def main() -> None:
    """Run a command; what is wrong with its input is one line and exit code 1."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        print(f"spanet: {said[-1]}", file=sys.stderr)  # above it an error of a worker has the worker's traceback
        sys.exit(1)


if __name__ == "__main__":
    main()
