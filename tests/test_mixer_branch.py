"""mixer_branch, the mixer as one operator of the CPU, and mixer_branch_backward, its gradients, against the reference."""

from __future__ import annotations

import contextlib

import pytest
import torch
from errors import assert_as_accurate

from spanet_kernels import modes, reference, use
from spanet_kernels.testing import make_input, make_profile

operator = torch.ops.spanet_kernels.mixer_branch.default
operator_backward = torch.ops.spanet_kernels.mixer_branch_backward.default
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# one pixel, modes that are many beside pixels and few, several images at a time and fewer at the end, images that are larger than a part
SHAPES = [((1, 32, 1, 1), 1), ((3, 32, 6, 5), 2), ((3, 64, 7, 9), 1), ((5, 64, 66, 65), 2), ((2, 32, 131, 130), 4.5), ((2, 96, 8, 8), None)]


def sample(shape, radius, dtype, layout="contiguous"):
    """What the operator reads behind y and t."""
    channels, wide = shape[1], modes.profile_dtype(dtype)
    generator = torch.Generator().manual_seed(shape[2])

    def values(*size, dtype=dtype):
        return (torch.randn(size, generator=generator, dtype=torch.float64) / size[-1] ** 0.5).to(dtype)

    norm = 1 + values(channels), values(channels), 1e-5
    residual, scale = make_input(shape, dtype, layout, seed=1), values(channels)
    taps = (values(channels, 7, dtype=wide), values(channels, dtype=wide)) * 2
    products = [values(*size) for size in ((channels, channels), (channels,)) * 3]
    base, gain = make_profile(channels, radius or 0, dtype)
    profile = (base, gain) if radius is not None else (base, gain[:0])
    x = make_input(shape, dtype, layout)
    return [x, *norm, residual, scale, *products[:2], *taps, *products[2:4], *profile, *products[4:]], modes.squared_radius(radius or 0)


def run(function, args, squared, keep=False):
    """y, and t and the context where they are kept, in fresh memory, NaN before."""
    layouts = modes.memory_format(args[0]), torch.channels_last, torch.channels_last
    y, *kept = (torch.full_like(args[0], torch.nan, memory_format=layout) for layout in layouts)
    function(y, *(kept if keep else (None, None)), *args, squared)
    return (y, *kept) if keep else y


def widened(args):
    return [arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args]


@pytest.mark.parametrize("what", ["all", "norm", "residual", "kept"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "radius"), SHAPES, ids=str)
def test_as_accurate_as_the_reference(shape, radius, dtype, layout, what):
    args, squared = sample(shape, radius, dtype, layout)
    args[1:3] = (None, None) if what in ("residual", "kept") else args[1:3]
    args[4] = None if what in ("norm", "kept") else args[4]
    args[5] = args[5] if what == "all" else None
    if radius is None:  # the weight has taken in the base
        squared, args[14] = -1, torch.ones_like(args[14])
    y = run(operator, args, squared)
    exact, plain = (run(reference.mixer_branch, given, squared) for given in (widened(args), args))
    # between them t, z, the filtered z and the gate are rounded, in bf16 a sample of one distribution each
    assert_as_accurate(y, plain, exact, units=4, alike=True)
    again, *kept = run(operator, args, squared, keep=True)
    assert torch.equal(y, again)
    expected = [run(reference.mixer_branch, given, squared, keep=True)[1:] for given in (args, widened(args))]
    for ours, theirs, truth in zip(kept, *expected, strict=True):
        assert_as_accurate(ours, theirs, truth, units=4, alike=True)
    for image in range(shape[0]):
        one = [arg[image : image + 1] if arg is not None and i in (0, 4) else arg for i, arg in enumerate(args)]
        assert torch.equal(run(operator, one, squared), y[image : image + 1])


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_taps_as_convolutions_have_them(implementation):
    """With axes of length 1 between, and in the dtype of x."""
    args, squared = sample((2, 32, 5, 6), 1, torch.bfloat16)
    args[8:12] = (taps.bfloat16() for taps in args[8:12])
    with use(implementation) if implementation else contextlib.nullcontext():
        y = run(operator, [*args[:8], *(taps.float() for taps in args[8:12]), *args[12:]], squared)
        args[8], args[10] = args[8][:, None, None], args[10][:, None, :, None]
        assert torch.equal(run(operator, args, squared), y)


def gradients(function, maps, args, learns):
    """Of x in fresh memory, NaN before, and of the parameters."""
    x_grad = torch.full_like(maps[1], torch.nan, memory_format=modes.memory_format(maps[1]))
    return x_grad, *function(x_grad, *maps, *args, learns)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "radius"), [*SHAPES, ((5, 64, 40, 36), 2), ((3, 96, 15, 21), 1)], ids=str)
