"""The gate, the mixer and the layer: against the reference, the published layer, and everything PyTorch does with a module."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from errors import assert_as_accurate
from published_layer import PublishedSPAM
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim, export

from spanet_kernels import (
    SPAM,
    SPF,
    SPG,
    accelerate,
    axial_conv,
    composed,
    decompositions,
    modes,
    pointwise_mlp,
    products,
    reference,
    spectral_gate,
    spectral_mixer,
    use,
)
from spanet_kernels._native import cpu_capability
from spanet_kernels.testing import DTYPES, LAYOUTS, make_input, make_profile

OPS = torch.ops.spanet_kernels
SHAPES = [((2, 20, 7, 7), 1), ((2, 33, 14, 13), 2), ((1, 64, 28, 28), 2), ((3, 24, 15, 1), 1), ((2, 6, 12, 10), 4.5), ((2, 16, 9, 9), None)]


def profile(channels, radius, dtype):
    base, gain = make_profile(channels, radius or 0, dtype)
    return (base, gain) if radius is not None else (base, gain[:0])


def gate_arguments(shape, radius, dtype, layout="contiguous"):
    z = make_input(shape, dtype, layout)
    weight = make_input((1, 1, shape[1], shape[1]), dtype, seed=5)[0, 0] / shape[1] ** 0.5
    return z, weight, make_input((1, 1, 1, shape[1]), dtype, seed=6).flatten(), *profile(shape[1], radius, dtype)


def mixer_arguments(shape, radius, dtype, layout="contiguous", size=7):
    channels, wide = shape[1], modes.profile_dtype(dtype)
    z, weight, bias, base, gain = gate_arguments(shape, radius, dtype, layout)
    row = make_input((channels, 1, 1, size), wide, seed=7) / size
    column = make_input((channels, 1, size, 1), wide, seed=8) / size
    out_weight = make_input((1, 1, channels, channels), dtype, seed=9)[0, 0] / channels
    in_weight = make_input((1, 1, channels, channels), dtype, seed=10)[0, 0] / channels
    biases = [make_input((1, 1, 1, channels), d, seed=11 + i).flatten() for i, d in enumerate((dtype, wide, wide, dtype))]
    return z, in_weight, biases[0], row, biases[1], column, biases[2], weight, bias, base, gain, out_weight, biases[3]


def mixer(radius):
    return lambda *a: spectral_mixer(*a[:11], radius, *a[11:])


def reference_mixer(arguments, squared):
    flat = [a.flatten(1) if a.dim() == 4 and i else a for i, a in enumerate(arguments)]
    return reference.spectral_mixer(*flat, squared)[0]


def squared_of(radius):
    return -1 if radius is None else modes.squared_radius(radius)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "radius"), SHAPES, ids=str)
def test_gate_error_rule(shape, radius, dtype, layout):
    z, *others = gate_arguments(shape, radius, dtype, layout)
    y = spectral_gate(z, *others, radius)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=modes.memory_format(z))
    exact = reference.spectral_gate(z.double(), None, *(a.double() for a in others), squared_of(radius))
    assert_as_accurate(y, reference.spectral_gate(z, None, *others, squared_of(radius)), exact, alike=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "radius"), SHAPES, ids=str)
def test_mixer_error_rule(shape, radius, dtype, layout):
    arguments = mixer_arguments(shape, radius, dtype, layout)
    y = mixer(radius)(*arguments)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=modes.memory_format(arguments[0]))
    exact = reference_mixer([a.double() for a in arguments], squared_of(radius))
    assert_as_accurate(y, reference_mixer(arguments, squared_of(radius)), exact, alike=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", ["gate", "mixer"])
@pytest.mark.parametrize(("shape", "radius"), SHAPES[:3], ids=str)
def test_gradient_error_rule(function, shape, radius, dtype, layout):
    def run(arguments, judge):
        arguments = [a.detach().requires_grad_() for a in arguments]
        if function == "gate":
            z, *others = arguments
            y = reference.spectral_gate(z, None, *others, squared_of(radius)) if judge else spectral_gate(*arguments, radius)
        else:
            y = reference_mixer(arguments, squared_of(radius)) if judge else mixer(radius)(*arguments)
        return torch.autograd.grad(y, arguments, make_input(shape, y.dtype, layout, seed=99) / 64)  # within the range of float16

    arguments = (gate_arguments if function == "gate" else mixer_arguments)(shape, radius, dtype, layout)
    ours, same, exact = run(arguments, False), run(arguments, True), run([a.double() for a in arguments], True)
    for a, b, c in zip(ours, same, exact, strict=True):
        assert a.dtype == b.dtype
        assert_as_accurate(a, b, c, units=2, alike=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("widened", [set(), {torch.bfloat16}], ids=["as it is", "widened"])
def test_bf16_is_multiplied_as_it_is_or_in_float32(widened, layout, monkeypatch):
    monkeypatch.setattr(products, "_WIDENED", widened)
    for function, case in itertools.product(("gate", "mixer"), SHAPES[1:3]):
        test_gradient_error_rule(function, *case, torch.bfloat16, layout)
    test_gradient_error_rule("gate", *SHAPES[-1], torch.bfloat16, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mkl_is_slow", [False, True], ids=["by MKL", "by oneDNN"])
def test_float32_is_multiplied_by_either_library(mkl_is_slow, layout, monkeypatch):
    monkeypatch.setattr(products, "_MKL_IS_SLOW", mkl_is_slow)
    for function, case in itertools.product(("gate", "mixer"), SHAPES[:3]):
        test_gradient_error_rule(function, *case, torch.float32, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("radius", [1, None])
@pytest.mark.parametrize("function", ["conv", "gate", "mixer"])
def test_derivatives_of_every_kind(function, radius, layout):
    tight = dict(atol=1e-7, nondet_tol=0.0)
    if function == "gate":
        arguments, call = gate_arguments((2, 3, 4, 5), radius, torch.float64, layout), lambda *a: spectral_gate(*a, radius)
    elif function == "mixer":
        arguments, call = mixer_arguments((2, 3, 4, 5), radius, torch.float64, layout, size=3), mixer(radius)
    else:
        x, _, _, *arguments = mixer_arguments((2, 3, 4, 5), radius, torch.float64, layout, size=3)
        arguments, call = (x, *arguments[:4]), lambda *a: axial_conv(*a, radius)[0]
    arguments = [a.requires_grad_() for a in arguments]
    assert gradcheck(call, arguments, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, **tight)
    assert gradgradcheck(call, arguments, check_fwd_over_rev=True, check_batched_grad=True, **tight)


def test_torch_func():
    z, weight, bias, base, gain = gate_arguments((2, 3, 5, 4), 2, torch.float64)

    def loss(weight, gain, z):
        return spectral_gate(z, weight, bias, base, gain, 2).square().sum()

    batch = torch.stack([z, z * 0.3 + 1])
    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(weight, gain, batch)
    one_by_one = [torch.func.grad(loss, argnums=(0, 1))(weight, gain, z) for z in batch]
    for found, expected in zip(each, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 4, 5), (2, 4, 1, 1)], ids=str)
def test_opcheck(shape, dtype, layout):
    tolerance = dict.fromkeys(("atol", "rtol"), {torch.bfloat16: 4e-2, torch.float16: 4e-3}.get(dtype, 1e-5))
    x, _, _, row, row_bias, column, column_bias, *_ = arguments = [
        a.requires_grad_() for a in mixer_arguments(shape, 1, dtype, layout, size=3)
    ]
    flat = [a.flatten(1) if a.dim() == 4 and i else a for i, a in enumerate(arguments)]
    torch.library.opcheck(OPS.axial_conv.default, (x, row.flatten(1), row_bias, column.flatten(1), column_bias, 1), **tolerance)
    gate = (arguments[7], arguments[8], arguments[9], arguments[10])
    torch.library.opcheck(OPS.spectral_gate.default, (x, OPS.mode_coefficients(x.detach(), 1), *gate, 1), **tolerance)
    torch.library.opcheck(OPS.spectral_mixer.default, (*flat, 1, True), **tolerance)
    plain = [a.detach() for a in flat]
    y, *kept = OPS.spectral_mixer(*plain, 1, True)
    inputs = [plain[i] for i in (1, 3, 4, 5, 6, 7, 8, 9, 10, 11)]
    torch.library.opcheck(OPS.spectral_mixer_backward.default, (y, plain[0], *kept, *inputs, 1, True), **tolerance)
    torch.library.opcheck(
        OPS.spectral_gate_backward.default, (y, plain[0], OPS.mode_coefficients(plain[0], 1), *inputs[5:9], 1, False), **tolerance
    )
    torch.library.opcheck(OPS.mode_coefficients.default, (plain[0], 1), **tolerance)


def test_weights_of_the_operator_are_of_any_dtype():
    """As autocast has them: the same result as of weights that are cast before, and gradients in the dtypes of the weights."""
    x, *weights = mixer_arguments((2, 8, 5, 6), 2, torch.bfloat16, "channels_last")
    flat = [a.flatten(1) if a.dim() == 4 else a for a in weights]
    wide = [a.float().requires_grad_() for a in flat]
    torch.library.opcheck(OPS.spectral_mixer.default, (x, *wide, 4, True), rtol=4e-2, atol=4e-2)
    for y, again in zip(OPS.spectral_mixer(x, *flat, 4, True), OPS.spectral_mixer(x, *wide, 4, True), strict=True):
        torch.testing.assert_close(y, again.detach(), rtol=0, atol=0)
    for implementation in ("modes", "reference"):
        with use(implementation):
            y, *_ = OPS.spectral_mixer(x, *wide, 4, True)
            grads = torch.autograd.grad(y, wide, torch.ones_like(y))
        assert [grad.dtype for grad in grads] == [torch.float32] * 12


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("radius", [2, None])
def test_parts_give_the_same_gradients(radius, dtype, layout, monkeypatch):
    arguments = [a.requires_grad_() for a in mixer_arguments((3, 8, 5, 6), radius, dtype, layout)]
    grad = make_input((3, 8, 5, 6), dtype, layout, seed=99)
    found = []
    for size in (1, composed.PART):
        monkeypatch.setattr(composed, "PART", size)
        monkeypatch.setattr(composed, "BACKWARD_PART", size)
        found.append(torch.autograd.grad(mixer(radius)(*arguments), arguments, grad))
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * torch.finfo(dtype).eps * float(theirs.norm()))


def parameters(layer):
    return [p for p in layer.parameters() if p.requires_grad]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dim", "size", "radius", "kernel"), [(64, 56, 2, 7), (20, 14, 1, 7), (96, 7, 1, 5), (10, 9, 2, 3)])
def test_the_function_of_the_published_layer(dim, size, radius, kernel, layout):
    torch.manual_seed(dim)
    published, layer = PublishedSPAM(dim, kernel, size, size, radius), SPAM(dim, kernel, radius=radius)
    layer.load_state_dict(published.state_dict())
    x = (torch.randn(2, dim, size, size) + 1).contiguous(memory_format=layout).requires_grad_()
    expected, y = published(x), layer(x)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    wanted = torch.autograd.grad(expected, [x, *parameters(published)], grad)
    for found, want in zip(torch.autograd.grad(y, [x, *parameters(layer)], grad), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()) + 1e-6)
    again = PublishedSPAM(dim, kernel, size, size, radius)
    again.load_state_dict(layer.published_state(size, size))
    assert torch.equal(again(x), expected)


def test_gates_of_any_number_and_spg():
    torch.manual_seed(0)
    x = torch.randn(2, 12, 9, 8) + 1
    for lams in ((), (0.6,), (0.1, 0.4, 0.7, 0.9)):
        layer = SPAM(12, 3, lams, radius=1.5, boundary=None)
        z = layer.conv(layer.proj_in(x))
        gates = []
        for i, chunk in enumerate(z.chunk(max(len(lams), 1), 1)):
            gate = SPG(chunk.shape[1], 12, lams[i] if lams else 0.5, 1.5)
            gate[1].load_state_dict(layer.pws[i].state_dict())
            gates.append(gate(chunk) if lams else layer.pws[0](chunk))
        torch.testing.assert_close(layer(x), layer.proj_out(z * sum(gates)))


def test_lams_are_learned():
    torch.manual_seed(0)
    layer, x = SPAM(9, 3, learnable=True).double(), torch.randn(2, 9, 6, 7, dtype=torch.float64)
    lams = layer.lams.detach().clone().requires_grad_()
    call = torch.func.functional_call
    assert gradcheck(lambda lams: call(layer, {"lams": lams}, x), lams, atol=1e-7, nondet_tol=0.0)
    layer(x).sum().backward()
    assert layer.lams.grad.shape == (3,)
    assert "lams" in layer.state_dict()


def test_learned_lams_come_and_go_as_masks():
    learned = SPAM(20, lams=(0.1, 0.2, 0.3), learnable=True)
    learned.load_state_dict(PublishedSPAM(20, 7, 14, 14, 2).state_dict())
    assert learned.lams.tolist() == torch.tensor((0.7, 0.8, 0.9)).tolist()
    with torch.no_grad():
        learned.lams.copy_(torch.tensor((0.65, 1.2, -0.3)))
    published, again = PublishedSPAM(20, 7, 9, 8, 2), SPAM(20, learnable=True)
    published.load_state_dict(learned.published_state(9, 8))
    holder = nn.Sequential(again)
    holder.load_state_dict({f"0.{key}": value for key, value in published.state_dict().items()})
    assert torch.equal(again.lams, learned.lams)
    x = torch.randn(2, 20, 9, 8) + 1
    torch.testing.assert_close(learned(x), published(x), rtol=1e-5, atol=1e-5)
    other_lams = PublishedSPAM(20, 7, 14, 14, 2).state_dict() | {"lams": torch.tensor((0.7, 0.8, 0.5))}
    for state, key in ((other_lams, "sps.2"), (PublishedSPAM(20, 7, 14, 14, 1).state_dict(), "sps.0")):
        with pytest.raises(ValueError, match=f"{key}.filter.* is not the mask"):
            again.load_state_dict(state)
        assert torch.equal(again.lams, learned.lams)


def test_masks_tell_a_layer_without_memory_its_lams():
    with torch.device("meta"):
        layer = SPAM(20, learnable=True)
    published = PublishedSPAM(20, 7, 14, 14, 2, (0.6, 0.8, 0.9))
    layer.load_state_dict(published.state_dict(), assign=True)
    assert layer.lams.tolist() == torch.tensor((0.6, 0.8, 0.9)).tolist()
    assert SPAM(8, lams=(), learnable=True).lams == ()


def other(name, change):
    state = PublishedSPAM(20, 7, 14, 14, 2).state_dict()
    state[name] = change(state[name])
    return state


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda: PublishedSPAM(20, 7, 14, 14, 1).state_dict(), "sps.0.filter"),
        (lambda: PublishedSPAM(20, 7, 14, 14, 2, (0.7, 0.8, 0.6)).state_dict(), "sps.2.filter"),
        (lambda: other("sps.1.filter", lambda f: f.where(f != 1 / 3, 0.2)), "sps.1.filter"),
        (lambda: other("sps.1.filter", lambda f: f[0]), "sps.1.filter"),
        (lambda: PublishedSPAM(24, 7, 14, 14, 2).state_dict(), "proj_in.weight"),
        (lambda: PublishedSPAM(20, 5, 14, 14, 2).state_dict(), "conv.0.weight"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(state, words):
    holder = nn.Sequential(SPAM(20))
    before = copy.deepcopy(holder.state_dict())
    with pytest.raises(ValueError, match=f"0.{words}"):
        holder.load_state_dict({f"0.{key}": value for key, value in state().items()})
    assert all(torch.equal(value, before[key]) for key, value in holder.state_dict().items())


class Network(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 4, 4)
        self.blocks = nn.ModuleDict({f"b{i}": nn.Sequential(nn.GroupNorm(1, 20), layer) for i, layer in enumerate(layers)})

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks.values():
            x = x + block(x)
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accelerate(dtype):
    torch.manual_seed(0)
    model = Network(PublishedSPAM(20, 7, 14, 14, 2), PublishedSPAM(20, 5, 14, 14, 1, (0.9, 0.2)), nn.Identity()).eval()
    x, names = torch.randn(2, 3, 56, 56), dict(model.named_parameters())
    expected = model(x)
    model.to(dtype)
    assert accelerate(model) == ["blocks.b0.1", "blocks.b1.1"]
    y = model(x.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
    assert all(parameter is names[name] for name, parameter in model.named_parameters())
    assert not model.blocks["b0"][1].training
    assert model(torch.randn(1, 3, 80, 124).to(dtype)).shape == (1, 20, 20, 31)
    with pytest.raises(ValueError, match="no layer"):
        accelerate(model)


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.double(),
        lambda model: model.half().float(),
        lambda model: model.bfloat16().float(),
        lambda model: model.bfloat16().double(),
    ],
)
def test_accelerate_reads_masks_that_were_cast_to_and_fro(cast):
    model = cast(Network(PublishedSPAM(20, 7, 14, 14, 2), nn.Identity()))
    accelerate(model)
    mixer = model.blocks["b0"][1]
    assert (mixer.lams, mixer.radius, mixer.boundary) == ((0.7, 0.8, 0.9), 2, pytest.approx(1 / 3, abs=1e-3))


@pytest.mark.parametrize(
    "surroundings", [torch.device("meta"), torch.autocast("cpu", torch.bfloat16), "float64"], ids=["meta", "autocast", "float64"]
)
def test_accelerate_is_the_same_in_any_surroundings(surroundings):
    model = Network(PublishedSPAM(20, 7, 14, 14, 2), nn.Identity())
    if surroundings == "float64":
        torch.set_default_dtype(torch.float64)
        try:
            assert accelerate(model) == ["blocks.b0.1"]
        finally:
            torch.set_default_dtype(torch.float32)
        return
    with surroundings:
        assert accelerate(model) == ["blocks.b0.1"]


def test_a_layer_takes_all_of_a_state_or_nothing():
    layer, other = SPAM(12), SPAM(12)
    before = layer.proj_in.weight.clone()
    for state, words in ((other.state_dict() | {"extra": torch.ones(1)}, "has extra"), ({"proj_in.weight": before + 1}, "lacks")):
        with pytest.raises(ValueError, match=words):
            layer.load_state_dict(state)
        assert torch.equal(layer.proj_in.weight, before)
    layer.load_state_dict({key: value.bfloat16() for key, value in other.published_state(14, 14).items()})
    assert torch.equal(layer.proj_in.weight, other.proj_in.weight.bfloat16().float())


class Doubled(PublishedSPAM):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda layer: layer.sps[0].filter.data.fill_(0.3), "every frequency"),
        (lambda layer: layer.sps[0].filter.data[0, :3].fill_(0.5), "not radial"),
        (lambda layer: setattr(layer, "sps", nn.ModuleList([*layer.sps[:2], PublishedSPAM(20, 7, 14, 14, 1).sps[2]])), "differ in radius"),
        (lambda layer: setattr(layer, "proj_in", nn.Conv2d(20, 20, 3, padding=1)), "proj_in"),
        (lambda layer: setattr(layer, "conv", nn.Identity()), "does not fit"),
        (lambda layer: setattr(layer, "__class__", Doubled), "something else"),
    ],
)
def test_accelerate_refuses_and_changes_nothing(break_it, words):
    model = Network(PublishedSPAM(20, 7, 14, 14, 2), PublishedSPAM(20, 7, 14, 14, 2))
    layers = [model.blocks["b0"][1], model.blocks["b1"][1]]
    break_it(layers[1])
    with pytest.raises(ValueError, match=words) as caught:
        accelerate(model)
    assert "blocks.b1.1" in str(caught.value)
    assert [model.blocks["b0"][1], model.blocks["b1"][1]] == layers
    with pytest.raises(ValueError, match="itself"):
        accelerate(layers[0])


def test_copies_hold_no_activation():
    layer = SPAM(20)
    x = torch.randn(2, 20, 14, 14, requires_grad=True)
    layer(x).sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    tensors = [value for module in layer.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    assert not tensors
    assert "radius=2" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    layer, x = SPAM(20), torch.randn(2, 20, 14, 14)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("learnable", [False, True])
def test_fullgraph_dynamic_shapes_without_recompiling(learnable):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(SPAM(12, learnable=learnable), nn.GELU(), SPAM(12, 3, (), radius=1))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in ((2, 17, 16), (3, 20, 24), (4, 31, 17), (2, 56, 57), (5, 40, 33), (6, 28, 64)):
        x = make_input((size[0], 12, *size[1:]), torch.float32).requires_grad_()
        wanted = [x, *model.parameters()]
        expected, actual = model(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        grad = torch.randn_like(expected)
        for a, b in zip(torch.autograd.grad(actual, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [20, 32])
def test_compiled_for_inference_on_a_cpu_it_is_one_operator_or_its_parts(channels, dtype, channels_last):
    """One operator where pairs of products serve, else Inductor's products, which packs their constant weights; the result is that of
    eager code."""
    torch._dynamo.reset()
    layers = SPAM(channels), nn.GELU(), SPAM(channels, 3, (), radius=1), SPAM(channels, 3, (0.6,), radius=1, learnable=True)
    model, x = nn.Sequential(*layers).to(dtype), make_input((3, channels, 15, 14), dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    names = []

    def listing(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return torch._inductor.compile(graph, inputs)

    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        actual = torch.compile(model, fullgraph=True, backend=listing)(x)
        torch.testing.assert_close(actual, model(x), **({} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}))
    one = channels == 32 and cpu_capability() != "plain"
    assert sum("mixer_branch" in name for name in names) == (3 if one else 0)
    assert sum("axial_conv" in name for name in names) == (0 if one else 3)
    assert not any("spectral_mixer" in name for name in names)


def exported(model):
    batch, height, width = Dim("b", min=1, max=64), Dim("h", min=8, max=512), Dim("w", min=8, max=512)
    return export(model, (torch.randn(2, 12, 14, 16),), dynamic_shapes=({0: batch, 2: height, 3: width},))


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(SPAM(12), nn.GELU(), SPAM(12, 3, (), radius=1), SPF(0.7, 2, 1 / 3), SPAM(12, learnable=True)).eval()


SIZES = ((2, 12, 14, 16), (1, 12, 9, 33), (3, 12, 56, 56))


def test_export_and_aot_inductor(tmp_path):
    model = small_model()
    program = exported(model)
    assert sum(node.target is OPS.spectral_mixer.default for node in program.graph.nodes) == 3
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for shape in SIZES:
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), model(x))
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("direct", [True, False])
def test_onnx(direct, tmp_path):
    """ONNX Runtime gives equal results at any size, from a graph without an FFT."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, path = small_model(), str(tmp_path / "model.onnx")
    if direct:
        shapes = ({0: Dim("b", min=1, max=64), 2: Dim("h", min=8, max=512), 3: Dim("w", min=8, max=512)},)
        torch.onnx.export(model, (torch.randn(2, 12, 14, 16),), path, dynamic_shapes=shapes, verbose=False)
    else:
        torch.onnx.export(exported(model).run_decompositions(decompositions()), f=path, verbose=False)
    assert not {node.op_type for node in onnx.load(path).graph.node} & {"DFT", "STFT"}
    session = runtime.InferenceSession(path)
    for shape in SIZES:
        x = torch.randn(shape) + 1
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(y, model(x).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: SPAM(8, 4), ValueError, "kernel_size must be an odd number, got 4"),
        (lambda: SPAM(2), ValueError, "3 gates a channel, got 2"),
        (lambda: SPAM(8)(torch.randn(2, 8, 4)), ValueError, "x must have shape"),
        (lambda: SPAM(8)(torch.randn(2, 9, 4, 4)), ValueError, r"SPAM: x must have shape .B, 8, H, W., got .2, 9, "),
        (lambda: SPAM(8)(torch.ones(2, 8, 4, 4, dtype=torch.int64)), TypeError, "x must be float64"),
        (lambda: SPAM(8).published_state(0, 4), ValueError, "height"),
        (lambda: SPAM(8, lams=()).published_state(4, 4), ValueError, "no lams"),
        (lambda: SPAM(8)(torch.randn(2, 8, 4, 4), drop_path=(None, 1.0)), TypeError, "kept of drop_path must be a tensor, got NoneType"),
        (lambda: SPAM(8)(torch.randn(2, 8, 4, 4), drop_path=0.1), TypeError, "drop_path must be .kept, factor., got float"),
        (lambda: SPAM(8)(torch.randn(2, 8, 4, 4), norm=(None, None)), TypeError, "norm must be .weight, bias, eps., got 2 values"),
        (lambda: SPAM(8)(torch.randn(2, 8, 4, 4), norm=(None, None, "1")), ValueError, "the eps of norm must be a finite number, got '1'"),
        (lambda: spectral_gate(torch.randn(2, 3, 4, 4), torch.eye(3), None, None, torch.ones(3, 3), 1), TypeError, "base must be a tensor"),
        (lambda: spectral_gate(*gate_arguments((2, 3, 4, 4), 1, torch.float32), -1), ValueError, "radius must be at least 0"),
        (lambda: spectral_gate(*gate_arguments((2, 3, 4, 4), 1, torch.float32), 2), ValueError, "gain must have shape .4, 3."),
        (lambda: spectral_gate(*gate_arguments((2, 3, 4, 4), 1, torch.float32), 1e9), ValueError, "spectral_gate: radius must be at most"),
        (lambda: spectral_gate(None, *gate_arguments((2, 3, 4, 4), 1, torch.float32)[1:], 1), TypeError, "z must be a tensor, got None"),
        (lambda: accelerate(3), TypeError, "accelerate: model must be a module, got int"),
        (lambda: spectral_gate(*gate_arguments((2, 3, 4, 4), 1, torch.float32), 1, torch.zeros(2, 3, 3, 2)), ValueError, "coefficients"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_gradients_are_tensors_of_their_own():
    """Two backward passes add up: no parameter's gradient shares memory with another's."""
    layer, x = SPAM(12), torch.randn(2, 12, 8, 8) + 0.5
    layer(x).sum().backward()
    once = [parameter.grad.clone() for parameter in layer.parameters()]
    layer(x).sum().backward()
    for (name, parameter), first in zip(layer.named_parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * first, msg=name)


@pytest.mark.parametrize("channels", [20, 32])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", ["norm", "residual", "all"])
def test_on_a_residual_branch(given, dtype, layout, channels, monkeypatch):
    """scale o residual + SPAM(norm(x)) in one call: as accurate as its parts, and with gradients where these are called the same bits."""
    monkeypatch.setattr(products, "PAIR_POSITIONS", 0)
    torch.manual_seed(0)
    layer = SPAM(channels, radius=1).to(dtype)
    x, residual = (make_input((3, channels, 9, 8), dtype, layout, seed=seed) for seed in (0, 1))
    weight, bias, scale = torch.randn(3, channels).to(dtype)
    branch = None if given == "norm" else residual, scale if given == "all" else None, None if given == "residual" else (weight, bias, 1e-5)

    def parts(layer, x, residual, scale, norm):
        y = layer(x if norm is None else nn.functional.group_norm(x, 1, *norm))
        return y if residual is None else (residual if scale is None else residual * scale[:, None, None]) + y

    def doubled(value):
        return value.double() if isinstance(value, torch.Tensor) else tuple(map(doubled, value)) if isinstance(value, tuple) else value

    one = channels == 32 and dtype in (torch.float32, torch.bfloat16) and cpu_capability() != "plain"
    recorded, apart = layer(x, *branch).detach(), parts(layer, x, *branch).detach()
    assert one or torch.equal(recorded, apart)
    with torch.no_grad():
        exact = parts(copy.deepcopy(layer).double(), x.double(), *map(doubled, branch))
        for y in (recorded, layer(x, *branch)):
            assert modes.memory_format(y) == modes.memory_format(x)
            assert_as_accurate(y, apart, exact, units=4, alike=True)
        y = layer(x, *branch)
        alone = layer(x[1:2], *(b[1:2] if b is residual else b for b in branch))
        assert dtype == torch.float64 or torch.equal(alone, y[1:2])  # MKL's products in fp64 depend on the batch on processors of AMD
    if dtype == torch.float32:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x, *branch), parts(layer, x, *branch))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", ["norm", "residual", "all"])
