"""The Triton launchers under the interpreter, on CPU tensors, against the fp64 reference: parity without a GPU.

Error rule: at most 1.25 times (max) and 1.0 times (rms) the error of the straightforward evaluation in the same dtype,
plus a fraction of a rounding unit of the largest result; bf16 is broken in the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spanet_kernels import modes, reference

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "odd_offset")
# (B, C, H, W), radius_squared, layout, dtypes
CASES: list[tuple[tuple[int, int, int, int], int, str, str]] = [
    ((2, 3, 1, 1), 0, "contiguous", "float32"),
    ((2, 3, 1, 5), 4, "channels_last", "float16"),
    ((2, 65, 7, 7), 1, "contiguous", "float32"),
    ((2, 65, 7, 7), 1, "channels_last", "float16"),
    ((2, 64, 14, 14), 1, "channels_last", "float32"),
    ((3, 6, 14, 14), 4, "contiguous", "float16"),
    ((2, 5, 8, 6), 25, "contiguous", "float32"),
    ((2, 3, 8, 6), 25, "channels_last", "float16"),
    ((2, 3, 17, 3), 65, "sliced", "float32"),
    ((2, 3, 25, 42), 4, "odd_offset", "float16"),
    ((2, 3, 25, 42), 9, "expanded", "float32"),
    ((2, 4, 14, 12), 5, "sliced", "float16"),
    ((1, 33, 14, 12), 2, "expanded", "float32"),
    ((0, 3, 7, 7), 1, "contiguous", "float32"),
    ((2, 0, 7, 7), 1, "contiguous", "float32"),
    ((1, 2, 130, 130), 1, "contiguous", "float32"),
    ((1, 3, 130, 130), 4, "contiguous", "float16"),
    ((2, 40, 40, 34), 2, "channels_last", "float32"),
    ((1, 3, 70, 66), 25, "channels_last", "float16"),
    ((1, 1, 70, 300), 36, "sliced", "float32"),
    ((1, 1, 3, 9000), 100, "odd_offset", "float32"),
]
