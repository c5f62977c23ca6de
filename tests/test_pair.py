"""pointwise_pair, the fused pair of 1x1 convolutions on the CPU, against PyTorch's convolutions."""

from __future__ import annotations

import pytest
import torch
from errors import assert_as_accurate
from torch.nn import functional

from spanet_kernels import SPAM, _native, pointwise_mlp, products, reference
from spanet_kernels.testing import make_input

operator = torch.ops.spanet_kernels.pointwise_pair.default
moments_of = torch.ops.spanet_kernels.image_moments.default
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# (B, C, H, W), hidden and output channels: one pixel, images of a few pixels, parts of a vector and of a strip, several strips and parts of
# the hidden channels
SHAPES = [
    ((1, 32, 1, 1), 32, 32),
    ((19, 32, 1, 1), 32, 32),
    ((23, 32, 1, 3), 32, 64),
    ((2, 32, 3, 5), 64, 96),
    ((3, 64, 7, 7), 288, 32),
    ((1, 96, 9, 11), 32, 64),
    ((2, 64, 17, 19), 544, 64),
    ((5, 32, 10, 5), 96, 160),
]


def run(function, y, args, around):
    """Calls function with y; args are x, factor, residual and the weights and biases, around moments, norm's vectors and a scale."""
    x, factor, residual, *weights = args
    moments, norm_weight, norm_bias, scale = around or (None,) * 4
    function(y, x, moments, norm_weight, norm_bias, factor, residual, scale, *weights)
    return y


def pair(*args, to="contiguous", around=None):
    """The result in fresh memory of a layout, NaN before."""
    x, weight_out = args[0], args[5]
    y = torch.full((x.shape[0], weight_out.shape[0], *x.shape[2:]), torch.nan, dtype=x.dtype).contiguous(memory_format=FORMATS[to])
    return run(operator, y, args, around)


def by_convolutions(*args, around=None):
    """The same by the reference, in the dtype of its arguments."""
    y = args[0].new_empty((args[0].shape[0], args[5].shape[0], *args[0].shape[2:]))
    return run(reference.pointwise_pair, y, args, around)


def sample(shape, hidden, out, dtype, layout="contiguous", factor=False, bias=True, residual=None, seed=0):
    """What the operator reads."""
    generator = torch.Generator().manual_seed(seed)

    def weights(*size):
        return (torch.randn(size, generator=generator, dtype=torch.float64) / size[-1] ** 0.5).to(dtype)

    x, f = (make_input((shape[0], channels, *shape[2:]), dtype, layout, seed=seed + n) for n, channels in enumerate((shape[1], hidden)))
    in_out = weights(hidden, shape[1]), weights(hidden) if bias else None, weights(out, hidden), weights(out) if bias else None
    r = make_input((shape[0], out, *shape[2:]), dtype, residual, seed=seed + 2) if residual else None
    return [x, f if factor else None, r, *in_out]


def sample_around(args, eps=1e-5, seed=0):
    """Moments of x, weight and bias of its norm, and a scale of the residual if there is one."""
    generator = torch.Generator().manual_seed(seed + 3)
    x, residual, out = args[0], args[2], args[5].shape[0]
    weight, bias, scale = (torch.randn(n, generator=generator).to(x.dtype) for n in (x.shape[1], x.shape[1], out))
    return moments_of(x, eps), weight, bias, None if residual is None else scale


def doubled(args):
    return None if args is None else [None if arg is None else arg.double() for arg in args]


def exact(args, around=None):
    return by_convolutions(*doubled(args), around=doubled(around))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factor", [True, False])
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden", "out"), SHAPES)
def test_as_accurate_as_the_convolutions(shape, hidden, out, dtype, layout, to, factor, bias):
    args = sample(shape, hidden, out, dtype, layout, factor, bias, to if bias else None)
    y = pair(*args, to=to)
    # both round h to bf16, as it were two samples of one distribution
    assert_as_accurate(y, by_convolutions(*args), exact(args), units=4, alike=True)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden", "out"), SHAPES)
def test_what_is_before_the_gelu(shape, hidden, out, dtype, layout, to):
    """It is written besides, and changes nothing."""
    args = sample(shape, hidden, out, dtype, layout, residual=to)
    around = sample_around(args)
    y = pair(*args, to=to, around=around)

    def with_it(function, args, around):
        x, factor, residual, *weights = args
        moments, norm_weight, norm_bias, scale = around
        again, before = (
            torch.full((shape[0], count, *shape[2:]), torch.nan, dtype=x.dtype).contiguous(memory_format=FORMATS[layout])
            for count, layout in ((out, to), (hidden, "channels_last"))
        )
        function(again, x, moments, norm_weight, norm_bias, factor, residual, scale, *weights, before)
        return again, before

    again, before = with_it(operator, args, around)
    assert torch.equal(again, y)
    exact = with_it(reference.pointwise_pair, doubled(args), doubled(around))[1]
    assert_as_accurate(before, with_it(reference.pointwise_pair, args, around)[1], exact, units=4, alike=True)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden", "out"), SHAPES)
