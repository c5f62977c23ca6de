"""pointwise_mlp against the three layers that it stands for."""

from __future__ import annotations

import pytest
import torch
from errors import assert_as_accurate
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from spanet_kernels import pointwise_mlp, products
from spanet_kernels._native import cpu_capability
from spanet_kernels.testing import DTYPES, LAYOUTS, make_input

gelu = torch.ops.spanet_kernels.gelu.default


def sample(dtype, layout="contiguous", shape=(2, 12, 5, 6), hidden=20, out=8, bias=True):
    """x, and the weights and biases of both convolutions."""
    generator = torch.Generator().manual_seed(0)
    shapes = (hidden, shape[1], 1, 1), (hidden,), (out, hidden, 1, 1), (out,)
    weights = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) / s[-3 if len(s) > 1 else 0] ** 0.5 for s in shapes]
    if not bias:
        weights[1] = weights[3] = None
    return [make_input(shape, dtype, layout), *weights]


def layers(x, weight_in, bias_in, weight_out, bias_out):
    return functional.conv2d(functional.gelu(functional.conv2d(x, weight_in, bias_in)), weight_out, bias_out)


def cast(args, dtype):
    return [None if arg is None else arg.to(dtype) for arg in args]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, layout, bias):
    args = sample(dtype, layout, bias=bias)
    exact = layers(*cast(args, torch.float64))
    with torch.no_grad():
        y = pointwise_mlp(*args)
    assert y.dtype == dtype
    assert_as_accurate(y, layers(*args), exact, units=2)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
    leaves = [arg.detach().requires_grad_() for arg in args if arg is not None]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = []
    for function, given in ((pointwise_mlp, leaves), (layers, leaves), (layers, doubles)):
        full = given if bias else [given[0], given[1], None, given[2], None]
        y = function(*full)
        results.append([y.detach(), *torch.autograd.grad(y, given, torch.ones_like(y) / 8)])
    for ours, theirs, truth in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert_as_accurate(ours, theirs, truth, units=2, alike=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("widened", [set(), {torch.bfloat16}], ids=["as it is", "widened"])
def test_bf16_is_multiplied_as_it_is_or_in_float32(widened, layout, monkeypatch):
    monkeypatch.setattr(products, "_WIDENED", widened)
    for bias in (True, False):
        test_values_and_gradients(torch.bfloat16, layout, bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mkl_is_slow", [False, True], ids=["by MKL", "by oneDNN"])
def test_float32_is_multiplied_by_either_library(mkl_is_slow, layout, monkeypatch):
    monkeypatch.setattr(products, "_MKL_IS_SLOW", mkl_is_slow)
    for bias in (True, False):
        test_values_and_gradients(torch.float32, layout, bias)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_derivatives_of_every_kind(layout):
    args = [arg.detach().requires_grad_() for arg in sample(torch.float64, layout, (2, 3, 2, 3), 5, 4)]
    assert torch.autograd.gradcheck(pointwise_mlp, args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(pointwise_mlp, args)
    tangents = [torch.randn_like(arg) for arg in args]
    ours = torch.func.jvp(pointwise_mlp, tuple(args), tuple(tangents))
    for a, b in zip(ours, torch.func.jvp(layers, tuple(args), tuple(tangents)), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.vmap(lambda x: pointwise_mlp(x[None], *args[1:])[0])(args[0]), layers(*args))


def test_a_frozen_part_gets_no_gradient_and_the_rest_its_own():
    args = sample(torch.float32)
    for index in (0, 1, 3):
        given = [arg.clone().requires_grad_(i == index) for i, arg in enumerate(args)]
        (ours,) = torch.autograd.grad(pointwise_mlp(*given).square().sum(), given[index])
        (theirs,) = torch.autograd.grad(layers(*given).square().sum(), given[index])
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("channels", [12, 32])
def test_keeps_its_input_and_one_hidden_tensor(channels, monkeypatch):
    """On a residual branch, too, where it is one operator."""
    monkeypatch.setattr(products, "PAIR_POSITIONS", 0)
    args = [arg.requires_grad_() for arg in sample(torch.float32, shape=(2, channels, 8, 8), hidden=48 * 2, out=channels)]
    norm = torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)
    branch = (args[0], None, (*norm, 1e-5)) if channels == 32 and cpu_capability() != "plain" else ()
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pointwise_mlp(*args, *branch)
    given = sum(arg.nbytes for arg in (*args, *(norm if branch else ())))
    assert sum(kept.values()) == given + 2 * 96 * 64 * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    args = [arg.requires_grad_() for arg in sample(torch.float32)]
    expected = torch.autograd.grad(layers(*args).square().sum(), args)
    y = checkpoint(pointwise_mlp, *args, use_reentrant=reentrant)
    y.square().sum().backward()
    for arg, grad in zip(args, expected, strict=True):
        torch.testing.assert_close(arg.grad, grad)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, gradients):
    args = [arg.requires_grad_(gradients) for arg in sample(torch.float32, "channels_last")]
    with torch.autocast("cpu", dtype=dtype):
        y = pointwise_mlp(*args)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), layers(*args).float(), rtol=0.05, atol=0.02)
        assert pointwise_mlp(*cast(args, torch.float64)).dtype == torch.float64
    if gradients:
        y.float().sum().backward()
        assert all(arg.grad.dtype == torch.float32 for arg in args)


