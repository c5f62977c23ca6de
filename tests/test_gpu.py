"""On a GPU: the error rule, determinism, graphs, streams and size, for the compiled kernels and for Triton's."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from errors import assert_as_accurate

from spanet_kernels import backends, modes, radial_filter, reference, spectral_pool, use
from spanet_kernels.testing import CASES, DTYPES, LAYOUTS, make_input, make_profile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch; `make gpu` runs these on one")

LARGE = (((2, 5, 200, 334), 2), ((1, 70, 100, 167), 2), ((40, 96, 14, 14), 1), ((300, 33, 7, 7), 1), ((1, 3, 300, 310), 1))


@pytest.fixture(params=["in use", "triton"])
def implementation(request):
    with use("triton") if request.param == "triton" else contextlib.nullcontext():
        yield request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "radius"), [*CASES["radial_filter"].test, *LARGE], ids=str)
def test_error_rule(implementation, shape, radius, dtype, layout):
    x, base, gain, _ = CASES["radial_filter"].sample(shape, radius, dtype, layout, "cuda")
    poison = torch.full((2 * x.numel() + 1,), torch.nan, device="cuda", dtype=dtype)
    del poison  # the allocator hands this memory out again
    squared, wide = modes.squared_radius(radius), modes.profile_dtype(dtype)
    y = torch.ops.spanet_kernels.radial_filter(x, base, gain, squared)
    exact = reference.radial_filter(x.double(), base.double(), gain.double(), squared)
    assert_as_accurate(y, reference.radial_filter(x.to(wide), base, gain, squared).to(dtype), exact)
    assert y.is_contiguous(memory_format=torch.channels_last if modes.channels_last(x) else torch.contiguous_format)
    grad = make_input(shape, dtype, "contiguous" if layout == "expanded" else layout, "cuda", seed=3)
    ours = torch.ops.spanet_kernels.radial_filter_backward(grad, x, squared)
    same = reference.radial_filter_backward(grad.to(wide), x.to(wide), squared)
    judge = reference.radial_filter_backward(grad.double(), x.double(), squared)
    for a, b, c in zip(ours, same, judge, strict=True):
        assert_as_accurate(a, b, c, units=4)


@pytest.mark.parametrize("part", range(8))
def test_every_size_up_to_64(implementation, part):
    for height, width in itertools.product(range(1 + part, 65, 8), range(1, 65)):
        radius = (1, 2, 3.2, 5)[(height + width) % 4]
        if implementation == "triton" and (height + 3 * width) % 16:
            continue  # every size is a compilation
        x = make_input((1, 1 + width % 3, height, width), torch.float32, LAYOUTS[(height * width) % 2], "cuda", seed=height)
        base, gain = make_profile(x.shape[1], radius, torch.float32, "cuda", seed=width)
        exact = reference.radial_filter(x.double(), base.double(), gain.double(), modes.squared_radius(radius))
        assert (radial_filter(x, base, gain, radius) - exact).abs().max() <= 8e-7 * (1 + exact.abs().max()), (height, width, radius)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_20000_repeats_on_two_streams_are_bit_equal(implementation, layout):
    x, grad = make_input((4, 64, 28, 28), torch.float32, layout, "cuda"), make_input((4, 64, 28, 28), torch.float32, layout, "cuda", seed=1)
    base, gain = make_profile(64, 2, torch.float32, "cuda")
    expected = radial_filter(x, base, gain, 2), *torch.ops.spanet_kernels.radial_filter_backward(grad, x, 4)
    assert torch.equal(radial_filter(x[1:2], base, gain, 2), expected[0][1:2])
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    wrong = [torch.zeros((), dtype=torch.bool, device="cuda") for _ in streams]
    for repeat in range(20_000):
        with torch.cuda.stream(streams[repeat % 2]):
            actual = radial_filter(x, base, gain, 2), *torch.ops.spanet_kernels.radial_filter_backward(grad, x, 4)
            for a, b in zip(actual, expected, strict=True):
                wrong[repeat % 2] |= (a != b).any()
    torch.cuda.synchronize()
    assert not any(flag.item() for flag in wrong)


def test_cuda_graph_replay_is_bit_equal(implementation):
    x = make_input((8, 64, 56, 56), torch.bfloat16, "channels_last", "cuda").requires_grad_()
    grad = make_input((8, 64, 56, 56), torch.bfloat16, "channels_last", "cuda", seed=1)
    lam = torch.full((64,), 0.7, device="cuda", requires_grad=True)

    def step():
        return torch.autograd.grad(spectral_pool(x, lam, 2, 1 / 3), (x, lam), grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(make_input(tuple(x.shape), torch.bfloat16, "channels_last", "cuda", seed=7))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_31_elements(implementation, layout):
    shape = (2**31 // (64 * 56 * 56) + 3, 64, 56, 56)
    if torch.cuda.mem_get_info()[0] < 16 * 2**31:
        pytest.skip("less than 32 GiB of GPU memory are free")
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=form).normal_(1.5)
    y = spectral_pool(x, 0.7, 2)
    for image in (0, shape[0] // 2, shape[0] - 1):
        assert torch.equal(y[image : image + 1], spectral_pool(x[image : image + 1].clone(), 0.7, 2))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_stays_in_its_plane(implementation, layout):
    for size in ((7, 7), (25, 42), (56, 56), (200, 334)):
        x = make_input((2, 20, *size), torch.float32, layout, "cuda")
        clean = spectral_pool(x, 0.7, 2)
        x[1, 7, 3, 2] = torch.nan
        y = spectral_pool(x, 0.7, 2)
        others = torch.ones(2, 20, dtype=torch.bool, device="cuda")
        others[1, 7] = False
        assert y[1, 7].isnan().all()
        assert torch.equal(y[others], clean[others])


def test_compiled_and_in_a_graph():
    layer = torch.compile(lambda x: spectral_pool(x.relu(), 0.7, 2) * 2, fullgraph=True, mode="reduce-overhead")
    x = make_input((8, 64, 28, 28), torch.bfloat16, "channels_last", "cuda")
    for _ in range(4):
        torch.testing.assert_close(layer(x), spectral_pool(x.relu(), 0.7, 2) * 2)


def conv_weights(channels, size, dtype, seed=0):
    """row_weight, row_bias, column_weight, column_bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((channels, size), (channels,), (channels, size), (channels,))
    wide = modes.profile_dtype(dtype)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) / size**0.5).to("cuda", wide) for shape in shapes]


