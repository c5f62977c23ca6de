"""What every public function asks of its arguments, and the one error for each that is wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import modes
from ..products import Branch, DropPath

PROFILE_DTYPE = {dtype: modes.profile_dtype(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def check_radius(op: str, radius: float) -> float:
    if isinstance(radius, np.number):
        radius = radius.item()
    if not isinstance(radius, (int, float)) or isinstance(radius, bool):
        raise TypeError(f"{op}: radius must be a number, got {type(radius).__name__}")
    if not radius >= 0:
        raise ValueError(f"{op}: radius must be at least 0, got {radius}")
    if torch.compiler.is_compiling():
        (radius,) = {radius}  # torch.compile takes the members of a set as constants, also where it keeps numbers symbolic
    return radius


def check_boundary(op: str, boundary: float) -> float:
    return _finite(op, "boundary", boundary, "None or a finite number")


def count_shells(op: str, radius_squared: int) -> int:
    """Of a profile with a gain for each."""
    try:
        return len(modes.shells(radius_squared))
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None


def check_input(op: str, x: Tensor, name: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in PROFILE_DTYPE:
        raise TypeError(f"{op}: {name} must be float64, float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must have shape (B, C, H, W), got {tuple(x.shape)}")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{op}: {name} must have at least one row and one column, got {tuple(x.shape)}")


def check_parameter(op: str, name: str, value: Tensor | None, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """value, zeros in place of a bias that is None, or an error that names it."""
    if value is None and "bias" in name:
        return x.new_zeros(shape)
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {shape} for {x.shape[1]} channels, got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} like its input, got {value.device}")
    return value


def check_branch(
    op: str,
    x: Tensor,
    shape: tuple[int, ...],
    norm: tuple[Tensor, Tensor, float] | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    drop_path: tuple[Tensor, float] | None,
) -> Branch:
    """What stands around an operator from x to a result of this shape, or an error that names what does not fit."""
    weight, bias, eps = (None, None, 0.0) if norm is None else _parts_of(op, "norm", norm, ("weight", "bias", "eps"))
    if norm is not None:
        eps = _finite(op, "the eps of norm", eps)
        # a norm without a weight has ones
        weight = x.new_ones(x.shape[1]) if weight is None else check_parameter(op, "the weight of norm", weight, (x.shape[1],), x)
        bias = check_parameter(op, "the bias of norm", bias, (x.shape[1],), x)
    if residual is not None:
        check_parameter(op, "residual", residual, shape, x)
    if residual_scale is not None:
        check_parameter(op, "residual_scale", residual_scale, (shape[1],), x)
        if residual is None:
            raise ValueError(f"{op}: residual_scale needs a residual, got none")
    if drop_path is None:
        return Branch(weight, bias, eps, residual, residual_scale)
    kept, factor = _parts_of(op, "drop_path", drop_path, ("kept", "factor"))
    kept = check_parameter(op, "kept of drop_path", kept, (x.shape[0],), x).detach()
    factor = _finite(op, "the factor of drop_path", factor)
    return Branch(weight, bias, eps, residual, residual_scale, DropPath(kept, factor))


# what an operator, or a look at its arguments, raises where these do not fit
UNFIT = AttributeError, IndexError, RuntimeError, TypeError, ValueError


def unchecked_branch(
    norm: tuple[Tensor, Tensor, float] | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    drop_path: tuple[Tensor, float] | None,
) -> Branch | None:
    """`check_branch` of arguments that nobody has looked at, for an operator that will; None where it would take them for others, or does
    not have them."""
    if drop_path is not None or (residual is None and residual_scale is not None):
        return None
    if norm is None:
        return Branch(residual=residual, scale=residual_scale)
    weight, bias, eps = norm
    there = weight is not None and bias is not None and type(eps) is float and math.isfinite(eps)
    return Branch(weight, bias, eps, residual, residual_scale) if there else None


def _parts_of(op: str, name: str, value: Any, parts: tuple[str, ...]) -> Any:
    if not isinstance(value, (tuple, list)) or len(value) != len(parts):
        came = f"{len(value)} values" if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"{op}: {name} must be ({', '.join(parts)}), got {came}")
    return value


def _finite(op: str, name: str, value: Any, wanted: str = "a finite number") -> float:
    if isinstance(value, np.number):
        value = value.item()
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be {wanted}, got {value!r}")
    return value


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast x to, None where it leaves x alone."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def odd_size(op: str, row_weight: Tensor) -> int:
    """k of the weight (C, 1, 1, k) of an axial convolution, or an error where it is not odd."""
    size = row_weight.shape[-1] if isinstance(row_weight, Tensor) and row_weight.dim() else 0
    if size % 2 == 0:
        came = tuple(row_weight.shape) if isinstance(row_weight, Tensor) else type(row_weight).__name__
        raise ValueError(f"{op}: row_weight must have shape (C, 1, 1, k) with an odd k, got {came}")
    return size
