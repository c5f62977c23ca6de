"""Eager inference on a CPU hands its arguments to operators that refuse what does not fit, and looks at none of them before: the results
and the errors are those of the other way, which looks at all."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from spanet.model import Block
from spanet_kernels import pointwise_mlp, products, spectral_mixer
from spanet_kernels._native import cpu_capability
from spanet_kernels.testing import make_input, make_profile

SHAPE = 2, 32, 12, 11
OPS = [sys.modules[f"spanet_kernels.ops.{name}"] for name in ("spectral_mixer", "pointwise_mlp")]

pytestmark = pytest.mark.skipif(cpu_capability() == "plain", reason="there are no kernels of the branch")


@pytest.fixture(autouse=True)
def _serves(monkeypatch):
    monkeypatch.setattr(products, "PAIR_POSITIONS", 0)


def refuse(*_):
    raise AssertionError("somebody looked")


def values(*size, dtype=torch.float32):
    return (torch.randn(size, generator=torch.Generator().manual_seed(len(size) + size[-1])) / 6).to(dtype)


def mixer_arguments(dtype=torch.float32, layout="contiguous"):
    c = SHAPE[1]
    convs = {"row_weight": values(c, 1, 1, 7), "row_bias": values(c), "column_weight": values(c, 1, 7, 1), "column_bias": values(c)}
    square, flat = values(c, c, dtype=dtype), values(c, dtype=dtype)
    matrices = {"in_weight": square, "weight": square + 0.1, "out_weight": square.T.contiguous()}
    biases = {"in_bias": flat, "bias": flat + 1, "out_bias": flat}
    base, gain = make_profile(c, 1, dtype)
    x = make_input(SHAPE, dtype, layout)
    around = {"residual": x, "residual_scale": flat, "norm": (1 + flat, flat, 1e-5)}
    return {"x": x, **matrices, **biases, **convs, "base": base, "gain": gain, "radius": 1, **around}


def mlp_arguments(dtype=torch.float32, layout="contiguous"):
    c, flat, x = SHAPE[1], values(SHAPE[1], dtype=dtype), make_input(SHAPE, dtype, layout)
    weights = {"weight_in": values(2 * c, c, 1, 1, dtype=dtype), "weight_out": values(c, 2 * c, 1, 1, dtype=dtype)}
    biases = {"bias_in": values(2 * c, dtype=dtype), "bias_out": flat}
    return {"x": x, **weights, **biases, "residual": x, "residual_scale": flat, "norm": (1 + flat, flat, 1e-5)}


FUNCTIONS = {"spectral_mixer": (spectral_mixer, mixer_arguments), "pointwise_mlp": (pointwise_mlp, mlp_arguments)}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nobody_looks(dtype, layout, monkeypatch):
    block = Block(32, 0.0, True, {"radius": 2}).to(dtype)
    x = make_input(SHAPE, dtype, layout)
    with torch.enable_grad():
        expected = block.requires_grad_(False)(x)
    for module in OPS:
        monkeypatch.setattr(module, "check_parameter", refuse)
        monkeypatch.setattr(module, "check_branch", refuse)
    with torch.no_grad():
        assert torch.equal(block(x), expected)
    with torch.inference_mode():
        assert torch.equal(block(x), expected)
    with pytest.raises(AssertionError, match="somebody looked"):
        block(x)


C = SHAPE[1]
BOTH = [
    ("residual", lambda: values(2, C, 12, 10)),
    ("residual", lambda: values(C, 12, 11)),
    ("residual", lambda: values(*SHAPE, dtype=torch.float64).long()),
    ("residual", lambda: None),
    ("residual_scale", lambda: values(C - 1)),
    ("norm", lambda: (values(C), values(C))),
    ("norm", lambda: (values(C - 1), values(C), 1e-5)),
    ("norm", lambda: (values(C), values(C), float("nan"))),
    ("norm", lambda: 3),
    ("x", lambda: values(2, C, 12)),
    ("x", lambda: values(2, C, 12, 0)),
    ("x", lambda: values(2, C + 32, 12, 11)),
    ("x", lambda: nn.Identity()),
]
WRONG = [(name, *case) for name in FUNCTIONS for case in BOTH] + [
    ("spectral_mixer", "in_weight", lambda: values(2 * C, C)),
    ("spectral_mixer", "in_weight", lambda: values(C, C, 1, 1)),
    ("spectral_mixer", "weight", lambda: values(2 * C, C)),
    ("spectral_mixer", "out_weight", lambda: values(2 * C, C)),
    ("spectral_mixer", "out_weight", lambda: 3),
    ("spectral_mixer", "in_bias", lambda: values(1)),
    ("spectral_mixer", "row_weight", lambda: values(C, 7)),
    ("spectral_mixer", "row_weight", lambda: values(C, 1, 7, 1)),
    ("spectral_mixer", "row_weight", lambda: values(C, 1, 1, 6)),
    ("spectral_mixer", "column_weight", lambda: values(C, 1, 5, 1)),
    ("spectral_mixer", "column_bias", lambda: values(C + 1)),
    ("spectral_mixer", "base", lambda: values(C - 1)),
    ("spectral_mixer", "gain", lambda: values(3, C)),
    ("spectral_mixer", "radius", lambda: -1),
    ("spectral_mixer", "radius", lambda: True),
    ("spectral_mixer", "radius", lambda: float("nan")),
    ("spectral_mixer", "radius", lambda: 1e9),
    ("spectral_mixer", "radius", lambda: None),  # with the gain of a disc
    ("pointwise_mlp", "weight_in", lambda: values(2 * C, C)),
    ("pointwise_mlp", "weight_in", lambda: values(2 * C, 32, 3, 3)),
    ("pointwise_mlp", "weight_out", lambda: values(C, C, 1, 1)),
    ("pointwise_mlp", "bias_in", lambda: values(C)),
    ("pointwise_mlp", "bias_out", lambda: "none"),
]


@pytest.mark.parametrize(("name", "argument", "wrong"), WRONG)
def test_the_same_errors(name, argument, wrong):
    function, arguments = FUNCTIONS[name]
    errors = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises((TypeError, ValueError)) as caught:
            function(**arguments() | {argument: wrong()})
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
    assert errors[0][1].startswith(f"{name}: ")


def test_without_a_filter():
    given = mixer_arguments() | {"radius": None}
    given["gain"] = given["gain"][:0]
    expected = spectral_mixer(**given)
    with torch.no_grad():
        assert torch.equal(spectral_mixer(**given), expected)
        with pytest.raises(ValueError, match="base must have shape"):
            spectral_mixer(**given | {"base": given["base"][:1]})


OTHERS = [
    ("norm", lambda given: (None, None, 1e-5)),
    ("norm", lambda given: (given[0], given[1], 1)),
    ("norm", lambda given: (given[0], given[1], np.float64(1e-3))),
    ("norm", lambda given: None),
    ("residual", lambda given: given.mT.contiguous().mT),
    ("residual_scale", lambda given: None),
]
ACCEPTED = [(name, *case) for name in FUNCTIONS for case in OTHERS] + [
    ("spectral_mixer", "in_bias", lambda given: None),
    ("spectral_mixer", "row_bias", lambda given: None),
    ("spectral_mixer", "row_weight", lambda given: given.double()),
    ("spectral_mixer", "column_weight", lambda given: given.bfloat16()),
    ("spectral_mixer", "weight", lambda given: given.double()),
    ("spectral_mixer", "weight", lambda given: given.T),
    ("spectral_mixer", "base", lambda given: given.double()),
    ("spectral_mixer", "gain", lambda given: given[:1].expand_as(given)),
    ("spectral_mixer", "x", lambda given: given[:, :, ::2]),
    ("pointwise_mlp", "bias_in", lambda given: None),
    ("pointwise_mlp", "weight_in", lambda given: given.bfloat16()),
    ("pointwise_mlp", "x", lambda given: given.expand(*SHAPE)[:, :, :, ::2]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "argument", "other"), ACCEPTED)
def test_the_same_results(name, argument, other, dtype):
    function, arguments = FUNCTIONS[name]
    given = arguments(dtype, "channels_last")
    given[argument] = other(given[argument])
    given["residual"] = given["x"] if argument == "x" else given["residual"]
    expected = function(**given)
    with torch.no_grad():
        y = function(**given)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, expected)
