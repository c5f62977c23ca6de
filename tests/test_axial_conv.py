"""The axial convolution against the fp64 reference: values, coefficients, gradients, layouts, instruction sets, compilation, bad input."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from errors import assert_as_accurate
from hypothesis import given, settings
from torch.autograd import gradcheck, gradgradcheck

from spanet_kernels import axial_conv, modes, reference
from spanet_kernels.testing import CASES, DTYPES, LAYOUTS, make_input, make_kernels

CASE = CASES["axial_conv"]
CONV = torch.ops.spanet_kernels.axial_conv.default
BACKWARD = torch.ops.spanet_kernels.axial_conv_backward.default
TIGHT = dict(atol=1e-7, nondet_tol=0.0)


def operator_arguments(shape, setting, dtype, layout="contiguous", seed=0):
    """x, weights (C, k) and biases (C,), squared radius."""
    x, row, row_bias, column, column_bias, radius = CASE.sample(shape, setting, dtype, layout, seed=seed)
    squared = -1 if radius is None else modes.squared_radius(radius)
    return x, row.flatten(1), row_bias, column.flatten(1), column_bias, squared


def doubled(args):
    return [arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args]


def check(shape, setting, dtype, layout, seed=0):
    """axial_conv of a random input against fp64, by the error rule, and the coefficients of what it stored."""
    x, *parameters = CASE.sample(shape, setting, dtype, layout, seed=seed)
    z, coefficients = CASE.function(x, *parameters)
    wide = modes.profile_dtype(dtype)
    assert z.dtype == dtype
    assert coefficients.dtype == wide
    assert z.is_contiguous(memory_format=modes.memory_format(x))
    exact, _ = CASE.reference(*doubled([x, *parameters]))
    assert_as_accurate(z, CASE.reference(x.to(wide), *parameters)[0].to(dtype), exact, alike=True)
    squared = -1 if setting[1] is None else modes.squared_radius(setting[1])
    same, exact = reference.mode_coefficients(z, squared), reference.mode_coefficients(z.double(), squared)
    assert_as_accurate(coefficients, same, exact, units=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "setting"), CASE.test, ids=str)
def test_error_rule(shape, setting, dtype, layout):
    check(shape, setting, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "setting"), CASE.test, ids=str)
def test_gradients(shape, setting, dtype, layout):
    x, row, row_bias, column, _, _ = operator_arguments(shape, setting, dtype, layout)
    grad = make_input(shape, dtype, layout, seed=4)
    ours = BACKWARD(grad, x, row, row_bias, column)
    wide = modes.profile_dtype(dtype)
    same = reference.axial_conv_backward(grad.to(wide), x.to(wide), row, row_bias, column)
    exact = reference.axial_conv_backward(*doubled((grad, x, row, row_bias, column)))
    assert ours[0].dtype == dtype
    assert ours[0].is_contiguous(memory_format=modes.memory_format(x))
    assert_as_accurate(ours[0], same[0].to(dtype), exact[0], alike=True)
    for a, b, c in zip(ours[1:], same[1:], exact[1:], strict=True):
        assert a.dtype == wide
        assert_as_accurate(a, b, c, units=4)


@settings(max_examples=1000)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 40), st.integers(1, 40)),
    size=st.integers(0, 16).map(lambda half: 2 * half + 1),
    radius=st.one_of(st.none(), st.integers(0, 6), st.floats(0, 30)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)
def test_fuzz(shape, size, radius, dtype, layout, seed):
    args = operator_arguments(shape, (size, radius), dtype, layout, seed)
    z, coefficients = CONV(*args)
    grad = make_input(shape, dtype, layout, seed=seed + 1)
    grads = BACKWARD(grad, *args[:4])
    assert z.shape == shape
    assert coefficients.shape[:2] == shape[:2]
    if 0 in shape:
        assert all(g.count_nonzero() == 0 for g in grads)
        return
    exact, _ = reference.axial_conv(*doubled(args))
    exact_grads = reference.axial_conv_backward(*doubled((grad, *args[:4])))
    unit = 2e-14 if dtype == torch.float64 else 3e-7
    stored = max(torch.finfo(dtype).eps / 2, unit)
    # terms of a sum are some times larger than the sum: errors are measured against the sum of magnitudes
    magnitudes, _ = reference.axial_conv(*(a.abs() if isinstance(a, torch.Tensor) else a for a in doubled(args)))
    of_grads = reference.axial_conv_backward(*(a.abs() for a in doubled((grad, *args[:4]))))
    assert (z.double() - exact).abs().max() <= 1.01 * stored * exact.abs().max() + unit * magnitudes.max()
    for a, b, m, largest in zip(grads, exact_grads, of_grads, (stored, unit, unit, unit, unit), strict=True):
        assert (a.double() - b).abs().max() <= 1.01 * largest * b.abs().max() + 4 * unit * m.max()
    modes_of_z = reference.mode_coefficients(z.double(), args[5])
    scale = (z.double().abs().amax().item()) * (shape[2] * shape[3]) ** 0.5
    assert coefficients.numel() == 0 or (coefficients.double() - modes_of_z).abs().max() <= 4 * unit * scale


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_equal_whatever_the_batch_and_the_threads(dtype, layout):
    threads = torch.get_num_threads()
    try:
        for size, setting in (((56, 56), (7, 2)), ((14, 14), (5, 1)), ((7, 7), (7, 1)), ((25, 42), (9, 8))):
            x, *parameters, squared = operator_arguments((9, 40, *size), setting, dtype, layout)
            grad = make_input(x.shape, dtype, layout, seed=5)
            torch.set_num_threads(1)
            forward, backward = CONV(x, *parameters, squared), BACKWARD(grad, x, *parameters[:3])
            for whole, one in zip(forward, CONV(x[4:5], *parameters, squared), strict=True):
                assert torch.equal(whole[4:5], one)
            assert torch.equal(BACKWARD(grad[4:5], x[4:5], *parameters[:3])[0], backward[0][4:5])
            for count in (2, 5):
                torch.set_num_threads(count)
                again = *CONV(x, *parameters, squared), *BACKWARD(grad, x, *parameters[:3])
                assert all(torch.equal(a, b) for a, b in zip(again, (*forward, *backward), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_where_they_reach(value, layout):
    """In their plane, and there within p of their row and column."""
    for size, kernel in (((7, 7), 3), ((14, 14), 7), ((25, 42), 9), ((56, 56), 7)):
        x, *parameters, squared = operator_arguments((2, 20, *size), (kernel, 2), torch.float32, layout)
        grad = make_input(x.shape, torch.float32, layout, seed=5)
        clean, coefficients = CONV(x, *parameters, squared)
        clean_grads = BACKWARD(grad, x, *parameters[:3])
        x[1, 7, 3, 2] = grad[1, 7, 3, 2] = value
        z, found = CONV(x, *parameters, squared)
        grads = BACKWARD(grad, x, *parameters[:3])
        p = kernel // 2
        reached = torch.zeros(x.shape, dtype=torch.bool)
        reached[1, 7, max(3 - p, 0) : 4 + p, max(2 - p, 0) : 3 + p] = True
        for a, b in ((z, clean), (grads[0], clean_grads[0])):
            assert not a[reached].isfinite().any()
            assert torch.equal(a[~reached], b[~reached])
        planes = ~reached.any(-1).any(-1)
        assert torch.equal(found[planes], coefficients[planes])
        assert not found[1, 7].isfinite().any()
        channels = torch.arange(20) != 7
        assert all(torch.equal(a[channels], b[channels]) for a, b in zip(grads[1:], clean_grads[1:], strict=True))


def test_parameters_of_any_strides():
    x, row, row_bias, column, column_bias, squared = operator_arguments((2, 20, 9, 10), (7, 2), torch.float32)
    expected = CONV(x, row, row_bias, column, column_bias, squared)
    apart = [torch.stack([p, torch.full_like(p, torch.nan)], -1)[..., 0] for p in (row, row_bias, column, column_bias)]
    turned = row.T.contiguous().T, apart[1], apart[2], apart[3]
    for parameters in (apart, turned):
        assert all(torch.equal(a, b) for a, b in zip(CONV(x, *parameters, squared), expected, strict=True))
    shared = CONV(x, row[:1].expand(20, 7), row_bias, column, column_bias, squared)
    assert torch.equal(shared[0], CONV(x, row[:1].repeat(20, 1), row_bias, column, column_bias, squared)[0])


def test_strides_beyond_2_31():
    far = 2**31 + 5
    memory = torch.empty(far + 4096, dtype=torch.bfloat16)
    small, *parameters, squared = operator_arguments((2, 20, 8, 6), (7, 2), torch.bfloat16)
    grad = make_input(small.shape, torch.bfloat16, seed=3)
    expected = *CONV(small, *parameters, squared), *BACKWARD(grad, small, *parameters[:3])
    for strides in ((far, 48, 6, 1), (far, 1, 120, 20)):
        x = memory.as_strided((2, 20, 8, 6), strides).copy_(small)
        actual = *CONV(x, *parameters, squared), *BACKWARD(grad, x, *parameters[:3])
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("capability", ["plain", "avx2"])
def test_lower_instruction_sets(capability):
    """The same tests in a process that is told to use less than the processor has."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "test_error_rule or test_gradients or test_bit_equal or test_nan"]
    env = dict(os.environ, SPANET_KERNELS_CPU=capability)
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("size", "kernel"), [((4, 5), 3), ((2, 6), 7)])
def test_derivatives(size, kernel, layout):
    x, *parameters, _ = CASE.sample((2, 3, *size), (kernel, None), torch.float64, layout)
    arguments = [a.requires_grad_() for a in (x, *parameters)]
    everything = dict(check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, check_undefined_grad=True)
    assert gradcheck(lambda *a: axial_conv(*a)[0], arguments, **everything, **TIGHT)
    assert gradgradcheck(lambda *a: axial_conv(*a)[0], arguments, check_fwd_over_rev=True, check_batched_grad=True, **TIGHT)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 4, 5), (2, 0, 4, 5)], ids=str)
