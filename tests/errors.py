"""The error rule: at most 1.25 times (max) and 1.0 times (rms) the error of the same-dtype reference, against fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(ours: Tensor, same_dtype: Tensor, exact: Tensor, units: float = 1.0, alike: bool = False) -> None:
    """ours against exact (fp64), compared with same_dtype against exact.

    Errors below `units` rounding units of the largest exact value (a quarter of that in rms) pass: they decide small samples,
    where the reference is exact by luck. Where both sides round alike, intermediate results included, their errors are two samples
    of one distribution: the bound on the rms is widened by three standard errors of their ratio, 3 / sqrt(n), that on the maximum,
    which scatters more, by that and a fifth.
    """
    assert ours.shape == exact.shape
    assert not (ours.isnan() & ~exact.isnan()).any(), "NaN where there is none"
    if exact.numel() == 0:
        return
    error, bound = (ours.double() - exact).abs(), (same_dtype.double() - exact).abs()
    largest = exact.abs().max().item()
    if ours.dtype == torch.float64:  # the reference itself: only rounding may differ
        assert error.max() <= 2e-14 * units * (1 + largest), f"error {error.max():.3g} for values up to {largest:.3g}"
        return
    widened = 1 + 3 / exact.numel() ** 0.5 if alike else 1.0
    slack = units * torch.finfo(torch.float32).eps * largest
    most = (1.5 if alike else 1.25) * widened * bound.max() + slack
    assert error.max() <= most, f"max error {error.max():.3g}, reference {bound.max():.3g}, slack {slack:.3g}"
    rms, bound_rms = error.square().mean().sqrt(), bound.square().mean().sqrt()
    assert rms <= widened * bound_rms + slack / 4, f"rms error {rms:.3g}, reference {bound_rms:.3g}, slack {slack / 4:.3g}"