def widened(tensors, dtype):
    return [t.to(dtype) for t in tensors]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "radius"), [*CASES["radial_filter"].test, *LARGE], ids=str)
def test_axial_conv_error_rule(shape, radius, dtype, layout):
    squared, wide = modes.squared_radius(radius), modes.profile_dtype(dtype)
    x = make_input(shape, dtype, layout, "cuda")
    grad = make_input(shape, dtype, "contiguous" if layout == "expanded" else layout, "cuda", seed=3)
    for size in (3, 7, 11):
        weights = conv_weights(shape[1], size, dtype)
        poison = torch.full((4 * x.numel() + 1,), torch.nan, device="cuda", dtype=dtype)
        del poison  # the allocator hands this memory out again
        z, coefficients = torch.ops.spanet_kernels.axial_conv(x, *weights, squared)
        inputs = [x, *weights]
        assert_as_accurate(z, reference.axial_conv(*inputs, -1)[0], reference.axial_conv(*widened(inputs, torch.float64), -1)[0])
        assert z.is_contiguous(memory_format=modes.memory_format(x))
        check_coefficients(coefficients, z, squared)
        inputs = [grad, x, *weights[:3]]
        ours = torch.ops.spanet_kernels.axial_conv_backward(*inputs)
        same = [reference.axial_conv_backward(*inputs)[0], *reference.axial_conv_backward(*widened(inputs, wide))[1:]]
        for a, b, c in zip(ours, same, reference.axial_conv_backward(*widened(inputs, torch.float64)), strict=True):
            assert_as_accurate(a, b, c, units=4)