@pytest.mark.parametrize("shape", [(0, 12, 5, 6), (2, 12, 1, 1)], ids=str)
def test_small_shapes(shape):
    args = [arg.requires_grad_() for arg in sample(torch.float32, shape=shape)]
    y = pointwise_mlp(*args)
    assert y.shape == (shape[0], 8, *shape[2:])
    y.sum().backward()
    torch.testing.assert_close(y, layers(*args))


def test_on_the_meta_device():
    args = [arg.to("meta").requires_grad_() for arg in sample(torch.bfloat16, "channels_last")]
    y = pointwise_mlp(*args)
    assert y.shape == (2, 8, 5, 6)
    y.sum().backward()
    assert all(arg.grad.shape == arg.shape for arg in args)


def test_bad_input():
    x, weight_in, bias_in, weight_out, bias_out = sample(torch.float32)
    with pytest.raises(ValueError, match=r"pointwise_mlp: weight_in must have shape \(20, 12, 1, 1\)"):
        pointwise_mlp(x, weight_in[:, :11], bias_in, weight_out, bias_out)
    with pytest.raises(ValueError, match=r"pointwise_mlp: weight_out must have shape \(8, 20, 1, 1\)"):
        pointwise_mlp(x, weight_in, bias_in, weight_out[:, :19], bias_out)
    with pytest.raises(ValueError, match=r"pointwise_mlp: bias_in must have shape \(20,\)"):
        pointwise_mlp(x, weight_in, bias_in[:19], weight_out, bias_out)
    with pytest.raises(TypeError, match="pointwise_mlp: x must be a tensor, got Conv2d"):
        pointwise_mlp(nn.Conv2d(1, 1, 1), weight_in, bias_in, weight_out, bias_out)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("channels", [12, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(dtype, channels, gradients, monkeypatch):
    """Added once, whoever multiplies, also in another dtype than that of the products."""
    monkeypatch.setattr(products, "PAIR_POSITIONS", 0)
    args = sample(dtype, "channels_last", (2, channels, 9, 8), 2 * channels, channels)
    residual = make_input((2, channels, 9, 8), dtype, "channels_last", seed=3)
    leaves = [*args, residual] if not gradients else [arg.requires_grad_() for arg in (*args, residual)]
    y = pointwise_mlp(*leaves)
    exact = residual.double() + layers(*cast(args, torch.float64))
    assert_as_accurate(y.detach(), (residual + layers(*args)).detach(), exact.detach(), units=4, alike=True)
    if gradients:
        (grad,) = torch.autograd.grad(y, residual, torch.ones_like(y))
        assert torch.equal(grad, torch.ones_like(residual))
    if dtype == torch.bfloat16:
        with torch.no_grad():
            y, alone = pointwise_mlp(*args, residual.float()), pointwise_mlp(*args)
        assert y.dtype == torch.float32
        assert torch.equal(y, residual.float() + alone.float())
    with pytest.raises(ValueError, match=rf"pointwise_mlp: residual must have shape \(2, {channels}, 9, 8\)"):
        pointwise_mlp(*args, residual[:1])


@pytest.mark.parametrize("grad", ["dense", "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mkl_is_slow", [True, False])
def test_gradients_where_pairs_serve(mkl_is_slow, dtype, layout, grad, monkeypatch):
    """On a residual branch with a norm: to x, that is the residual, to norm, scale and weights."""
    monkeypatch.setattr(products, "PAIR_POSITIONS", 0)
    monkeypatch.setattr(products, "_MKL_IS_SLOW", mkl_is_slow)
    args = sample(dtype, layout, (3, 32, 9, 7), 96, 32)
    vectors = [torch.linspace(first, 2, 32).to(dtype) for first in (0.5, -1, 0)]

    def gradients(function, to):
        leaves = [arg.to(to).detach().requires_grad_() for arg in (*args, *vectors)]
        x, *weights, weight, bias, scale = leaves
        if function is pointwise_mlp:
            y = pointwise_mlp(x, *weights, x, scale, (weight, bias, 1e-5))
        else:
            y = scale[:, None, None] * x + layers(functional.group_norm(x, 1, weight, bias), *weights)
        dense = make_input(y.shape, torch.float64, seed=5).to(to)
        return y.detach(), *torch.autograd.grad(y, leaves, dense if grad == "dense" else dense[:1, :1, :1, :1].expand(y.shape))

    results = gradients(pointwise_mlp, dtype), gradients(layers, dtype), gradients(layers, torch.float64)
    for ours, theirs, truth in zip(*results, strict=True):
        assert_as_accurate(ours, theirs, truth, units=64, alike=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (70, 33), (200, 64)])
def test_gelu_and_its_gradient_in_one_pass(shape, dtype, bias):
    """Values, in-place gradients and their sums, in both tails; the same for any number of threads, and what NaN hits alone."""
    generator = torch.Generator().manual_seed(0)
    x, grad, b = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in (shape, shape, shape[1:]))
    x, b = 4 * x, b if bias else None
    h = (x.double() + (0 if b is None else b.double())).requires_grad_()
    exact = functional.gelu(h)
    (exact_grad,) = torch.autograd.grad(exact, h, grad.double())
    by_rows = grad.clone()
    a, sums = gelu(x, b, by_rows)
    eps = torch.finfo(dtype).eps
    for ours, truth in ((a, exact), (by_rows, exact_grad)):
        bound = 1e-14 if dtype == torch.float64 else (4e-5 if dtype == torch.bfloat16 else 1e-6) * (1 + grad.double().abs())
        assert ((ours.double() - truth).abs() <= bound + eps * truth.abs()).all()
    atol = {torch.float64: 1e-13, torch.bfloat16: 1e-3}.get(dtype, 3e-5)
    torch.testing.assert_close(sums.double(), exact_grad.sum(0), rtol=0, atol=atol)
    assert torch.equal(gelu(x, b, None)[0], a)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        other = grad.clone()
        assert all(torch.equal(*pair) for pair in zip((*gelu(x, b, other), other), (a, sums, by_rows), strict=True))
    finally:
        torch.set_num_threads(threads)
    if x.numel():
        x[-1, -1] = torch.nan
        assert gelu(x, b, None)[0].isnan().sum() == 1


def test_gelu_contract():
    x, bias, grad = torch.randn(5, 7), torch.randn(7), torch.randn(5, 7)
    for given in ((x, bias, grad), (x, None, None)):
        torch.library.opcheck(gelu, given)
    for message, given in {
        r"x must be contiguous of shape \(N, D\)": (x.mT, None, None),
        r"bias must be contiguous of shape \(D,\)": (x, bias[:6], None),
        "grad must be contiguous, of the shape and dtype of x": (x, bias, grad.double()),
    }.items():
        with pytest.raises(RuntimeError, match=f"gelu: {message}"):
            gelu(*given)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place(dtype, layout, monkeypatch):
    """The residual's memory is the result's in inference where pairs serve, and nowhere else."""
    monkeypatch.setattr(products, "PAIR_POSITIONS", 0)
    x, *weights = sample(dtype, layout, (2, 32, 9, 7), 64, 32)
    norm = torch.ones(32, dtype=dtype), torch.zeros(32, dtype=dtype), 1e-5
    given, scale = x.clone(), torch.linspace(0, 2, 32).to(dtype)
    expected = pointwise_mlp(x, *weights, x, scale, norm)
    assert torch.equal(pointwise_mlp(x, *weights, x, scale, norm), expected)
    assert torch.equal(x, given)
    with torch.enable_grad():
        pointwise_mlp(x, *(weight.clone().requires_grad_() for weight in weights), x, scale, norm, inplace=True)
    assert torch.equal(x, given)
    y = pointwise_mlp(x, *weights, x, scale, norm, inplace=True)
    assert torch.equal(y, expected)
    assert (y.data_ptr() == x.data_ptr()) == (cpu_capability() != "plain")
    other = torch.empty(2, 32, 7, 9, dtype=dtype).transpose(2, 3)  # memory of another layout is not written over
    assert pointwise_mlp(given, *weights, other, scale, norm, inplace=True).data_ptr() != other.data_ptr()
