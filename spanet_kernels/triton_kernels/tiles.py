"""The tiles of Triton's matrix products that were measured to be fastest: data, written by `python -m benchmarks.tune`."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

DATA = Path(__file__).with_name("tiles.json")  # architecture to problem to rows, columns and depth of a tile, warps, stages

Tile = tuple[int, int, int, int, int]


def architecture() -> str:
    """Of the current GPU, "" without one of NVIDIA's."""
    if torch.version.hip or not torch.cuda.is_available():
        return ""
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


@functools.lru_cache(maxsize=1)
def _measured() -> dict[str, Tile]:
    found: dict[str, Tile] = json.loads(DATA.read_text()).get(architecture(), {})
    return found


def tile(kind: str, *sizes: int) -> Tile | None:
    """The tile of a problem on the GPU that is there, or None where none was measured."""
    return _measured().get(" ".join(map(str, (kind, *sizes))))
