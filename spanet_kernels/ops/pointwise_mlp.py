"""The MLP of a block, two 1x1 convolutions around a GELU: PyTorch's own operators, put together so that few bytes move."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..products import linear, onednn_serves
from .checks import check_input, check_parameter


def pointwise_mlp(x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None) -> Tensor:
    """W_out gelu(W_in x + b_in) + b_out at every position, with the exact GELU.

    Without gradients, on a CPU and with adjacent channels, the GELU is done where oneDNN's product is written; otherwise, and under
    torch.compile, which fuses by itself, it is what `Conv2d`, `GELU`, `Conv2d` compute.

    Args:
        x: (B, C, H, W), float64, float32, float16 or bfloat16; under autocast it is cast to autocast's dtype.
        weight_in: (D, C, 1, 1); weight_out: (E, D, 1, 1), of the dtype of x, like the biases (D,) and (E,) or None.

    Returns:
        (B, E, H, W), dtype of x, channels_last if x is.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a wrong rank, shape or device, an empty plane.
    """
    check_input("pointwise_mlp", x)
    hidden, out = (weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 0 for weight in (weight_in, weight_out))
    check_parameter("pointwise_mlp", "weight_in", weight_in, (hidden, x.shape[1], 1, 1), x)
    check_parameter("pointwise_mlp", "weight_out", weight_out, (out, hidden, 1, 1), x)
    if _fuses(x, weight_in):
        rows = linear(x.movedim(1, -1), weight_in[:, :, 0, 0], bias_in, gelu=True)
        return linear(rows, weight_out[:, :, 0, 0], bias_out).movedim(-1, 1)
    return functional.conv2d(functional.gelu(functional.conv2d(x, weight_in, bias_in)), weight_out, bias_out)


def _fuses(x: Tensor, weight: Tensor) -> bool:
    return bool(
        not torch.compiler.is_compiling()
        and onednn_serves(x)
        and x.dtype == weight.dtype
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch._C._are_functorch_transforms_active()
    )
