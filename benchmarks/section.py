"""What a section of the benchmark is, and the choices that the command line hands to each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        form: "quick" or "full".
        dtypes, layouts: keys of DTYPES and LAYOUTS.
        compile: measure torch.compile of everything too, even in the quick form.
        batches: images at once; none for those of the form.
        out: where sections that make figures of their own put them.
    """

    form: str
    device: torch.device
    dtypes: Sequence[str]
    layouts: Sequence[str]
    compile: bool = False
    batches: Sequence[int] = ()
    out: Path = Path(__file__).parent / "out"

    @property
    def full(self) -> bool:
        return self.form == "full"


class Row(Protocol):
    """One line of a benchmark; its name is what --filter and --compare go by."""

    @property
    def name(self) -> str: ...


class Section(Protocol):
    """A module that measures something."""

    def rows(self, options: Options) -> list[Any]:
        """Every Row that the options ask for."""

    def run(self, chosen: list[Any], options: Options, advance: Callable[[str], None], result: dict[str, Any]) -> Iterator[None]:
        """Measure rows into result["rows"], with what they compete with in "competitors" and their "name".

        Names what is next by `advance`; yields once per row and once more, so that the caller can save or stop.
        """

    def wrong(self, result: dict[str, Any]) -> list[str]:
        """A line for every result of ours that was refused."""


def usable(device: torch.device, dtype: str) -> str | None:
    """Why a device cannot compute in a dtype, or None if it can: one convolution, one matrix product."""
    if device.type == "cuda" and dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this GPU emulates it"
    x = torch.ones(4, 4, 1, 1, device=device, dtype=DTYPES[dtype])
    try:
        torch.nn.functional.conv2d(x, x).flatten(1) @ x.flatten(1)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
