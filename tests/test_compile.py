"""torch.compile, torch.export, autocast, opcheck, copies: the operator behaves like one of PyTorch's own."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from spanet_kernels import SPF, radial_filter, spectral_pool
from spanet_kernels.testing import DTYPES, make_input, make_profile

FILTER = torch.ops.spanet_kernels.radial_filter.default
BACKWARD = torch.ops.spanet_kernels.radial_filter_backward.default


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 4, 5), (2, 0, 4, 5)], ids=str)
def test_opcheck(shape, dtype, layout):
    if 0 in shape and layout in ("sliced", "offset"):
        layout = "channels_last"  # opcheck itself cannot copy an empty slice
    x = make_input(shape, dtype, layout).requires_grad_()
    base, gain = (p.requires_grad_() for p in make_profile(shape[1], 2, dtype))
    grad = make_input(shape, dtype, layout, seed=2).requires_grad_()
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    torch.library.opcheck(FILTER, (x, base, gain, 4), atol=tolerance, rtol=tolerance)
    torch.library.opcheck(BACKWARD, (grad, x, 4), atol=tolerance, rtol=tolerance)


class Model(nn.Module):
    def __init__(self, learnable):
        super().__init__()
        self.filters = nn.Sequential(SPF(0.7, 2, 1 / 3, learnable), nn.GELU(), SPF(torch.rand(8), 1.5), SPF(0.9, 1.0))

    def forward(self, x):
        return self.filters(x) * 2


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("learnable", [False, True])
def test_fullgraph_dynamic_shapes_without_recompiling(learnable):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(learnable)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in ((2, 17, 16), (3, 20, 24), (4, 31, 17), (2, 56, 57), (5, 40, 33), (6, 28, 64)):
        x = make_input((size[0], 8, *size[1:]), torch.float32).requires_grad_()
        wanted = [x, *model.parameters()]
        expected, actual = model(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        weight = torch.randn_like(expected)
        for a, b in zip(torch.autograd.grad(actual, wanted, weight), torch.autograd.grad(expected, wanted, weight), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("function", [lambda x, lam: spectral_pool(x, lam, 2, 1 / 3), lambda x, lam: spectral_pool(x, lam, 1.5)])
def test_numbers_as_arguments(function):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    x = make_input((2, 8, 14, 14), torch.float32, "channels_last")
    for lam in (0.5, 0.7, 0.9):
        y = compiled(x, lam)
        torch.testing.assert_close(y, function(x, lam))
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_compiled_profile_and_both_paths():
    torch._dynamo.reset()
    base, gain = (p.requires_grad_() for p in make_profile(4, 40, torch.float32))
    x = make_input((1, 4, 90, 70), torch.float32)
    compiled = torch.compile(lambda x, b, g: radial_filter(x, b, g, 40), fullgraph=True)
    torch.testing.assert_close(compiled(x, base, gain), radial_filter(x, base, gain, 40), rtol=1e-4, atol=1e-4)
    large = make_input((1, 1, 300, 290), torch.float32)
    compiled = torch.compile(lambda x: spectral_pool(x, 0.7, 140), fullgraph=True)
    torch.testing.assert_close(compiled(large), spectral_pool(large, 0.7, 140), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model = Model(learnable=True)
    batch, height, width = Dim("b", min=1, max=64), Dim("h", min=8, max=1024), Dim("w", min=8, max=1024)
    shapes = ({0: batch, 2: height, 3: width},)
    program = export(model, (torch.randn(2, 8, 16, 18),), dynamic_shapes=shapes, strict=strict)
    calls = [node for node in program.graph.nodes if node.target is FILTER]
    assert len(calls) == 3
    for shape in ((2, 8, 16, 18), (3, 8, 21, 30), (1, 8, 56, 56)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), model(x))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_dtype_it_is_given(dtype):
    """The filter is not on autocast's lists: it computes in the dtype of its input, as in eager code around it."""
    layer = nn.Sequential(nn.Conv2d(4, 8, 1), SPF(0.7, 2, learnable=True))
    x = torch.randn(2, 4, 14, 14)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer[1].lam.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_in_any_dtype(dtype):
    layer = SPF(torch.rand(8), 2, learnable=True).to(dtype)
    x = make_input((2, 8, 9, 11), dtype)
    layer(x).sum().backward()
    assert layer.lam.grad.dtype == dtype
    torch.testing.assert_close(layer(x), spectral_pool(x, layer.lam.detach(), 2))


@pytest.mark.parametrize("learnable", [False, True])
def test_copies_and_state(learnable):
    layer = SPF(0.7, 2, 1 / 3, learnable)
    x = torch.randn(2, 8, 14, 14, requires_grad=True)
    layer(x).sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert list(layer.state_dict()) == (["lam"] if learnable else [])
    assert "radius=2" in repr(layer)


def test_a_parameter_as_lam_is_shared():
    lam = nn.Parameter(torch.tensor(0.7))
    layers = nn.Sequential(SPF(lam, 2), SPF(lam, 3))
    assert list(layers.parameters()) == [lam]
    layers(torch.randn(2, 8, 14, 14)).square().sum().backward()
    assert lam.grad is not None


def test_inference_mode_first_then_training():
    """What inference mode leaves in the caches serves autograd afterwards."""
    x = torch.randn(2, 8, 15, 13)
    with torch.inference_mode():
        first = spectral_pool(x, 0.71, 2.5)
    x.requires_grad_()
    y = spectral_pool(x, 0.71, 2.5)
    assert torch.equal(first, y)
    y.sum().backward()