def check_coefficients(coefficients, x, squared):
    exact = reference.mode_coefficients(x.double(), squared)
    assert_as_accurate(coefficients, reference.mode_coefficients(x, squared), exact, units=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "radius"), [*CASES["radial_filter"].test, *LARGE], ids=str)
def test_mode_coefficients_error_rule(shape, radius, dtype, layout):
    squared = modes.squared_radius(radius)
    x = make_input(shape, dtype, layout, "cuda")
    check_coefficients(torch.ops.spanet_kernels.mode_coefficients(x, squared), x, squared)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_20000_repeats_of_axial_conv_on_two_streams_are_bit_equal(dtype, layout):
    x, grad = make_input((4, 64, 56, 56), dtype, layout, "cuda"), make_input((4, 64, 56, 56), dtype, layout, "cuda", seed=1)
    weights = conv_weights(64, 7, dtype)

    def step():
        z, coefficients = torch.ops.spanet_kernels.axial_conv(x, *weights, 4)
        return z, coefficients, *torch.ops.spanet_kernels.axial_conv_backward(grad, x, *weights[:3])

    expected = step()
    alone = torch.ops.spanet_kernels.axial_conv(x[1:2], *weights, 4)
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone, expected, strict=False))
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    wrong = [torch.zeros((), dtype=torch.bool, device="cuda") for _ in streams]
    for repeat in range(20_000):
        with torch.cuda.stream(streams[repeat % 2]):
            for a, b in zip(step(), expected, strict=True):
                wrong[repeat % 2] |= (a != b).any()
    torch.cuda.synchronize()
    assert not any(flag.item() for flag in wrong)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_axial_conv_of_more_than_2_31_elements(layout):
    shape = (2**31 // (64 * 56 * 56) + 3, 64, 56, 56)
    if torch.cuda.mem_get_info()[0] < 16 * 2**31:
        pytest.skip("less than 32 GiB of GPU memory are free")
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=form).normal_(1.5)
    weights = conv_weights(64, 7, torch.bfloat16)
    z, coefficients = torch.ops.spanet_kernels.axial_conv(x, *weights, 4)
    x_grad = torch.ops.spanet_kernels.axial_conv_backward(z, x, *weights[:3])[0]
    for image in (0, shape[0] // 2, shape[0] - 1):
        part = slice(image, image + 1)
        small, modes_of_it = torch.ops.spanet_kernels.axial_conv(x[part].clone(), *weights, 4)
        assert torch.equal(z[part], small)
        assert torch.equal(coefficients[part], modes_of_it)
        assert torch.equal(x_grad[part], torch.ops.spanet_kernels.axial_conv_backward(small, x[part].clone(), *weights[:3])[0])


GATES = (((2, 20, 7, 7), 1), ((3, 64, 56, 56), 2), ((5, 320, 14, 14), 1), ((9, 512, 7, 7), 1), ((2, 65, 25, 42), 3), ((2, 33, 12, 10), 4.5))


def gate_sample(shape, radius, dtype, layout):
    """z, its coefficients, weight, bias, base, gain and squared radius."""
    squared, channels = modes.squared_radius(radius), shape[1]
    z = make_input(shape, dtype, layout, "cuda")
    weight = make_input((1, 1, channels, channels), dtype, device="cuda", seed=5)[0, 0] / channels**0.5
    bias = make_input((1, 1, 1, channels), dtype, device="cuda", seed=6).flatten()
    return z, reference.mode_coefficients(z, squared), weight, bias, *make_profile(channels, radius, dtype, "cuda"), squared


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "radius"), GATES, ids=str)
def test_gate_error_rule(shape, radius, dtype, layout):
    sample = gate_sample(shape, radius, dtype, layout)
    judge = [a.double() if isinstance(a, torch.Tensor) else a for a in sample]
    grad = make_input(shape, dtype, layout, "cuda", seed=3) / 64
    poison = torch.full((4 * grad.numel() + 1,), torch.nan, device="cuda", dtype=dtype)
    del poison
    ops = torch.ops.spanet_kernels
    y, *grads = ops.spectral_gate(*sample), *ops.spectral_gate_backward(grad, *sample, True)
    assert y.is_contiguous(memory_format=modes.memory_format(sample[0]))
    same = reference.spectral_gate(*sample), *reference.spectral_gate_backward(grad, *sample, True)
    exact = reference.spectral_gate(*judge), *reference.spectral_gate_backward(grad.double(), *judge, True)
    for index, (a, b, c) in enumerate(zip((y, *grads), same, exact, strict=True)):
        assert a.dtype == b.dtype
        # bias, base and gain: sums over a batch, in another order, of factors in two terms of bf16
        assert_as_accurate(a, b, c, units=4 if index < 3 else 64, alike=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_repeats_are_bit_equal_whatever_the_batch(dtype, layout):
    z, zhat, *rest = gate_sample((9, 128, 14, 14), 2, dtype, layout)
    grad = make_input(z.shape, dtype, layout, "cuda", seed=3)
    ops = torch.ops.spanet_kernels
    expected = ops.spectral_gate(z, zhat, *rest), *ops.spectral_gate_backward(grad, z, zhat, *rest, True)
    for _ in range(1000):
        actual = ops.spectral_gate(z, zhat, *rest), *ops.spectral_gate_backward(grad, z, zhat, *rest, True)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(ops.spectral_gate(z[4:5], zhat[4:5], *rest), expected[0][4:5])
    assert torch.equal(ops.spectral_gate_backward(grad[4:5], z[4:5], zhat[4:5], *rest, True)[0], expected[1][4:5])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 20, 7, 7), (3, 64, 56, 56), (5, 320, 14, 14), (2, 65, 25, 42), (1, 3, 200, 334)], ids=str)
