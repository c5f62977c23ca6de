"""outer_sum, the gradient of a 1x1 convolution to its weight on the CPU, against PyTorch's product."""

from __future__ import annotations

import pytest
import torch
from errors import assert_as_accurate

import spanet_kernels  # noqa: F401  loads the operators

operator = torch.ops.spanet_kernels.outer_sum.default


def sample(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.3


# one row and column, parts of blocks and strips, more rows than are taken at a time, more blocks than that, each side the longer one
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (5, 3, 17), (300, 8, 48), (256, 64, 64), (513, 37, 200), (260, 530, 33), (100, 65, 1)], ids=str
)
def test_as_accurate_as_the_product(size):
    rows, d, c = size
    left, right = sample(rows, d), sample(rows, c + 5, 1)[:, 2 : c + 2]
    exact = left.double().mT @ right.double()
    y = operator(left, right)
    assert_as_accurate(y, left.mT @ right, exact, units=2, alike=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(operator(left, right), y)
    finally:
        torch.set_num_threads(threads)


def test_long_sums_round_little():
    left, right = sample(100_000, 16) + 1, sample(100_000, 16, 1) + 1
    exact = left.double().mT @ right.double()
    assert ((operator(left, right).double() - exact).abs() <= 4e-6 * exact).all()


def test_what_a_nan_hits():
    left, right = sample(300, 20), sample(300, 50, 1)
    expected = operator(left, right)
    left[7, 3], right[299, 49] = torch.nan, torch.inf
    y = operator(left, right)
    assert y[3].isnan().all()
    assert not y[:, 49].isfinite().any()
    y[3], y[:, 49] = expected[3], expected[:, 49]
    assert torch.equal(y, expected)


def test_no_rows_and_no_columns():
    assert torch.equal(operator(torch.empty(0, 3), torch.empty(0, 5)), torch.zeros(3, 5))
    assert operator(torch.empty(4, 0), torch.empty(4, 5)).shape == (0, 5)


def test_operator_contract():
    torch.library.opcheck(operator, (sample(9, 5), sample(9, 20)[:, 3:]))


def test_bad_input():
    rows = sample(4, 6)
    for left, right in ((rows[0], rows), (rows.double(), rows.double()), (rows, rows.mT), (rows, rows[:, ::2])):
        with pytest.raises(RuntimeError, match=r"outer_sum: left and right must be float32 of shape \(N, D\) and \(N, C\)"):
            operator(left, right)
    with pytest.raises(RuntimeError, match="outer_sum: left and right must have as many rows, got 4 and 3"):
        operator(rows, rows[:3])