def test_gradients_as_accurate_as_the_reference(shape, radius, dtype, layout, learns):
    (x, _, _, _, _, _, *mixer), squared = sample(shape, radius, dtype, layout)
    if radius is None:  # the weight has taken in the base
        learns, squared, mixer[8] = False, -1, torch.ones_like(mixer[8])
    in_weight, _, *between, out_weight, _ = mixer
    args = [in_weight, *between, out_weight, squared]
    kept = [value.contiguous(memory_format=torch.channels_last) for value in reference.spectral_mixer(x, *mixer, squared, True)[1:3]]
    maps = make_input(shape, dtype, layout, seed=7), x, *kept, mixer[8].new_empty(0, 0)
    found, plain = (gradients(function, maps, args, learns) for function in (operator_backward, reference.mixer_branch_backward))
    truth = gradients(reference.mixer_branch_backward, widened(maps), widened(args), learns)
    added = operator(torch.empty_like(x), *map(torch.empty_like, kept), x, None, None, 0.0, None, None, *mixer, squared)
    few = modes.count(*shape[2:], squared) if squared >= 0 else 0
    assert added.shape == ((shape[0] * few, shape[1]) if 0 < 8 * few <= shape[2] * shape[3] else (0, 0))
    for given in (found, gradients(operator_backward, (*maps[:-1], added), args, learns)):
        for index, (ours, theirs, exact) in enumerate(zip(given, plain, truth, strict=True)):
            if not learns and index in (9, 10):
                assert ours.numel() == 0
                continue
            assert ours.dtype == (x.dtype if index == 0 else torch.float32)
            # sums over one pixel are its own rounding: a unit of bf16
            units = 2**15 if dtype == torch.bfloat16 and shape[2] * shape[3] == 1 else 16
            assert_as_accurate(ours, theirs, exact, units=units, alike=True)
    for ours, again in zip(found, gradients(operator_backward, maps, args, learns), strict=True):
        assert torch.equal(ours, again)


def test_by_the_modes_and_by_the_reference():
    args, squared = sample((3, 64, 7, 9), 1, torch.float32)
    expected = run(operator, args, squared, keep=True)
    for implementation in ("modes", "reference"):
        with use(implementation):
            for ours, theirs in zip(run(operator, args, squared, keep=True), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_operator_contract():
    for layout in FORMATS:
        args, squared = sample((2, 32, 5, 6), 1, torch.float32, layout)
        y, t = torch.zeros_like(args[0]), torch.zeros_like(args[0], memory_format=torch.channels_last)
        torch.library.opcheck(operator, (y, t, t.clone(), *args, squared))
        torch.library.opcheck(operator, (y, None, None, args[0], None, None, 0.0, None, None, *args[6:], squared))


def test_no_images():
    args, squared = sample((2, 32, 4, 4), 1, torch.float32)
    args[0], args[4] = args[0][:0], args[4][:0]
    assert run(operator, args, squared).shape == (0, 32, 4, 4)


def test_contract_of_the_gradients():
    (x, _, _, _, _, _, in_weight, _, *between, out_weight, _), squared = sample((2, 32, 5, 6), 1, torch.float32)
    maps = torch.zeros_like(x), x, x, *(x.clone(memory_format=torch.channels_last) for _ in range(2)), torch.empty(0, 0)
    weights = in_weight, *between, out_weight
    for learns in (False, True):
        torch.library.opcheck(operator_backward, (*maps, *weights, squared, learns))
    torch.library.opcheck(operator_backward, (*maps, *weights, -1, False))
    for message, given, radius in (
        ("t and context must be channels_last", (*maps[:4], x, maps[5]), squared),
        ("added must be empty, or what mixer_branch returned for x", (*maps[:5], torch.zeros(3, 32)), squared),
        ("grad must have the shape and dtype of x", (maps[0], x.double(), *maps[2:]), squared),
        (r"x must have shape \(B, C, H, W\) and elements", (*(value[:0] for value in maps[:5]), maps[5]), squared),
    ):
        with pytest.raises(RuntimeError, match=f"mixer_branch_backward: {message}"):
            operator_backward(*given, *weights, radius, False)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(32, 5, 6), r"mixer_branch: x must have shape \(B, C, H, W\)"),
        (4, torch.zeros(1, 32, 5, 6), "mixer_branch: residual must have the shape and dtype of x"),
        (5, torch.zeros(31), "pointwise_pair: residual_scale must be contiguous with 32 elements"),
        (6, torch.zeros(32, 31), "pointwise_pair: weight_out must be contiguous with one column per channel"),
        (8, torch.zeros(32, 6), "axial_conv: row_weight must have shape"),
        (9, torch.zeros(64)[::2], "mixer_branch: weights and biases of the axial convolution must be contiguous"),
        (13, torch.zeros(32, dtype=torch.float64), "pointwise_pair: bias_in must be contiguous with 32 elements of the dtype of x"),
        (15, torch.zeros(3, 32), "radial_filter: base must have shape"),
    ],
)
def test_bad_input(index, wrong, message):
    args, squared = sample((2, 32, 5, 6), 1, torch.float32)
    y = torch.full_like(args[0], torch.nan)
    args[index] = wrong
    with pytest.raises(RuntimeError, match=message):
        operator(y, None, None, *args, squared)
    with pytest.raises(RuntimeError, match="mixer_branch: y must have the shape and dtype of x"):
        operator(y[:1], None, None, *sample((2, 32, 5, 6), 1, torch.float32)[0], squared)
    with pytest.raises(RuntimeError, match="mixer_branch: t must have the shape and dtype of x"):
        operator(y, y.double(), None, *sample((2, 32, 5, 6), 1, torch.float32)[0], squared)
