"""The filters against the fp64 reference: every dtype, layout, size and instruction set."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading

import hypothesis.strategies as st
import pytest
import torch
from errors import assert_as_accurate
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

import spanet_kernels
from spanet_kernels import modes, radial_filter, reference, spectral_pool
from spanet_kernels.testing import CASES, DTYPES, LAYOUTS, make_input, make_profile

OPERATOR = torch.ops.spanet_kernels.radial_filter.default


class OperatorNames(TorchDispatchMode):
    """Records the names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def names_within(call):
    """Names of the operators that a call runs, those within other operators too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name for event in profile.events()}


def check(x, base, gain, radius, units=1.0):
    """radial_filter against fp64, by the error rule; returns what it computed."""
    y = radial_filter(x, base, gain, radius)
    assert y.dtype == x.dtype
    squared = modes.squared_radius(radius)
    straight = reference.radial_filter(x.to(base.dtype), base, gain, squared).to(x.dtype)
    assert_as_accurate(y, straight, reference.radial_filter(x.double(), base.double(), gain.double(), squared), units)
    return y


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "radius"), CASES["radial_filter"].test, ids=str)
def test_error_rule(shape, radius, dtype, layout):
    x, *profile = CASES["radial_filter"].sample(shape, radius, dtype, layout)
    y = check(x, *profile)
    last = modes.channels_last(x)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "radius"), [((5, 48, 180, 180), 2), ((48, 768, 14, 14), 1)], ids=str)
def test_beyond_the_caches(shape, radius, dtype, layout):
    """In NCHW written past the caches, by columns and as flat planes; in channels_last with the rows of an image shared among threads."""
    check(*CASES["radial_filter"].sample(shape, radius, dtype, layout))


def test_radius_counts_modes():
    """K = 5, 13, 29, 49, 197 modes lie within r = 1, 2, 3, 4, 8."""
    for radius, count in ((1, 5), (2, 13), (3, 29), (4, 49), (8, 197)):
        squared = modes.squared_radius(radius)
        inside = modes.shell_map(64, 64, squared, torch.device("cpu")) < len(modes.shells(squared))
        assert inside.sum() == count


def test_radius_is_compared_exactly():
    assert modes.squared_radius(2**0.5) == 2  # the float lies above the root
    assert modes.squared_radius(3**0.5) == 2  # the float lies below the root: 3 is outside
    assert modes.on_circle(2.0)
    assert not modes.on_circle(2**0.5)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13, 56])
def test_basis_is_orthonormal(size):
    phi = modes.basis(size, size * size, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(phi @ phi.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("boundary", [None, 1 / 3, 0.9])
@pytest.mark.parametrize("radius", [0, 0.5, 1, 2**0.5, 2, 2.9, 4, 6.4, 7.3, 1000, float("inf")])
@pytest.mark.parametrize("size", [(9, 8), (1, 1), (2, 5), (14, 14)])
def test_spectral_pool_is_the_papers(size, radius, boundary):
    x = make_input((2, 3, *size), torch.float64)
    for lam in (0.0, 0.5, 0.7, 1.0, -1.3):
        expected = reference.spectral_pool(x, lam, min(radius, 1000.0), boundary)
        torch.testing.assert_close(spectral_pool(x, lam, radius, boundary), expected, rtol=0, atol=1e-12)


def test_published_chain_is_the_same_filter():
    x = make_input((2, 3, 14, 14), torch.float64)
    mask = reference.spectral_mask(0.8, 2, 1 / 3, 14, 14)
    published = reference.published_chain(x, torch.fft.fftshift(mask))
    torch.testing.assert_close(spectral_pool(x, 0.8, 2, 1 / 3), published, rtol=0, atol=1e-12)
    torch.testing.assert_close(reference.rfft2_chain(x, mask[:, :8]), published, rtol=0, atol=1e-12)


def test_every_size_up_to_64():
    for height, width in itertools.product(range(1, 65), repeat=2):
        radius = (1, 2, 3.2, 5)[(height + width) % 4]
        x = make_input((1, 1 + width % 3, height, width), torch.float32, LAYOUTS[(height * width) % 2], seed=height)
        base, gain = make_profile(x.shape[1], radius, torch.float32, seed=width)
        exact = reference.radial_filter(x.double(), base.double(), gain.double(), modes.squared_radius(radius))
        assert (radial_filter(x, base, gain, radius) - exact).abs().max() <= 4e-7 * (1 + exact.abs().max()), (height, width, radius)


@settings(max_examples=10_000)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 40), st.integers(1, 40)),
    radius=st.one_of(st.integers(0, 6), st.floats(0, 30)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)
def test_fuzz(shape, radius, dtype, layout, seed):
    x = make_input(shape, dtype, layout, seed=seed)
    base, gain = make_profile(shape[1], radius, dtype, seed=seed)
    exact = reference.radial_filter(x.double(), base.double(), gain.double(), modes.squared_radius(radius)) if x.numel() else x.double()
    y = radial_filter(x, base, gain, radius)
    assert y.shape == x.shape
    scale = 1 + (exact.abs().max().item() if x.numel() else 0)
    unit = max(torch.finfo(dtype).eps / 2, 8e-7 if dtype != torch.float64 else 2e-14)
    assert x.numel() == 0 or (y.double() - exact).abs().max() <= 1.01 * unit * scale


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_plane(value, layout):
    for size in ((7, 7), (14, 14), (25, 42), (56, 56)):
        x = make_input((2, 20, *size), torch.float32, layout)
        base, gain = make_profile(20, 2, torch.float32)
        clean = radial_filter(x, base, gain, 2)
        x[1, 7, 3, 2] = value
        y = radial_filter(x, base, gain, 2)
        assert not y[1, 7].isfinite().any()
        others = torch.ones(2, 20, dtype=torch.bool)
        others[1, 7] = False
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 2**16, 1, 1), (1, 64, 32, 32), (16, 4096, 1, 1)], ids=str)
def test_every_16_bit_value_is_read_and_rounded_as_torch_does(dtype, shape):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(shape)
    # the sum over a plane of larger values is beyond fp32
    finite = x.masked_fill(~(x.abs() < (1e34 if shape[2] > 1 else torch.inf)), 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        for scale in (1.0, 1.0049, 0.0037, 0.9):
            base, gain = torch.full(shape[1:2], scale), torch.zeros(1, shape[1])
            y = radial_filter(finite.contiguous(memory_format=layout), base, gain, 0)
            assert torch.equal(y, (finite.float() * scale).to(dtype))
    assert torch.equal(radial_filter(x, torch.ones(shape[1]), torch.zeros(1, shape[1]), 0).isnan(), ~x.isfinite()) or shape[2] > 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_equal_whatever_the_batch_and_the_threads(dtype, layout):
    threads = torch.get_num_threads()
    try:
        shapes = ((9, 40, 56, 56), 2), ((9, 40, 14, 14), 1), ((9, 40, 25, 42), 8), ((2, 200, 50, 84), 2), ((3, 192, 28, 28), 1)
        shapes += (((3, 40, 130, 120), 70),)  # by FFT
        for shape, radius in shapes:
            x = make_input(shape, dtype, layout)
            base, gain = make_profile(shape[1], radius, dtype)
            grad = make_input(shape, dtype, layout, seed=5)
            squared = modes.squared_radius(radius)
            torch.set_num_threads(1)
            y = radial_filter(x, base, gain, radius)
            profile = torch.ops.spanet_kernels.radial_filter_backward(grad, x, squared)
            assert torch.equal(radial_filter(x[1:2], base, gain, radius), y[1:2])
            for count in (2, 5):
                torch.set_num_threads(count)
                assert torch.equal(radial_filter(x, base, gain, radius), y)
                again = torch.ops.spanet_kernels.radial_filter_backward(grad, x, squared)
                assert all(torch.equal(a, b) for a, b in zip(profile, again, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_many_threads_at_once():
    """8 threads, 1,000 calls each, sizes new to the tables among them."""
    sizes = [(7, 7), (14, 13), (28, 28), (5, 17)]
    base, gain = make_profile(17, 2, torch.float32)
    inputs = [make_input((1, 17, *size), torch.float32, layout) for size in sizes for layout in ("contiguous", "channels_last")]
    expected = [radial_filter(x, base, gain, 2) for x in inputs]
    wrong = []

    def work(thread):
        for call in range(1000):
            i = (thread + call) % len(inputs)
            if not torch.equal(radial_filter(inputs[i], base, gain, 2), expected[i]):
                wrong.append((thread, call))
            spectral_pool(inputs[i][..., : 1 + call % 7], 0.7, 1 + call % 3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_works_after_fork():
    script = """
