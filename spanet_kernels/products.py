"""Matrix products over the channels of every position: oneDNN's where it serves the dtype on a CPU, PyTorch's elsewhere.

oneDNN adds the bias and applies the GELU where it writes the product; PyTorch's `linear` on a CPU writes the bias first and adds to it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_DTYPES = {torch.float32} if torch.backends.mkldnn.is_available() else set()
if _DTYPES and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _DTYPES.add(torch.bfloat16)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """rows W^T + b, (..., C) to (..., D), and its exact GELU if asked for; not differentiable."""
    if onednn_serves(rows) and rows.is_contiguous():
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "gelu" if gelu else "none", [], "none")
        return y
    y = functional.linear(rows, weight, bias)
    return functional.gelu(y) if gelu else y


def onednn_serves(x: Tensor) -> bool:
    return bool(x.device.type == "cpu" and x.dtype in _DTYPES and x.numel() > 0 and torch.backends.mkldnn.enabled)