def test_image_norm_error_rule(shape, dtype, layout):
    ops, wide = torch.ops.spanet_kernels, modes.profile_dtype(dtype)
    x, grad = make_input(shape, dtype, layout, "cuda"), make_input(shape, dtype, "contiguous", "cuda", seed=3)
    weight, bias = (make_input((1, 1, 1, shape[1]), wide, device="cuda", seed=seed).flatten() for seed in (5, 6))
    poison = torch.full((4 * x.numel() + 1,), torch.nan, device="cuda", dtype=dtype)
    del poison
    y, moments = ops.image_norm(x, weight, bias, 1e-5)
    assert y.is_contiguous(memory_format=modes.memory_format(x))
    grads = ops.image_norm_backward(grad, x, moments, weight)
    same, exact = ([*reference.image_norm(x.to(to), weight.to(to), bias.to(to), 1e-5)] for to in (wide, torch.float64))
    same += reference.image_norm_backward(grad.to(wide), x.to(wide), same[1], weight)
    exact += reference.image_norm_backward(grad.double(), x.double(), exact[1], weight.double())
    for index, (a, b, c) in enumerate(zip((y, moments, *grads), same, exact, strict=True)):
        assert_as_accurate(a, b.to(a.dtype), c, units=4 if index in (0, 2) else 64)  # sums over an image or a batch, in another order
    assert dtype == torch.float64 or torch.equal(ops.image_norm(x[-1:], weight, bias, 1e-5)[0], y[-1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (50_000, 96), (1000, 1280), (333, 65)], ids=str)
