"""Derivatives of every kind, of x, base, gain and lam."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from errors import assert_as_accurate
from hypothesis import given, settings
from torch.autograd import gradcheck, gradgradcheck

from spanet_kernels import modes, radial_filter, reference, spectral_pool
from spanet_kernels.testing import CASES, DTYPES, LAYOUTS, make_input, make_profile

TIGHT = dict(atol=1e-7, nondet_tol=0.0)


def double_arguments(shape, radius, layout="contiguous"):
    x = make_input(shape, torch.float64, layout)
    base, gain = make_profile(shape[1], radius, torch.float64)
    return x.requires_grad_(), base.requires_grad_(), gain.requires_grad_()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize(("size", "radius"), [((4, 5), 2), ((1, 3), 1), ((6, 2), 3), ((5, 5), 100)])
def test_first_order(size, radius, layout):
    arguments = double_arguments((2, 3, *size), radius, layout)
    assert gradcheck(
        lambda *a: radial_filter(*a, radius),
        arguments,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
        **TIGHT,
    )


@pytest.mark.parametrize(("size", "radius"), [((4, 5), 2), ((3, 2), 1)])
def test_second_order(size, radius):
    arguments = double_arguments((2, 3, *size), radius)
    assert gradgradcheck(lambda *a: radial_filter(*a, radius), arguments, check_fwd_over_rev=True, check_batched_grad=True, **TIGHT)


def test_third_order():
    x, base, gain = double_arguments((1, 2, 3, 4), 1)

    def slope(x, base, gain):
        y = radial_filter(x, base, gain, 1)
        return torch.autograd.grad(y.square().sum(), (x, base, gain), create_graph=True)

    assert gradgradcheck(slope, (x, base, gain), **TIGHT)


@pytest.mark.parametrize("boundary", [None, 1 / 3])
@pytest.mark.parametrize("radius", [0, 1, 2, 2.3, 50])
@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=str)
def test_lam_is_learned(shape, radius, boundary):
    lam = torch.full(shape, 0.7, dtype=torch.float64, requires_grad=True)
    x = make_input((2, 3, 6, 7), torch.float64).requires_grad_()
    assert gradcheck(lambda x, lam: spectral_pool(x, lam, radius, boundary), (x, lam), check_forward_ad=True, **TIGHT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_profile_gradients(dtype, layout):
    sides = (layout, layout), (layout, "contiguous"), ("contiguous", layout)
    for (shape, radius), layouts in itertools.product(CASES["radial_filter"].test, sides if layout != "contiguous" else sides[:1]):
        squared = modes.squared_radius(radius)
        x, grad = (make_input(shape, dtype, side, seed=seed) for seed, side in zip((0, 4), layouts, strict=True))
        ours = torch.ops.spanet_kernels.radial_filter_backward(grad, x, squared)
        wide = modes.profile_dtype(dtype)
        same = reference.radial_filter_backward(grad.to(wide), x.to(wide), squared)
        exact = reference.radial_filter_backward(grad.double(), x.double(), squared)
        for a, b, c in zip(ours, same, exact, strict=True):
            assert a.dtype == wide
            assert_as_accurate(a, b, c, units=2)


@settings(max_examples=3_000)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20)),
    radius=st.one_of(st.integers(0, 6), st.floats(0, 15)),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    seed=st.integers(0, 2**31),
)
def test_fuzz_profile_gradients(shape, radius, dtype, layouts, seed):
    """Whatever the layouts of both sides: errors as parts of the norms whose product bounds the result."""
    grad, x = (make_input(shape, dtype, layout, seed=seed + side) for side, layout in enumerate(layouts))
    squared = modes.squared_radius(radius)
    found = torch.ops.spanet_kernels.radial_filter_backward(grad, x, squared)
    norms = (side.double().square().sum((0, 2, 3)).sqrt() for side in (grad, x))
    bound = math.prod(norms) * (1e-13 if dtype == torch.float64 else 1e-6)
    for ours, exact in zip(found, reference.radial_filter_backward(grad.double(), x.double(), squared), strict=True):
        assert ((ours.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_gradient_is_the_filter(dtype, layout):
    x, base, gain, radius = CASES["radial_filter"].sample((2, 20, 14, 14), 2, dtype, layout)
    x.requires_grad_()
    grad = make_input(x.shape, dtype, layout, seed=8)
    (ours,) = torch.autograd.grad(radial_filter(x, base, gain, radius), x, grad)
    assert torch.equal(ours, radial_filter(grad, base, gain, radius))


def test_torch_func():
    x = make_input((2, 3, 5, 4), torch.float64)
    base, gain = make_profile(3, 2, torch.float64)

    def loss(base, gain, x):
        return radial_filter(x, base, gain, 2).square().sum()

    hessian = torch.func.hessian(loss)(base, gain, x)
    expected = torch.autograd.functional.hessian(lambda b: loss(b, gain, x), base)
    torch.testing.assert_close(hessian, expected)
    batch = make_input((4, 2, 15, 4), torch.float64).view(4, 2, 3, 5, 4)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0))(base, gain, batch)
    torch.testing.assert_close(each, torch.stack([torch.func.grad(loss)(base, gain, x) for x in batch]))
    tangents = torch.randn_like(x), torch.randn_like(base)
    value, slope = torch.func.jvp(lambda x, b: radial_filter(x, b, gain, 2), (x, base), tangents)
    torch.testing.assert_close(value, radial_filter(x, base, gain, 2))
    moved = radial_filter(tangents[0], base, gain, 2) + radial_filter(x, tangents[1], torch.zeros_like(gain), 2)
    torch.testing.assert_close(slope, moved)


def test_vmap_over_any_argument():
    x = make_input((3, 2, 20, 6), torch.float64).view(3, 2, 4, 5, 6)
    profiles = [make_profile(4, 2, torch.float64, seed=i) for i in range(3)]
    base, gain = (torch.stack(p, -1) for p in zip(*profiles, strict=True))
    out = torch.func.vmap(lambda x, b, g: radial_filter(x, b, g, 2), in_dims=(0, -1, -1))(x, base, gain)
    torch.testing.assert_close(out, torch.stack([radial_filter(x[i], *profiles[i], 2) for i in range(3)]))
    out = torch.func.vmap(lambda b: radial_filter(x[0], b, profiles[0][1], 2), in_dims=1)(base)
    torch.testing.assert_close(out, torch.stack([radial_filter(x[0], p[0], profiles[0][1], 2) for p in profiles]))


def test_nothing_is_saved_for_a_constant_profile():
    x = make_input((2, 8, 14, 14), torch.float32).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        spectral_pool(x, 0.7, 2, 1 / 3)
    assert max(saved, default=0) < x.numel() // 10


def test_backward_with_expanded_gradient():
    x = make_input((2, 8, 14, 14), torch.float32).requires_grad_()
    spectral_pool(x, 0.7, 2).sum().backward()
    mean = spectral_pool(torch.ones_like(x), 0.7, 2).detach()
    assert torch.equal(x.grad, mean)
