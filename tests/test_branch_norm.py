"""branch_norm, branch_norm_backward and branch_sum, the norm and the sum of a residual branch on the CPU, against their reference."""

from __future__ import annotations

import pytest
import torch
from errors import assert_as_accurate

from spanet_kernels import reference
from spanet_kernels.testing import make_input

ops = torch.ops.spanet_kernels
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
# one pixel, parts of a vector, several blocks and planes of more vectors than are added up at once
SHAPES = [(1, 3, 1, 1), (3, 37, 7, 9), (2, 64, 17, 16), (2, 5, 61, 67)]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def sample(shape, dtypes, layout):
    """x, n, the gradient of the sum, moments, weight, bias and scale."""
    generator = torch.Generator().manual_seed(shape[1])
    x, n, grad = (make_input(shape, dtype, layout, seed=seed) for seed, dtype in enumerate((*dtypes, dtypes[0])))
    return x, n, grad, ops.image_moments(x, 1e-5), *(torch.randn(3, shape[1], generator=generator) + 1)


def new(x):
    return torch.full_like(x, torch.nan)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_the_reference(shape, dtypes, layout):
    x, n, grad, moments, weight, bias, scale = sample(shape, dtypes, layout)

    def norm(functions, like, x, *args):
        functions.branch_norm(result := new(like), x, *args)
        return result

    def total(functions, *args):
        functions.branch_sum(result := new(args[1]), *args)
        return result

    def gradients(functions, x, *args):
        result = new(x)
        return result, *functions.branch_norm_backward(result, args[0], x, *args[1:])

    def judged(function, *args):
        wide = [None if arg is None else arg.double() for arg in args]
        return function(ops, *args), function(reference, *args), function(reference, *wide)

    assert_as_accurate(*judged(norm, n, x, moments, weight, bias), units=4)
    for factor in (None, scale):
        assert_as_accurate(*judged(total, n, x, factor), units=2)
        for sum_grad in (None, grad):
            if sum_grad is None and factor is not None:
                continue
            results = judged(gradients, x, n, moments, weight, sum_grad, factor)
            for ours, same, exact in zip(*results, strict=True):
                assert ours.shape == exact.shape
                assert_as_accurate(ours, same, exact, units=16)
            threads = torch.get_num_threads()
            try:
                torch.set_num_threads(3 - min(threads, 2))
                for ours, again in zip(results[0], gradients(ops, x, n, moments, weight, sum_grad, factor), strict=True):
                    assert torch.equal(ours, again)
            finally:
                torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", FORMATS)
def test_operator_contract(layout):
    x, n, grad, moments, weight, bias, scale = sample((2, 5, 3, 4), DTYPES[2], layout)
    torch.library.opcheck(ops.branch_norm.default, (torch.zeros_like(n), x, moments, weight, bias))
    for sums in ((None, None), (grad, None), (grad, scale)):
        torch.library.opcheck(ops.branch_norm_backward.default, (torch.zeros_like(x), n, x, moments, weight, *sums))
    torch.library.opcheck(ops.branch_sum.default, (torch.zeros_like(x), n, x, scale))


def test_no_images():
    x, n, grad, moments, weight, _, scale = sample((2, 5, 3, 4), DTYPES[0], "contiguous")
    x, n, grad, moments = (value[:0] for value in (x, n, grad, moments))
    for found in ops.branch_norm_backward(x.clone(), n, x, moments, weight, grad, scale):
        assert torch.equal(found, torch.zeros(5))


def test_bad_input():
    x, n, grad, moments, weight, bias, scale = sample((2, 5, 3, 4), DTYPES[0], "contiguous")
    for message, args in {
        r"x must have shape \(B, C, H, W\)": (n, x[0], moments, weight, bias),
        "x must be contiguous or channels_last": (n, x.mT, moments, weight, bias),
        "n must have the shape, layout of x": (n.contiguous(memory_format=torch.channels_last), x, moments, weight, bias),
        r"moments must be contiguous float32 of shape \(B, 2\)": (n, x, moments[:1], weight, bias),
        r"weight must be contiguous float32 of shape \(C,\)": (n, x, moments, weight[:4], bias),
        "bias must be contiguous": (n, x, moments, weight, bias.bfloat16()),
        "x and n must be float32 or bfloat16, n not wider than x": (n, x.bfloat16(), moments, weight, bias),
    }.items():
        with pytest.raises(RuntimeError, match=f"branch_norm: {message}"):
            ops.branch_norm(*args)
    with pytest.raises(RuntimeError, match="branch_norm: a scale needs sum_grad"):
        ops.branch_norm_backward(torch.empty_like(x), n, x, moments, weight, None, scale)
    with pytest.raises(RuntimeError, match="branch_norm: sum_grad must have the shape, layout and dtype of x"):
        ops.branch_norm_backward(torch.empty_like(x), n, x, moments, weight, grad.bfloat16(), None)
    with pytest.raises(RuntimeError, match="branch_norm: y must have the shape, layout and dtype of x"):
        ops.branch_sum(torch.empty_like(x)[:1], n, x, None)
