"""The command line: `spanet COMMAND`, or `python -m spanet COMMAND`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from rich.console import Console
from rich.table import Table

from .checkpoint import model_of, read_state, save_checkpoint
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
    """Convert a checkpoint between the published layout and safetensors."""
    model = model_of(read_state(source))
    save_checkpoint(model, target)
    Console().print(f"{target}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters", soft_wrap=True)


Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Folder of train/CLASS/*.jpg and val/CLASS/*.jpg.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: logs, last checkpoint, best weights.")],
    config: Annotated[str, typer.Option(help="A recipe of the package, or a YAML file, see spanet.recipe.")] = "spanet_small",
    override: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="In place of the recipe's; any number.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT.")] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Under torchrun: shard the model instead of copying it.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    device: Device = None,
    workers: Workers = 4,
) -> None:
    """Train by a recipe; several processes: `torchrun --nproc-per-node N -m spanet train ...`."""
    from . import train as training
    from .recipe import load_recipe

    recipe = load_recipe(config, override or ())
    with training.processes(device) as place:
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
    from . import train as training
    from .evaluate import evaluate_checkpoint

    with training.processes(device) as place:
        found = evaluate_checkpoint(checkpoint, data, place, model, batch, amp, workers)
    _say(f"top-1 {found.top1:.2%}, top-5 {found.top5:.2%}, loss {found.loss:.4f} of {found.images} images, {found.broken} broken")


@app.command()
def train_demo(
    out: Annotated[Path, typer.Option(help="Folder of digits.json and digits.png.")] = Path("benchmarks/out"),
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each variant.")] = 1,
) -> None:
    """Train a small SPANet on handwritten digits, with other filters and without: it must get 98 % of the test images right."""
    from . import digits

    result = digits.demo(out, seeds)
    Console().print(digits.table(result))
    digits.check(result)


def _say(line: str) -> None:
    """Print on the first process."""
    if os.environ.get("RANK", "0") == "0":
        Console().print(line, soft_wrap=True, highlight=False)


def main() -> None:
    """Run a command; what is wrong with its input is one line and exit code 1."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"spanet: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
