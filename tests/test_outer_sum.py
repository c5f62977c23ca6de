"""outer_sum, the gradients of a 1x1 convolution to its weight and bias on the CPU, against PyTorch's product."""

from __future__ import annotations

import pytest
import torch
from errors import assert_as_accurate

from spanet_kernels import reference

operator = torch.ops.spanet_kernels.outer_sum.default


def sample(rows, columns, seed=0, dtype=torch.float32):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.3).to(dtype)


def outer(left, right, left_factor=None, right_factor=None, gelu=False):
    return operator(left, left_factor, right, right_factor, gelu)


# one row and column, parts of blocks and strips, more rows than are taken at a time, more blocks than that, each side the longer one
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (5, 3, 17), (300, 8, 48), (256, 64, 64), (513, 37, 200), (260, 530, 33), (100, 65, 1)], ids=str
)
@pytest.mark.parametrize("what", ["alone", "left factor", "both factors", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_accurate_as_the_product(size, dtype, what):
    rows, d, c = size
    sides = sample(rows, d, 0, dtype), sample(rows, c + 5, 1, dtype)[:, 2 : c + 2]
    factors = sample(rows, d + 3, 2, dtype)[:, 3:], sample(rows, c, 3, dtype)
    args = *sides, *(factor if what.startswith(wanted) else None for factor, wanted in zip(factors, ("left", "both"), strict=True))
    args = (*args[:2], factors[0], args[3], False) if what == "both factors" else (*args, what == "gelu")
    found = outer(*args)
    left, right, *factors, gelu = (arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args)
    exact = reference.outer_sum(left, factors[0], right, factors[1], gelu)
    # by PyTorch's product of rows that are rounded to the dtype where the kernel rounds
    left, right, *factors, gelu = args
    plain = reference.outer_sum(left, factors[0], right, factors[1], gelu)
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        assert ours.dtype == torch.float32
        assert_as_accurate(ours, theirs, truth, units=16 if gelu else 4, alike=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        for ours, again in zip(found, outer(*args), strict=True):
            assert torch.equal(ours, again)
    finally:
        torch.set_num_threads(threads)


def test_long_sums_round_little():
    left, right = sample(100_000, 16) + 1, sample(100_000, 16, 1) + 1
    exact, sums = left.double().mT @ right.double(), left.double().sum(0)
    product, left_sums = outer(left, right)
    assert ((product.double() - exact).abs() <= 4e-6 * exact).all()
    assert ((left_sums.double() - sums).abs() <= 4e-6 * sums).all()


def test_what_a_nan_hits():
    left, right = sample(300, 20), sample(300, 50, 1)
    expected, expected_sums = outer(left, right)
    left[7, 3], right[299, 49] = torch.nan, torch.inf
    y, sums = outer(left, right)
    assert sums.isnan().nonzero().flatten().tolist() == [3]
    assert torch.equal(sums[4:], expected_sums[4:])
    assert y[3].isnan().all()
    assert not y[:, 49].isfinite().any()
    y[3], y[:, 49] = expected[3], expected[:, 49]
    assert torch.equal(y, expected)


def test_no_rows_and_no_columns():
    product, sums = outer(torch.empty(0, 3), torch.empty(0, 5))
    assert torch.equal(product, torch.zeros(3, 5))
    assert torch.equal(sums, torch.zeros(3))
    assert outer(torch.empty(4, 0), torch.empty(4, 5))[0].shape == (0, 5)
    assert torch.equal(outer(torch.ones(4, 3), torch.empty(4, 0))[1], torch.full((3,), 4.0))


def test_operator_contract():
    torch.library.opcheck(operator, (sample(9, 5), None, sample(9, 20)[:, 3:], None, True))
    torch.library.opcheck(operator, (sample(9, 5).bfloat16(), sample(9, 5).bfloat16(), sample(9, 8).bfloat16(), None, False))


def test_bad_input():
    rows = sample(4, 6)
    with pytest.raises(RuntimeError, match=r"outer_sum: left and right must have shape \(N, D\) and \(N, C\)"):
        outer(rows[0], rows)
    for left, right in ((rows.double(), rows.double()), (rows, rows.mT), (rows, rows[:, ::2])):
        with pytest.raises(RuntimeError, match=r"outer_sum: left and right must be float32 or bfloat16 .*, with adjacent columns"):
            outer(left, right)
    for right in (rows[:3], rows.bfloat16()):
        with pytest.raises(RuntimeError, match="outer_sum: left and right must have as many rows and one dtype, got 4 and"):
            outer(rows, right)
    for factor in (rows[:3], rows.bfloat16(), rows[0]):
        with pytest.raises(RuntimeError, match="outer_sum: a factor must have the shape and dtype of its side, with adjacent columns"):
            outer(rows, rows, factor)
    with pytest.raises(RuntimeError, match="outer_sum: right has a GELU or a factor"):
        outer(rows, rows, None, rows, gelu=True)
