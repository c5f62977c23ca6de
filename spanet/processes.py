"""What the processes of a run share: their devices, their places among each other, and the bar that the first of them shows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def processes(device: str | None = None) -> Iterator[torch.device]:
    """The device of this process, connected with the others where torchrun has started it.

    Args:
        device: cpu or cuda; by default cuda where there is one.

    Raises:
        ValueError: there is no such device.
    """
    if device not in (None, "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: must be cpu, or cuda where torch finds one, got {device}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "LOCAL_RANK" not in os.environ:
        yield place
        return
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield place
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """The number of this process, from 0 on, and how many are connected."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def copied(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The model whose gradients are means over the processes, which are connected and have a copy each."""
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def of_all(value: Any) -> list[Any]:
    """The values of all processes, which must all ask."""
    gathered = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(gathered, value)
    return gathered


def progress_bar(show: bool = True) -> Progress:
    """On the standard error of the first process."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show or rank_and_world()[0] > 0)