def test_gelu_and_sums_error_rule(shape, dtype):
    ops, wide = torch.ops.spanet_kernels, modes.profile_dtype(dtype)
    x, grad, bias = (
        make_input((1, 1, *size), dtype, device="cuda", seed=seed)[0, 0] - 1 for seed, size in enumerate((shape, shape, (1, shape[1])))
    )
    bias = bias[0]
    results = {}
    for to in (dtype, wide, torch.float64):
        slope = grad.to(to, copy=True)
        module = ops if to == dtype else reference
        results[to] = [*module.gelu(x.to(to), bias.to(to), slope), slope, module.column_sums(x.to(to))]
    for a, b, c in zip(results[dtype], results[wide], results[torch.float64], strict=True):
        assert_as_accurate(a, b.to(a.dtype), c, units=4 if a.dim() == 2 else 64)
    assert torch.equal(ops.gelu(x, bias, None)[0], results[dtype][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 64, 56, 56), (5, 320, 14, 14), (2, 32, 7, 7)], ids=str)
def test_pair_error_rule(shape, dtype):
    channels = shape[1]
    x, residual = (make_input(shape, dtype, "channels_last", "cuda", seed=seed) for seed in range(2))

    def values(*size, seed):
        return make_input((1, 1, 1, size[0] * size[1]), dtype, device="cuda", seed=seed).view(size).sub(1.5) / size[1] ** 0.5

    def normalised(x, moments, weight, bias):
        mean, scale = moments[:, :, None, None, None].unbind(1)
        return (x - mean) * scale * weight[:, None, None] + bias[:, None, None]

    vectors = [values(1, channels, seed=seed)[0] * channels**0.5 for seed in range(3, 7)]
    w_in, b_in, w_out = values(4 * channels, channels, seed=7), values(1, 4 * channels, seed=8)[0], values(channels, 4 * channels, seed=9)
    moments = torch.ops.spanet_kernels.image_moments(x, 1e-5)
    for norm, added, products in (
        ((moments, *vectors[:2]), (residual, vectors[2]), (w_in, b_in, w_out, vectors[3])),
        ((moments, *vectors[:2]), (None, None), (None, None, w_in[:channels].contiguous(), None)),
        ((None, None, None), (residual, None), (None, None, w_in[:channels].contiguous(), vectors[3])),
    ):
        results = []
        for to in (dtype, torch.float32, torch.float64):
            image, *rest = (None if t is None else t if t is moments else t.to(to) for t in (x, *norm, None, *added, *products))
            if to == torch.float32 and norm[0] is not None:  # what is multiplied is rounded, as tensor cores take it
                image, rest[:3] = normalised(image, *rest[:3]).to(dtype).float(), (None, None, None)
            y = torch.full_like(image, torch.nan)
            (torch.ops.spanet_kernels.pointwise_pair if to == dtype else reference.pointwise_pair)(y, image, *rest)
            results.append(y)
        if products[0] is None:
            assert_as_accurate(results[0], results[1].to(dtype), results[2], units=4, alike=True)
        else:  # what stands between two products is rounded
            error = (results[0].double() - results[2]).norm() / results[2].norm()
            assert error <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_model_trains_like_on_the_cpu(layout, drop_path_rate, monkeypatch):
    """With the same images dropped: random numbers are a device's own."""
    spanet = pytest.importorskip("spanet")
    monkeypatch.setattr("spanet.model._sample", lambda _, x: (x.new_tensor([1, 0, 1, 1]), 1.25))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = spanet.SPANet(depths=(1, 1, 1, 1), dims=(32, 64, 96, 128), radii=(2, 2, 1, 1), num_classes=10, drop_path_rate=drop_path_rate)
    x, labels = torch.randn(4, 3, 64, 64) + 0.5, torch.arange(4)

    def gradients(device, dtype):
        copy_ = copy.deepcopy(model).to(device, dtype)
        given = x.to(device, dtype, memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
        loss = torch.nn.functional.cross_entropy(copy_(given), labels.to(device))
        return [loss, *torch.autograd.grad(loss, list(copy_.parameters()))]

    for ours, exact in zip(gradients("cuda", torch.float32), gradients("cpu", torch.float64), strict=True):
        assert (ours.cpu().double() - exact).norm() <= 1e-4 * exact.norm() + 1e-7


def test_report_names_what_is_in_use():
    assert backends()["operators"]["radial_filter"]["cuda"]["in use"] in ("cuda", "triton", "modes")
