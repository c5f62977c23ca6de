"""One training step of whole models: forward, cross entropy, backward, fused AdamW; 16-bit formats by autocast."""

from __future__ import annotations

from .models import Row, run, wrong
from .models import rows as model_rows
from .section import Options

__all__ = ["rows", "run", "wrong"]


def rows(options: Options) -> list[Row]:
    return model_rows(options, "train")
