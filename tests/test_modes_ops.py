"""mode_coefficients, the first half of the radial filter as an operator of its own, on the CPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from errors import assert_as_accurate

from spanet_kernels import modes, reference
from spanet_kernels.testing import CASES, DTYPES, LAYOUTS, make_input

SHAPES = (*CASES["radial_filter"].test, ((2, 3, 7, 7), None), ((1, 20, 14, 9), None), ((3, 40, 7, 7), 1))
coefficients_of = torch.ops.spanet_kernels.mode_coefficients


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "radius"), SHAPES, ids=str)
def test_error_rule(shape, radius, dtype, layout):
    squared = -1 if radius is None else modes.squared_radius(radius)  # -1: the empty disc
    x, wide = make_input(shape, dtype, layout), modes.profile_dtype(dtype)
    ours = coefficients_of(x, squared)
    assert ours.dtype == wide
    exact = reference.mode_coefficients(x.double(), squared)
    assert_as_accurate(ours, reference.mode_coefficients(x.to(wide), squared), exact, units=2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_equal_whatever_the_batch_and_the_threads(dtype, layout):
    threads = torch.get_num_threads()
    try:
        shapes = (((9, 40, 56, 56), 4), ((9, 40, 14, 14), 1), ((9, 40, 7, 7), 1), ((9, 40, 25, 42), 64), ((2, 200, 50, 84), 4))
        for shape, squared in shapes:
            x = make_input(shape, dtype, layout)
            torch.set_num_threads(1)
            found = coefficients_of(x, squared)
            assert torch.equal(coefficients_of(x[1:2], squared), found[1:2])
            for count in (2, 5):
                torch.set_num_threads(count)
                assert torch.equal(coefficients_of(x, squared), found)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(0, 3, 7, 7), (2, 0, 7, 7)], ids=str)
def test_empty_batch_or_channels(shape):
    assert coefficients_of(make_input(shape, torch.float32), 1).shape == (*shape[:2], 3, 3)


def test_bad_input():
    with pytest.raises(RuntimeError, match="x must be float64, float32, float16 or bfloat16"):
        coefficients_of(torch.ones(2, 3, 7, 7, dtype=torch.int32), 1)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_stays_in_its_plane(layout):
    for (shape, radius), dtype in itertools.product(SHAPES[:9], (torch.float32, torch.bfloat16)):
        x, squared = make_input(shape, dtype, layout), modes.squared_radius(radius)
        clean = coefficients_of(x, squared)
        x[0, 0, -1, -1] = torch.nan
        found = coefficients_of(x, squared)
        others = torch.ones(shape[:2], dtype=torch.bool)
        others[0, 0] = False
        assert found[0, 0].isnan().all()
        assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("capability", ["plain", "avx2"])
def test_lower_instruction_sets(capability):
    """The same tests in a process that is told to use less than the processor has."""
    env = dict(os.environ, SPANET_KERNELS_CPU=capability)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not lower_instruction_sets", __file__]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:]
