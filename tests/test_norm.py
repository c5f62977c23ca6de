"""image_norm, the norm of a residual branch on GPUs, and column_sums, by their reference: values, derivatives, contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from spanet_kernels import modes
from spanet_kernels.ops import image_norm as module
from spanet_kernels.products import Branch
from spanet_kernels.testing import DTYPES, make_input

ops = torch.ops.spanet_kernels


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_a_group_norm_in_the_layout_of_its_input(dtype, layout):
    wide = modes.profile_dtype(dtype)
    x = make_input((3, 6, 5, 7), dtype, layout)
    weight, bias = torch.randn(2, 6).to(wide)
    y, moments = ops.image_norm(x, weight, bias, 1e-5)
    exact = functional.group_norm(x.double(), 1, weight.double(), bias.double(), 1e-5)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=modes.memory_format(x))
    torch.testing.assert_close(y.double(), exact, atol=8 * torch.finfo(dtype).eps * exact.abs().max().item(), rtol=0)
    torch.testing.assert_close(moments[:, 0].double(), x.double().mean((1, 2, 3)), atol=1e-6, rtol=1e-6)


def test_derivatives_of_every_order():
    x = make_input((2, 3, 4, 5), torch.float64).requires_grad_()
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def norm(x, weight, bias):
        return module._call(x, weight, bias, 1e-5)[0]

    assert torch.autograd.gradcheck(norm, (x, weight, bias))
    assert torch.autograd.gradgradcheck(norm, (x, weight, bias))


def test_contract():
    x, weight, bias = make_input((2, 3, 4, 5), torch.float32, "channels_last"), torch.randn(3), torch.randn(3)
    moments = ops.image_norm(x, weight, bias, 1e-5)[1]
    torch.library.opcheck(ops.image_norm.default, (x, weight, bias, 1e-5))
    torch.library.opcheck(ops.image_norm_backward.default, (x, x, moments, weight))
    torch.library.opcheck(ops.column_sums.default, (torch.randn(5, 3).bfloat16(),))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_branch_leaves_other_devices_and_graphs_to_pytorch(layout):
    x = make_input((2, 6, 5, 7), torch.float32, layout)
    branch = Branch(torch.randn(6), torch.randn(6), 1e-5)
    expected = functional.group_norm(x, 1, *branch[:3])
    assert torch.equal(module.normalised(branch, x), expected)
    assert torch.equal(torch.compile(module.normalised, fullgraph=True, backend="aot_eager")(branch, x), expected)
    assert module.normalised(Branch(), x) is x
