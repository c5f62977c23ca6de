"""The two halves of the radial filter as operators of their own, mode_coefficients and add_modes, on the CPU."""

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
coefficients_of, add_modes = torch.ops.spanet_kernels.mode_coefficients, torch.ops.spanet_kernels.add_modes


def sample(shape, radius, dtype, layout, seed=0):
    """x, coefficients of another x, a factor, and the squared radius (None: -1, the empty disc)."""
    squared = -1 if radius is None else modes.squared_radius(radius)
    x, factor = make_input(shape, dtype, layout, seed=seed), make_input(shape, dtype, layout, seed=seed + 1)
    other = make_input(shape, modes.profile_dtype(dtype), seed=seed + 2)
    return x, reference.mode_coefficients(other, squared), factor, squared


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "radius"), SHAPES, ids=str)
def test_error_rule(shape, radius, dtype, layout):
    check(shape, radius, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streamed(dtype):
    """Results large enough to be written past the caches."""
    check((2, 48, 180, 180), 2, dtype, "contiguous")


def check(shape, radius, dtype, layout):
    x, z, factor, squared = sample(shape, radius, dtype, layout)
    wide = modes.profile_dtype(dtype)
    ours = coefficients_of(x, squared)
    assert ours.dtype == wide
    exact = reference.mode_coefficients(x.double(), squared)
    assert_as_accurate(ours, reference.mode_coefficients(x.to(wide), squared), exact, units=2)
    for by in (None, factor, factor.clone(), factor.contiguous(memory_format=torch.channels_last)):
        y = add_modes(x, z, by, squared)
        assert y.dtype == dtype
        last = modes.channels_last(x)
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        exact = reference.add_modes(x.double(), z.double(), None if by is None else by.double(), squared)
        assert_as_accurate(y, reference.add_modes(x, z, by, squared), exact, units=2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_equal_whatever_the_batch_and_the_threads(dtype, layout):
    threads = torch.get_num_threads()
    try:
        for size, radius in (((56, 56), 2), ((14, 14), 1), ((7, 7), 1), ((25, 42), 8)):
            x, z, factor, squared = sample((9, 40, *size), radius, dtype, layout)
            torch.set_num_threads(1)
            found, y = coefficients_of(x, squared), add_modes(x, z, factor, squared)
            assert torch.equal(coefficients_of(x[4:5], squared), found[4:5])
            assert torch.equal(add_modes(x[4:5], z[4:5], factor[4:5], squared), y[4:5])
            for count in (2, 5):
                torch.set_num_threads(count)
                assert torch.equal(coefficients_of(x, squared), found)
                assert torch.equal(add_modes(x, z, factor, squared), y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_coefficients_of_any_strides(dtype):
    for layout in ("contiguous", "channels_last"):
        x, z, factor, squared = sample((2, 20, 14, 14), 1, dtype, layout)
        expected = add_modes(x, z, factor, squared)
        for other in (z.contiguous(memory_format=torch.channels_last), z.transpose(2, 3).contiguous().transpose(2, 3)):
            assert torch.equal(add_modes(x, other, factor, squared), expected)


def test_the_empty_disc():
    x, z, factor, squared = sample((2, 3, 7, 7), None, torch.float32, "contiguous")
    assert coefficients_of(x, squared).shape == z.shape == (2, 3, 0, 0)
    assert torch.equal(add_modes(x, z, factor, squared), x * factor)
    assert torch.equal(add_modes(x, z, None, squared), x)


@pytest.mark.parametrize("shape", [(0, 3, 7, 7), (2, 0, 7, 7)], ids=str)
def test_empty_batch_or_channels(shape):
    x, z, factor, squared = sample(shape, 1, torch.float32, "contiguous")
    assert coefficients_of(x, squared).shape == (*shape[:2], 3, 3)
    assert add_modes(x, z, factor, squared).shape == shape


def test_bad_input():
    x, z, factor, squared = sample((2, 3, 7, 7), 1, torch.float32, "contiguous")
    for wrong in (z[:1], z[:, :2], z[:, :, :2], z.double(), z[0]):
        with pytest.raises(RuntimeError, match=r"add_modes: coefficients must have shape \(B, C, 3, 3\)"):
            add_modes(x, wrong, factor, squared)
    for wrong in (factor[:1], factor[..., :6], factor.double(), factor[0]):
        with pytest.raises(RuntimeError, match="add_modes: factor must have the shape and dtype of x"):
            add_modes(x, z, wrong, squared)
    for call in (lambda y: coefficients_of(y, 1), lambda y: add_modes(y, z, None, 1)):
        with pytest.raises(RuntimeError, match="x must be float64, float32, float16 or bfloat16"):
            call(x.int())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_stays_in_its_plane(layout):
    for (shape, radius), dtype in itertools.product(SHAPES[:9], (torch.float32, torch.bfloat16)):
        x, z, factor, squared = sample(shape, radius, dtype, layout)
        found, y = coefficients_of(x, squared), add_modes(x, z, factor, squared)
        x[0, 0, -1, -1] = z[-1, -1] = torch.nan
        again, y_again = coefficients_of(x, squared), add_modes(x, z, factor, squared)
        clean = torch.ones(shape[:2], dtype=torch.bool)
        clean[0, 0] = False
        assert again[0, 0].isnan().all()
        assert torch.equal(again[clean], found[clean])
        clean[-1, -1] = False
        assert y_again[-1, -1].isnan().all()
        assert torch.equal(y_again[clean], y[clean])


@pytest.mark.parametrize("capability", ["plain", "avx2"])
def test_lower_instruction_sets(capability):
    """The same tests in a process that is told to use less than the processor has."""
    env = dict(os.environ, SPANET_KERNELS_CPU=capability)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not lower_instruction_sets", __file__]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:]