def test_opcheck(shape, dtype, layout):
    if 0 in shape and layout in ("sliced", "offset"):
        layout = "channels_last"  # opcheck itself cannot copy an empty slice
    x, *parameters, squared = operator_arguments(shape, (5, 1), dtype, layout)
    x, parameters = x.requires_grad_(), [p.detach().requires_grad_() for p in parameters]
    grad = make_input(shape, dtype, layout, seed=2)
    tolerance = {torch.bfloat16: 4e-2, torch.float16: 4e-3}.get(dtype, 1e-4)
    torch.library.opcheck(CONV, (x, *parameters, squared), atol=tolerance, rtol=tolerance)
    torch.library.opcheck(BACKWARD, (grad, x.detach(), *(p.detach() for p in parameters[:3])), atol=tolerance, rtol=tolerance)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_fullgraph_dynamic_shapes_without_recompiling():
    torch._dynamo.reset()
    parameters = [p.requires_grad_() for p in make_kernels(8, 7, torch.float32)]
    compiled = torch.compile(lambda x, *p: axial_conv(x, *p, 2.0), fullgraph=True, dynamic=True)
    for size in ((2, 17, 16), (3, 20, 24), (4, 31, 17), (2, 56, 57), (5, 40, 33), (6, 28, 64)):
        x = make_input((size[0], 8, *size[1:]), torch.float32).requires_grad_()
        expected, actual = axial_conv(x, *parameters, 2.0), compiled(x, *parameters)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
        weight = torch.randn_like(expected[0])
        grads = (torch.autograd.grad(z, [x, *parameters], weight) for z, _ in (actual, expected))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