def test_gradients_of_a_residual_branch(given, dtype, layout, monkeypatch):
    """To x, also where it is the residual, to norm and scale, and to the layer's parameters: as accurate as those of the parts."""
    monkeypatch.setattr(products, "PAIR_POSITIONS", 0)
    torch.manual_seed(0)
    layer, x = SPAM(32, radius=1, learnable=True).to(dtype), make_input((3, 32, 9, 8), dtype, layout)
    weight, bias, scale = torch.randn(3, 32).to(dtype)
    grad = make_input(x.shape, dtype, "channels_last", seed=3)

    def gradients(together, to):
        twin = copy.deepcopy(layer).to(to)
        leaves = [value.to(to).detach().requires_grad_() for value in (x, weight, bias, scale)]
        image, *norm, factor = leaves
        residual = None if given == "norm" else image
        factor, norm = factor if given == "all" else None, None if given == "residual" else (*norm, 1e-5)
        if together:
            y = twin(image, residual, factor, norm)
        else:
            y = twin(image if norm is None else nn.functional.group_norm(image, 1, *norm))
            y = y if residual is None else (residual if factor is None else residual * factor[:, None, None]) + y
        wanted = [*leaves, *twin.parameters()]
        found = torch.autograd.grad(y, wanted, grad.to(to), allow_unused=True, retain_graph=True)
        again = torch.autograd.grad(y, wanted, grad.to(to), allow_unused=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, again, strict=True))
        return found

    ours, theirs, exact = gradients(True, dtype), gradients(False, dtype), gradients(False, torch.float64)
    assert [g is None for g in ours] == [g is None for g in exact]
    for found, other, truth in zip(ours, theirs, exact, strict=True):
        if truth is not None:
            assert_as_accurate(found, other, truth, units=64, alike=True)