def test_gradients_of_an_mlp(shape, hidden, out, dtype, layout, to):
    """Of x in one layout and of its grad in another."""
    _, h, grad, weight_in, _, weight_out, _ = sample(shape, hidden, out, dtype, "channels_last", factor=True, residual=to)
    given = grad, h, weight_in, weight_out

    def gradients(function, given):
        x_grad, h_grad = (torch.full(size, torch.nan, dtype=given[0].dtype) for size in (shape, h.shape))
        x_grad, h_grad = x_grad.contiguous(memory_format=FORMATS[layout]), h_grad.contiguous(memory_format=torch.channels_last)
        function(x_grad, h_grad, *given)
        return x_grad, h_grad

    found = gradients(torch.ops.spanet_kernels.pointwise_mlp_backward, given)
    plain, truth = (gradients(reference.pointwise_mlp_backward, args) for args in (given, doubled(given)))
    for ours, theirs, exact in zip(found, plain, truth, strict=True):
        assert_as_accurate(ours, theirs, exact, units=4, alike=True)
    for ours, again in zip(found, gradients(torch.ops.spanet_kernels.pointwise_mlp_backward, given), strict=True):
        assert torch.equal(ours, again)
    torch.library.opcheck(torch.ops.spanet_kernels.pointwise_mlp_backward.default, (*(torch.zeros_like(t) for t in found), *given))


@pytest.mark.parametrize("what", ["mlp", "factor", "one"])
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden", "out"), SHAPES)
def test_on_a_residual_branch(shape, hidden, out, dtype, layout, to, what):
    """With a norm before it, and a scaled residual; one product where there is no W_in."""
    hidden = shape[1] if what == "one" else hidden
    args = sample(shape, hidden, out, dtype, layout, what == "factor", True, to)
    if what == "one":
        args[3] = args[4] = None
    around = sample_around(args)
    y = pair(*args, to=to, around=around)
    # beside h, n and the scaled residual are rounded to bf16 by the reference
    assert_as_accurate(y, by_convolutions(*args, around=around), exact(args, around), units=4, alike=True)
    assert torch.equal(y, pair(*args, to=to, around=around))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 32, 7, 9), (2, 5, 1, 1), (1, 3, 61, 67), (0, 4, 3, 3)])