import os, torch
from spanet_kernels import spectral_pool
torch.set_num_threads(1)
x = torch.randn(2, 8, 14, 14)
y = spectral_pool(x, 0.7, 2)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(spectral_pool(x, 0.7, 2), y) and spectral_pool(x[:, :, 3:], 0.7, 1).isfinite().all() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides_beyond_2_31(dtype):
    """Images 2^31 elements and more apart, in memory that is mostly never touched."""
    far = 2**31 + 5
    memory = torch.empty(far + 4096, dtype=dtype)
    small = make_input((2, 20, 8, 6), dtype)
    base, gain = make_profile(20, 2, dtype)
    for strides in ((far, 48, 6, 1), (far, 1, 120, 20)):
        x = memory.as_strided((2, 20, 8, 6), strides).copy_(small)
        grad = make_input(small.shape, dtype, seed=3)
        assert torch.equal(radial_filter(x, base, gain, 2), radial_filter(x.clone(), base, gain, 2))
        ours = torch.ops.spanet_kernels.radial_filter_backward(grad, x, 4)
        near = torch.ops.spanet_kernels.radial_filter_backward(grad, small, 4)
        for a, b in zip(ours, near, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("shape", "radius", "by_fft"),
    [
        ((1, 64, 56, 56), 40, False),
        ((1, 64, 128, 128), 20, False),
        ((1, 64, 128, 128), 48, True),
        ((1, 64, 100, 167), 40, False),  # the FFT of a prime is slow
        ((1, 16, 200, 334), 160, True),
    ],
)
def test_the_faster_of_modes_and_fft_serves(shape, radius, by_fft):
    x, base, gain, _ = CASES["radial_filter"].sample(shape, radius, torch.float32)
    assert ("aten::_fft_r2c" in names_within(lambda: radial_filter(x, base, gain, radius))) == by_fft
    check(x, base, gain, radius, units=2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_beyond_the_crossover(dtype, compiled):
    """A radius for which the FFT is faster: gradients of everything, of one operator, compiled too."""
    torch.compiler.reset()
    radius, squared = 150, modes.squared_radius(150)
    x = make_input((2, 18, 308, 280), dtype, "channels_last").requires_grad_()
    base, gain = (p.requires_grad_() for p in make_profile(18, radius, dtype))
    grad = make_input(x.shape, dtype, seed=5)
    function = torch.compile(radial_filter, fullgraph=True) if compiled else radial_filter
    with OperatorNames() as called:
        y = radial_filter(x, base, gain, radius)
    assert not {name for name in called.names if "fft" in name}
    found = []
    names = names_within(lambda: found.extend(torch.autograd.grad(function(x, base, gain, radius), (x, base, gain), grad)))
    assert {"aten::_fft_r2c", "spanet_kernels::radial_filter", "spanet_kernels::radial_filter_backward"} <= names
    exact = [t.detach().double().requires_grad_() for t in (x, base, gain)]
    expected = torch.autograd.grad(reference.radial_filter(*exact, squared), exact, grad.double())
    straight = reference.radial_filter(x.detach().float(), base.detach(), gain.detach(), squared).to(dtype)
    assert_as_accurate(y.detach(), straight, reference.radial_filter(*exact, squared).detach(), units=2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for ours, judge, unit in zip(found, expected, (4e-7 + torch.finfo(dtype).eps, 1e-6, 2e-6), strict=True):
        assert (ours.double() - judge).norm() <= unit * judge.norm()


def test_fft_of_every_shape():
    """Planes of one row or column, transposed ones, repeated ones, of channels apart and of a lone pixel's width; few rows, odd sizes."""
    for shape in ((2, 3, 1, 1100), (2, 3, 1100, 1), (1, 2, 3, 500), (3, 17, 81, 99), (1, 9, 128, 130)):
        for dtype in DTYPES:
            x = make_input((*shape[:2], *shape[:1:-1]), dtype).mT
            base, gain = make_profile(shape[1], 90, dtype)
            assert "aten::_fft_r2c" in names_within(lambda x=x, base=base, gain=gain: radial_filter(x, base, gain, 90))
            for view in (x, x[:, ::2], x[..., :1, :, :].expand_as(x), x.contiguous(memory_format=torch.channels_last)[:, 1:]):
                check(view, base[: view.shape[1]], gain[:, : view.shape[1]], 90, units=2)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 41, 120, 140), torch.bfloat16), ((5, 2, 150, 120), torch.float64), ((1, 3, 700, 640), torch.float32)], ids=str
)
def test_ffts_of_few_planes_at_a_time(shape, dtype, layout, per_channel):
    """Parts of images and parts of channels, the last ones smaller, of one plane too; gradients of x to the second order."""
    channels, radius = shape[1], 75
    x = make_input(shape, dtype, layout).requires_grad_()
    base, gain = make_profile(channels if per_channel else 1, radius, dtype)
    base, gain = base.expand(channels), gain.expand(-1, channels)
    assert "aten::_fft_r2c" in names_within(lambda: radial_filter(x, base, gain, radius))
    y = check(x, base, gain, radius, units=2)
    grad = y.detach().flip(0).requires_grad_()
    (x_grad,) = torch.autograd.grad(y, x, grad, create_graph=True)
    (again,) = torch.autograd.grad(x_grad, grad, grad.detach())
    assert y.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    with torch.no_grad():
        assert torch.equal(x_grad, radial_filter(grad, base, gain, radius))
        assert torch.equal(again, x_grad)