@pytest.mark.parametrize("body", ["mixer", "mlp"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_residual_branch_under_autocast(body, scaled, monkeypatch):
    """An image in bf16 and parameters in float32: one operator, unless a factor in float32 makes the sum float32."""
    monkeypatch.setattr(products, "PAIR_POSITIONS", 0)
    torch.manual_seed(0)
    layer, x = SPAM(32, radius=1), make_input((3, 32, 9, 8), torch.bfloat16, "channels_last")
    weights = [(torch.randn(shape) / 8).requires_grad_() for shape in ((64, 32, 1, 1), (64,), (32, 64, 1, 1), (32,))]
    norm, scale = [torch.randn(32).requires_grad_() for _ in range(2)], torch.randn(32).requires_grad_()
    grad = make_input(x.shape, torch.float32, seed=3)

    def gradients(together, to, autocast=True):
        twin = copy.deepcopy(layer).to(to)
        given = [value.to(to).detach().requires_grad_() for value in (*weights, *norm, *((scale,) if scaled else ()))]
        matrices, vectors, factor = given[:4], given[4:6], given[6] if scaled else None
        image = x.to(torch.bfloat16 if autocast else to).detach().requires_grad_()
        call = twin if body == "mixer" else lambda image, *branch: pointwise_mlp(image, *matrices, *branch)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            if together:
                y = call(image, image, factor, (*vectors, 1e-5))
            else:
                y = (image if factor is None else image * factor[:, None, None]) + call(nn.functional.group_norm(image, 1, *vectors))
        wanted = [image, *given[4:], *(twin.parameters() if body == "mixer" else matrices)]
        return y.detach(), *torch.autograd.grad(y, wanted, grad.to(y.dtype))

    ours, theirs, exact = gradients(True, torch.float32), gradients(False, torch.float32), gradients(False, torch.float64, False)
    for found, other, truth in zip(ours, theirs, exact, strict=True):
        assert found.dtype == other.dtype
        assert (found.double() - truth).norm() <= 2 * (other.double() - truth).norm()  # of few elements, after many roundings
    assert torch.equal(ours[0], theirs[0]) == scaled or cpu_capability() == "plain"


@pytest.mark.parametrize("kept", [[1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
@pytest.mark.parametrize("body", ["mixer", "mlp"])
def test_stochastic_depth(body, dtype, layout, scaled, kept, monkeypatch):
    """Of the images that are kept alone: the result and all gradients, of first and second order, as accurate as with a product of f."""
    monkeypatch.setattr(products, "PAIR_POSITIONS", 0)
    torch.manual_seed(0)
    autocast, dtype = dtype == "autocast", torch.float32 if dtype == "autocast" else dtype
    layer, x = SPAM(32, radius=1).to(dtype), make_input((3, 32, 9, 8), dtype, layout)
    weights = [(torch.randn(shape) / 8).to(dtype) for shape in ((64, 32, 1, 1), (64,), (32, 64, 1, 1), (32,))]
    norm, scale = [torch.randn(32).to(dtype) for _ in range(2)], [torch.randn(32).to(dtype)] * scaled
    grad, factor = make_input(x.shape, dtype, "channels_last", seed=3), 1.25

    def results(together, to, create_graph=False):
        twin = copy.deepcopy(layer).to(to)
        given = [value.to(to).detach().requires_grad_() for value in (x, *weights, *norm, *scale)]
        image, matrices, vectors, (of_residual,) = given[0], given[1:5], given[5:7], given[7:] or [None]
        mask = torch.tensor(kept).to(to)
        call = twin if body == "mixer" else lambda image, *branch, **more: pointwise_mlp(image, *matrices, *branch, **more)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and to != torch.float64):
            if together:
                y = call(image, image, of_residual, (*vectors, 1e-5), drop_path=(mask, factor))
            else:
                f = call(nn.functional.group_norm(image, 1, *vectors)) * (factor * mask)[:, None, None, None]
                y = (image if of_residual is None else image * of_residual[:, None, None]) + f
        wanted = [image, *vectors, *given[7:], *(twin.parameters() if body == "mixer" else matrices)]
        found = torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=create_graph)
        if create_graph:
            loss = sum(value.double().square().sum() for value in found)
            found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        return [y.detach(), *found]

    for create_graph in (False, True):
        ours, theirs, exact = (results(*args, create_graph) for args in ((True, dtype), (False, dtype), (False, torch.float64)))
        for found, other, truth in zip(ours, theirs, exact, strict=True):
            assert found.dtype == other.dtype
            # the factor is within rounded weights
            assert (found.double() - truth).norm() <= 2 * (other.double() - truth).norm() + 1e-6 * truth.norm()


def test_a_norm_without_weight_and_bias():
    layer, x = SPAM(20), torch.randn(2, 20, 5, 5)
    torch.testing.assert_close(layer(x, None, None, (None, None, 1e-5)), layer(nn.functional.group_norm(x, 1)))


def test_a_residual_branch_that_does_not_fit():
    layer, x = SPAM(20), torch.randn(2, 20, 5, 5)
    with pytest.raises(ValueError, match=r"spectral_mixer: residual must have shape \(2, 20, 5, 5\)"):
        layer(x, x[:1])
    with pytest.raises(ValueError, match="spectral_mixer: residual_scale needs a residual, got none"):
        layer(x, None, torch.ones(20))
    with pytest.raises(ValueError, match=r"spectral_mixer: the weight of norm must have shape \(20,\)"):
        layer(x, None, None, (torch.ones(19), torch.ones(20), 1e-5))
    with pytest.raises(ValueError, match=r"spectral_mixer: kept of drop_path must have shape \(2,\)"):
        layer(x, x, drop_path=(torch.ones(3), 1.0))
    with pytest.raises(ValueError, match="spectral_mixer: the factor of drop_path must be a finite number, got inf"):
        layer(x, x, drop_path=(torch.ones(2), float("inf")))