@pytest.mark.parametrize("mean", [0, 1000])
def test_moments(shape, dtype, layout, mean):
    x = (make_input(shape, torch.float64) + mean).to(dtype).contiguous(memory_format=FORMATS[layout])
    found, truth = moments_of(x, 1e-5), reference.image_moments(x.double(), 1e-5).double()
    assert found.dtype == torch.float32
    assert found.shape == (shape[0], 2)
    torch.testing.assert_close(found.double(), truth, rtol=8 * torch.finfo(torch.float32).eps, atol=0)
    for image in range(shape[0]):
        assert torch.equal(moments_of(x[image : image + 1], 1e-5), found[image : image + 1])
    torch.library.opcheck(moments_of, (x, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_in_both_tails(dtype):
    """The identity on both sides, so that the values are those of the GELU."""
    x = torch.linspace(-12, 12, 32 * 3 * 50, dtype=torch.float64).view(1, 32, 3, 50).to(dtype)
    one = torch.eye(32, dtype=dtype)
    y, truth = pair(x, None, None, one, None, one, None), functional.gelu(x.double())
    bound = 6e-7 if dtype == torch.float32 else 3e-5
    assert ((y.double() - truth).abs() <= bound + torch.finfo(dtype).eps * truth.abs()).all()
    assert y.isfinite().all()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pixel_depends_on_itself_alone(dtype, layout):
    """Not on the batch it is in, on its place in a vector, on threads, or on a NaN or Inf beside it."""
    args = sample((3, 64, 11, 13), 96, 32, dtype, layout)
    y, around = pair(*args), sample_around(args)
    normal = pair(*args, to=layout, around=around)
    for image in range(3):
        one = slice(image, image + 1)
        alone = args[0][one].clone(memory_format=FORMATS[layout])
        assert torch.equal(pair(alone, *args[1:]), y[one])
        assert torch.equal(pair(alone, *args[1:], to=layout, around=(around[0][one], *around[1:])), normal[one])
    moved = args[0].roll(1, 3).contiguous(memory_format=FORMATS[layout])
    assert torch.equal(pair(moved, *args[1:]), y.roll(1, 3))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(pair(*args), y)
    finally:
        torch.set_num_threads(threads)
    args[0][1, 5, 4, 6], args[0][2, 7, 0, 0] = torch.nan, torch.inf
    hit = torch.zeros(3, 1, 11, 13, dtype=torch.bool)
    hit[1, :, 4, 6] = hit[2, :, 0, 0] = True
    other = pair(*args)
    assert not other[1, :, 4, 6].isfinite().any()
    assert not other[2, :, 0, 0].isfinite().all()
    assert torch.equal(other.masked_fill(hit, 0), y.masked_fill(hit, 0))


def test_an_axis_of_length_1_may_have_any_stride():
    args = sample((3, 32, 7, 1), 64, 32, torch.float32, "channels_last")
    odd = args[0].as_strided((3, 32, 7, 1), (32 * 7, 1, 32, 5))
    assert torch.equal(pair(odd, *args[1:]), pair(*args))


def test_no_images():
    args = sample((2, 32, 4, 4), 64, 32, torch.float32)
    assert pair(args[0][:0], *args[1:]).shape == (0, 32, 4, 4)


def test_operator_contract():
    for layout in FORMATS:
        for factor in (True, False):
            args = sample((2, 32, 5, 6), 64, 96, torch.float32, layout, factor, residual="contiguous" if factor else None)
            x, f, residual, *weights = args
            moments, *norm, scale = sample_around(args)
            torch.library.opcheck(operator, (torch.zeros(2, 96, 5, 6), x, None, None, None, f, residual, None, *weights))
            torch.library.opcheck(operator, (torch.zeros(2, 96, 5, 6), x, moments, *norm, f, residual, scale, *weights))
    before = torch.zeros(2, 64, 5, 6).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(operator, (torch.zeros(2, 96, 5, 6), x, None, None, None, None, None, None, *weights, before))


def test_bad_input():
    x, _, _, *weights = sample((2, 32, 5, 6), 64, 32, torch.float32)
    for message, args in {
        "x must be contiguous or channels_last": (x.transpose(2, 3), None, None, *weights),
        r"x must have shape \(B, C, H, W\)": (x[0], None, None, *weights),
        "weight_in must be contiguous with one column per channel": (x[:, :31].contiguous(), None, None, *weights),
        "bias_out must be contiguous with 32 elements": (x, None, None, *weights[:3], weights[3][:31]),
        "factor must have shape .* and needs weight_in": (x, x, None, None, None, torch.zeros(32, 32), None),
        "factor must have shape": (x, x, None, *weights),
        "factor must have shape .*, contiguous or channels_last": (x, torch.zeros(2, 64, 6, 5).mT, None, *weights),
        "residual must have shape": (x, None, x[:1], *weights),
        "channels must be multiples of 32": (x, None, None, weights[0][:40], None, weights[2][:, :40].contiguous(), None),
        "x must be float32 or bfloat16": (x.half(), None, None, *(weight.half() for weight in weights)),
    }.items():
        with pytest.raises(RuntimeError, match=f"pointwise_pair: {message}"):
            pair(*args)
    for y in (torch.empty(2, 31, 5, 6), torch.empty(2, 32, 5, 12)[..., ::2], torch.empty(2, 32, 5, 6, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match=r"pointwise_pair: y must have shape \(B, out, H, W\), in the dtype of x"):
            run(operator, y, (x, None, None, *weights), None)
    y, before = torch.empty(2, 32, 5, 6), torch.empty(2, 64, 5, 6)
    for wrong in (before, before.contiguous(memory_format=torch.channels_last)[:1], before.bfloat16()):
        with pytest.raises(RuntimeError, match=r"pointwise_pair: before must have shape .* and channels_last, and needs weight_in"):
            operator(y, x, None, None, None, None, None, None, *weights, wrong)
    for message, index, wrong in (("moments must be", 0, (3, 2)), ("norm_weight must be", 1, (31,)), ("residual_scale must be", 3, (1,))):
        around = [torch.zeros(2, 2), torch.zeros(32), torch.zeros(32), torch.zeros(32)]
        around[index] = torch.zeros(wrong)
        with pytest.raises(RuntimeError, match=f"pointwise_pair: {message}"):
            pair(x, None, x, *weights[:2], torch.zeros(32, 64), None, around=around)
    with pytest.raises(RuntimeError, match="image_moments: x must be contiguous or channels_last"):
        moments_of(x.transpose(2, 3), 0.0)
    with pytest.raises(RuntimeError, match="image_moments: x must be float32 or bfloat16"):
        moments_of(x.half(), 0.0)


@pytest.mark.skipif(_native.cpu_capability() == "plain", reason="without vector instructions oneDNN does it")
@pytest.mark.parametrize("layout", FORMATS)
def test_the_mlp_and_the_mixer_are_made_of_it(layout, monkeypatch):
    monkeypatch.setattr(products, "PAIR_POSITIONS", 0)
    x, _, _, weight_in, bias_in, weight_out, bias_out = sample((4, 32, 9, 9), 64, 32, torch.float32, layout)
    layer, norm = SPAM(32), (torch.randn(32), torch.randn(32), 1e-5)
    mlp = weight_in[:, :, None, None], bias_in, weight_out[:, :, None, None], bias_out
    with torch.no_grad():
        for branch in ((), (x, torch.randn(32), norm)):
            with torch.profiler.profile() as profile:
                pointwise_mlp(x, *mlp, *branch)
                layer(x, *branch)
            found = {event.key.removeprefix("spanet_kernels::"): event.count for event in profile.key_averages() if "spanet" in event.key}
            assert found == {"pointwise_pair": 1, "mixer_branch": 1} | ({"image_moments": 1} if branch else {})
