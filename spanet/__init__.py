"""The SPANet models (ICCV 2023, arXiv 2308.11568) on top of spanet_kernels: backbones, tasks, training and analyses.

Importing it registers spanet_small, spanet_medium, spanet_mediumx, spanet_base and spanet_basex with timm.
"""

import importlib
from typing import Any

from .model import SPANet, spanet_base, spanet_basex, spanet_medium, spanet_mediumx, spanet_small

__all__ = ["SPANet", "spanet_base", "spanet_basex", "spanet_medium", "spanet_mediumx", "spanet_small"]


_WHEN_ASKED_FOR = ("detection", "segmentation", "train")  # modules that import more than the models need


def __getattr__(name: str) -> Any:
    if name in _WHEN_ASKED_FOR:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
