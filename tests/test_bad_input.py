"""Every bad argument gets one clear error that names it, what came and what is wanted, before anything is computed."""

from __future__ import annotations

import re

import pytest
import torch

from spanet_kernels import SPF, radial_filter, spectral_pool, use

X = torch.randn(2, 3, 8, 8)
BASE, GAIN = torch.randn(3), torch.randn(4, 3)
META = torch.device("meta")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], BASE, GAIN, 2), TypeError, "x must be a tensor, got list"),
        ((X.int(), BASE, GAIN, 2), TypeError, "x must be float64, float32, float16 or bfloat16, got torch.int32"),
        ((X.to(torch.complex64), BASE, GAIN, 2), TypeError, "got torch.complex64"),
        ((X[0], BASE, GAIN, 2), ValueError, "x must have shape (B, C, H, W), got (3, 8, 8)"),
        ((X[None], BASE, GAIN, 2), ValueError, "got (1, 2, 3, 8, 8)"),
        ((X[:, :, :0], BASE, GAIN, 2), ValueError, "at least one row and one column, got (2, 3, 0, 8)"),
        ((X[..., :0], BASE, GAIN, 2), ValueError, "got (2, 3, 8, 0)"),
        ((X, 0.3, GAIN, 2), TypeError, "base must be a tensor, got float"),
        ((X, BASE[:2], GAIN, 2), ValueError, "base must have shape (3,) for radius 2 and 3 channels, got (2,)"),
        ((X, BASE[None], GAIN, 2), ValueError, "got (1, 3)"),
        ((X, BASE, GAIN[:3], 2), ValueError, "gain must have shape (4, 3) for radius 2 and 3 channels, got (3, 3)"),
        ((X, BASE, GAIN, 1), ValueError, "gain must have shape (2, 3) for radius 1 and 3 channels, got (4, 3)"),
        ((X, BASE.double(), GAIN, 2), TypeError, "base must be torch.float32 for an x of torch.float32, got torch.float64"),
        ((X, BASE, GAIN.bfloat16(), 2), TypeError, "gain must be torch.float32 for an x of torch.float32, got torch.bfloat16"),
        ((X.double(), BASE, GAIN, 2), TypeError, "base must be torch.float64 for an x of torch.float64, got torch.float32"),
        ((X, BASE.to(META), GAIN, 2), ValueError, "base must be on cpu like x, got meta"),
        ((X, BASE, GAIN.to(META), 2), ValueError, "gain must be on cpu like x, got meta"),
        ((X, BASE, GAIN, -1), ValueError, "radius must be at least 0, got -1"),
        ((X, BASE, GAIN, float("nan")), ValueError, "radius must be at least 0, got nan"),
        ((X, BASE, GAIN, "2"), TypeError, "radius must be a number, got str"),
        ((X, BASE, GAIN, True), TypeError, "radius must be a number, got bool"),
        ((X, BASE, GAIN, torch.tensor(2.0)), TypeError, "radius must be a number, got Tensor"),
        ((X, BASE, GAIN, float("inf")), ValueError, "radius must be at most 8192"),
        ((X, BASE, GAIN, 1e9), ValueError, "radius must be at most 8192"),
    ],
)
def test_radial_filter(arguments, error, message):
    radial_filter(X, BASE, GAIN, 2)  # from here on the radius is known: the operator checks first
    with pytest.raises(error, match=re.escape(message)) as raised:
        radial_filter(*arguments)
    assert str(raised.value).startswith("radial_filter: ")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, 0.7, 2), TypeError, "x must be a tensor, got NoneType"),
        ((X.long(), 0.7, 2), TypeError, "got torch.int64"),
        ((X[0], 0.7, 2), ValueError, "x must have shape (B, C, H, W), got (3, 8, 8)"),
        ((X[..., :0], 0.7, 2), ValueError, "got (2, 3, 8, 0)"),
        ((X, float("nan"), 2), ValueError, "lam must be finite, got nan"),
        ((X, float("-inf"), 2), ValueError, "lam must be finite, got -inf"),
        ((X, "0.7", 2), TypeError, "lam must be a number or a tensor, got str"),
        ((X, torch.tensor(1), 2), TypeError, "lam must be a floating-point tensor, got torch.int64"),
        ((X, torch.rand(4), 2), ValueError, "lam must broadcast to (3,), one value per channel, got shape (4,)"),
        ((X, torch.rand(1, 3), 2), ValueError, "got shape (1, 3)"),
        ((X, torch.rand(3, device="meta"), 2), ValueError, "lam must be on cpu like x, got meta"),
        ((X, 0.7, -0.5), ValueError, "radius must be at least 0, got -0.5"),
        ((X, 0.7, None), TypeError, "radius must be a number, got NoneType"),
        ((X, 0.7, 2, float("inf")), ValueError, "boundary must be None or a finite number, got inf"),
        ((X, 0.7, 2, "third"), ValueError, "boundary must be None or a finite number, got 'third'"),
        ((X, 0.7, 2, True), ValueError, "boundary must be None or a finite number, got True"),
    ],
)
def test_spectral_pool(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        spectral_pool(*arguments)
    assert str(raised.value).startswith("spectral_pool: ")


def test_lam_that_is_not_finite_in_a_module():
    with pytest.raises(ValueError, match="lam must be finite"):
        SPF(float("nan"), 2)(X)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="implementation must be"), use("fastest"):
        pass


def test_operators_check_what_would_corrupt_memory():
    for x, base, gain in (
        (X, BASE[:2], GAIN),
        (X, BASE[None], GAIN),
        (X, BASE.double(), GAIN),
        (X, BASE, GAIN[:3]),
        (X, BASE, GAIN.flatten()),
        (X, BASE, GAIN.bfloat16()),
        (X[:0], BASE, GAIN[:3]),
    ):
        with pytest.raises(RuntimeError, match="base must have shape"):
            torch.ops.spanet_kernels.radial_filter(x, base, gain, 4)
    for x in (X[0], X[:, :, :0], X[..., :0]):
        with pytest.raises(RuntimeError, match="x must have shape"):
            torch.ops.spanet_kernels.radial_filter(x, BASE, GAIN, 4)
    for x in (X.int(), X[:0].int(), X.to(torch.complex64)):
        with pytest.raises(RuntimeError, match="must be float64, float32, float16 or bfloat16"):
            torch.ops.spanet_kernels.radial_filter(x, BASE, GAIN, 4)
    with pytest.raises(RuntimeError, match="at least 4 dimensions, got 2"):
        torch.ops.spanet_kernels.mode_coefficients(X[0, 0], 4)
    with pytest.raises(RuntimeError, match="grad must have the shape"):
        torch.ops.spanet_kernels.radial_filter_backward(X[:1], X, 4)


def test_empty_batch_and_channels_are_fine():
    for shape in ((0, 3, 8, 8), (2, 0, 8, 8)):
        x = torch.randn(shape, requires_grad=True)
        y = radial_filter(x, torch.randn(shape[1]), torch.randn(4, shape[1]), 2)
        assert y.shape == shape
        y.sum().backward()
        assert spectral_pool(x, 0.7, 1).shape == shape
