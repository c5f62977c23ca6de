"""The command line: `spanet COMMAND`, or `python -m spanet COMMAND`."""

from __future__ import annotations

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


def main() -> None:
    """Run a command; what is wrong with its input is one line and exit code 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"spanet: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