@pytest.mark.parametrize("implementation", ["modes", "reference"])
def test_other_implementations_agree(implementation):
    for (shape, radius), layout in itertools.product(CASES["radial_filter"].test, ("contiguous", "channels_last")):
        x, base, gain, _ = CASES["radial_filter"].sample(shape, radius, torch.float64, layout)
        grad, squared = make_input(shape, torch.float64, seed=9), modes.squared_radius(radius)
        expected = OPERATOR(x, base, gain, squared), *torch.ops.spanet_kernels.radial_filter_backward(grad, x, squared)
        with spanet_kernels.use(implementation):
            actual = OPERATOR(x, base, gain, squared), *torch.ops.spanet_kernels.radial_filter_backward(grad, x, squared)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("capability", ["plain", "avx2", "avx512", "avx512_bf16"])
def test_lower_instruction_sets(capability):
    """The same tests in a process that is told to use less than the processor has."""
    names = ["test_as_accurate", "test_gelu", "test_a_pixel", "test_on_a_residual_branch", "test_moments"]
    files = ["test_pair.py"]
    if not capability.startswith("avx512"):  # which differ in products alone
        names += ["test_error_rule", "test_nan_and_inf", "test_every_16_bit", "test_bit_equal", "test_profile_gradients"]
        files += ["test_numerics.py", "test_gradients.py"]
    files = [os.path.join(os.path.dirname(__file__), name) for name in files]
    env = dict(os.environ, SPANET_KERNELS_CPU=capability)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", " or ".join(names), *files]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:]
    report = subprocess.run(
        [sys.executable, "-c", "import spanet_kernels._native as n; print(n.cpu_capability())"], env=env, capture_output=True, text=True
    )
    order = ["plain", "avx2", "avx512", "avx512_bf16", "amx"]
    assert order.index(report.stdout.strip()) <= order.index(capability), report