X = torch.randn(2, 3, 8, 8)
ROW, BIAS, COLUMN = torch.randn(3, 1, 1, 5), torch.randn(3), torch.randn(3, 1, 5, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], ROW, BIAS, COLUMN, BIAS), TypeError, "x must be a tensor, got list"),
        ((X.int(), ROW, BIAS, COLUMN, BIAS), TypeError, "x must be float64, float32, float16 or bfloat16, got torch.int32"),
        ((X[0], ROW, BIAS, COLUMN, BIAS), ValueError, "x must have shape (B, C, H, W), got (3, 8, 8)"),
        ((X[..., :0], ROW, BIAS, COLUMN, BIAS), ValueError, "got (2, 3, 8, 0)"),
        ((X, ROW[..., :4], BIAS, COLUMN, BIAS), ValueError, "row_weight must have shape (C, 1, 1, k) with an odd k, got (3, 1, 1, 4)"),
        ((X, None, BIAS, COLUMN, BIAS), ValueError, "row_weight must have shape (C, 1, 1, k) with an odd k, got NoneType"),
        ((X, ROW[:2], BIAS, COLUMN, BIAS), ValueError, "row_weight must have shape (3, 1, 1, 5) for 3 channels, got (2, 1, 1, 5)"),
        ((X, ROW, BIAS[:2], COLUMN, BIAS), ValueError, "row_bias must have shape (3,) for 3 channels, got (2,)"),
        ((X, ROW, BIAS, COLUMN[:, :, :3], BIAS), ValueError, "column_weight must have shape (3, 1, 5, 1) for 3 channels, got (3, 1, 3, 1)"),
        ((X, ROW, BIAS, COLUMN, BIAS.long()), TypeError, "column_bias must be a floating-point tensor, got torch.int64"),
        ((X, ROW, BIAS, COLUMN.to("meta"), BIAS), ValueError, "column_weight must be on cpu like its input, got meta"),
        ((X, ROW, BIAS, COLUMN, BIAS, -1), ValueError, "radius must be at least 0, got -1"),
        ((X, ROW, BIAS, COLUMN, BIAS, "2"), TypeError, "radius must be a number, got str"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        axial_conv(*arguments)
    assert str(raised.value).startswith("axial_conv: ")


def test_operators_check_what_would_corrupt_memory():
    row, column = ROW.flatten(1), COLUMN.flatten(1)
    with pytest.raises(RuntimeError, match="row_weight must have shape"):
        CONV(X, row[:, :4], BIAS, column, BIAS, 4)
    with pytest.raises(RuntimeError, match="column_weight must have shape"):
        CONV(X, row, BIAS, column[:, :3], BIAS, 4)
    with pytest.raises(RuntimeError, match="row_bias must have shape"):
        CONV(X, row, BIAS[:2], column, BIAS, 4)
    with pytest.raises(RuntimeError, match="in the dtype of the accumulators"):
        CONV(X, row, BIAS, column, BIAS.double(), 4)
    with pytest.raises(RuntimeError, match="grad must have the shape"):
        BACKWARD(X[:1], X, row, BIAS, column)


def test_a_disc_beyond_the_spectrum():
    x, *parameters = CASE.sample((1, 3, 5, 4), (3, float("inf")), torch.float64)
    z, coefficients = axial_conv(x, *parameters)
    torch.testing.assert_close(coefficients, reference.mode_coefficients(z, 10**6), rtol=0, atol=1e-12)
