"""What PyTorch does around a module - transforms, fake tensors, hooks, pruning, tracing, partial states - leaves the function as it is."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from published_layer import PublishedSPAM
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import spanet_kernels as sk

pytest.importorskip("timm")
from spanet.model import Block


def modules():
    return {"filter": sk.SPF(0.7, 2), "by FFT": sk.SPF(torch.tensor(0.7), 12), "layer": sk.SPAM(6), "no filter": sk.SPAM(6, lams=())}


def energy(module):
    return lambda x: module(x).square().sum()


@pytest.mark.parametrize("name", modules())
def test_transforms_follow_one_another(name):
    """Nothing of a transform is kept for the next one, nor for eager calls."""
    module, x = modules()[name].double(), torch.randn(1, 6, 13, 11, dtype=torch.float64)
    f = energy(module)

    def product():
        return torch.func.jvp(torch.func.grad(f), (x,), (x,))[1]

    first = product()
    torch.testing.assert_close(product(), first)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(x[None])[0], torch.func.grad(f)(x))
    plain = x.clone().requires_grad_()
    f(plain).backward()
    torch.testing.assert_close(plain.grad, torch.func.grad(f)(x))


@pytest.mark.parametrize("name", modules())
def test_fake_tensors_and_real_ones_keep_apart(name):
    module = modules()[name]
    for height in (13, 15):  # real before fake, fake before real
        x = torch.randn(2, 6, height, 11)
        if height == 13:
            module(x)
        with FakeTensorMode():
            assert modules()[name](torch.randn(2, 6, height, 11)).shape == x.shape
        assert module(x).isfinite().all()
    with torch.device("meta"):
        assert modules()["filter"](torch.randn(2, 6, 17, 11, device="cpu")).device.type == "cpu"


@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", [*modules(), "block"])
def test_a_trace_serves_any_batch(name, recorded):
    module = Block(32, 0.0, True, {}).eval() if name == "block" else modules()[name]
    x = torch.randn(3, 32 if name == "block" else 6, 12, 10)
    with torch.set_grad_enabled(recorded), warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(module, x[:1])
        torch.testing.assert_close(traced(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("radius", [2, 2.5, 20])
def test_a_trace_on_a_plane_inside_the_disc_serves_larger_ones(radius, learnable):
    module, x = sk.SPF(0.3, radius, learnable=learnable), torch.randn(1, 3, 70, 66)
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(module, x[..., :2, :2])
    torch.testing.assert_close(traced(x), module(x), rtol=1e-4, atol=1e-5)


def test_vmap_over_a_weight_where_the_fft_serves():
    x, lams = torch.randn(1, 4, 128, 128), torch.tensor([0.3, 0.7])
    together = torch.vmap(lambda lam: sk.spectral_pool(x, lam, 40))(lams)
    torch.testing.assert_close(together, torch.stack([sk.spectral_pool(x, lam, 40) for lam in lams]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 128, 128), (2, 0, 128, 128)])
def test_nothing_is_filtered_at_any_radius(shape):
    x = torch.empty(shape, requires_grad=True)
    y = sk.spectral_pool(x, 0.3, 60)
    assert y.shape == torch.autograd.grad(y.sum(), x)[0].shape == shape


def hooked(calls):
    return lambda *args: calls.append(args) or None


@pytest.mark.parametrize(
    ("name", "shape"), [("layer", (2, 6, 9, 7)), ("no filter", (2, 6, 9, 7)), ("block", (2, 32, 9, 7))], ids=["layer", "no filter", "block"]
)
def test_hooks_of_convolutions_fire(name, shape):
    """With the function, gradients and residual branch that it has without them."""
    module = Block(32, 0.0, True, {}) if name == "block" else modules()[name]
    watched, calls, x, grad = copy.deepcopy(module), [], torch.randn(shape), torch.randn(shape)
    layers = [layer for layer in watched.modules() if isinstance(layer, nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(hooked(calls))
    for each in (module, watched):
        each(x).backward(grad)
    assert len(calls) == len(layers)
    for (parameter_name, expected), actual in zip(module.named_parameters(), watched.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=lambda text, n=parameter_name: f"{n}: {text}")
    if name != "block":
        around = x + 1, torch.randn(shape[1]), (torch.randn(shape[1]), torch.randn(shape[1]), 1e-5)
        torch.testing.assert_close(watched(x, *around), module(x, *around), rtol=1e-4, atol=1e-4)
    mlp, twin = sk.PointwiseMLP(8, 32), None
    twin = copy.deepcopy(mlp)
    twin.fc2.register_forward_pre_hook(hooked(calls))
    image, around = torch.randn(2, 8, 5, 4), (torch.randn(2, 8, 5, 4), torch.randn(8), (torch.randn(8), torch.randn(8), 1e-5))
    for given in ((), around[:1], around):
        torch.testing.assert_close(twin(image, *given), mlp(image, *given), rtol=1e-4, atol=1e-5)


def test_pruned_and_parametrized_weights_are_learned():
    layer, x = sk.SPAM(6), torch.randn(2, 6, 9, 7)
    prune.l1_unstructured(layer.proj_in, "weight", 0.5)
    for _ in range(2):
        layer(x).sum().backward()
    before = layer(x)
    with torch.no_grad():
        layer.proj_in.weight_orig *= 2
        assert not torch.equal(layer(x), before)
    parametrizations.weight_norm(layer.proj_out)
    assert sk.nn.is_plain(layer.proj_out)
    before = layer(x)
    with torch.no_grad():
        layer.proj_out.parametrizations.weight.original0 *= 2
        assert not torch.equal(layer(x), before)


class Adapter(nn.Module):
    """A low-rank addition to a convolution, under its names."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Conv2d(base.in_channels, 2, 1, bias=False), nn.Conv2d(2, base.out_channels, 1, bias=False)

    weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("part", ["token_mixer.proj_in", "token_mixer.pws.1", "mlp.fc1"])
def test_what_stands_in_place_of_a_convolution_is_called(part):
    block, x = Block(32, 0.0, True, {}).requires_grad_(False), torch.randn(2, 32, 9, 7)
    before = block(x)
    parent, _, name = part.rpartition(".")
    adapter = Adapter(block.get_submodule(part))
    setattr(block.get_submodule(parent), name, adapter)
    y = block(x)
    y.sum().backward()
    assert not torch.equal(y, before)
    assert adapter.up.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "size"), [(20, 9), (32, 28)])
def test_floating_point_operations_are_counted(dim, size, dtype, channels_last):
    """As many as of the published layer, and twice that of gradients; whichever way a call goes."""

    def count(layer, x, backward=False):
        with FlopCounterMode(display=False, custom_mapping=sk.flop_formulas()) as counter:
            y = layer(x)
            if backward:
                y.sum().backward()
        return counter.get_total_flops()

    x = torch.randn(2, dim, size, size)
    published = count(PublishedSPAM(dim, 7, size, size, 2), x)
    layer, x = sk.SPAM(dim).to(dtype), x.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    with torch.no_grad():
        assert count(layer, x) == published
    assert count(layer, x) == published
    assert count(layer, x.requires_grad_(), backward=True) == 3 * published
    block = Block(dim, 0.0, True, {}).to(dtype)
    products = 2 * 8 * dim * x.numel()
    assert count(block, x, backward=True) == 3 * (published + products)


def test_a_partial_state_is_taken_if_not_strict():
    layer = sk.SPAM(6)
    state = {"proj_in.bias": torch.ones(6)}
    assert len(layer.load_state_dict(state, strict=False).missing_keys) == 13
    assert layer.proj_in.bias.eq(1).all()
    with pytest.raises(ValueError, match=r"SPAM: the state lacks proj_in\.weight, "):
        layer.load_state_dict({"proj_in.bias": torch.zeros(6)})
    assert layer.proj_in.bias.eq(1).all()
    assert nn.Sequential(layer).load_state_dict({}, strict=False).missing_keys


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(radius=-1), "radius must be at least 0, got -1"),
        (dict(radius=float("nan")), "radius must be at least 0, got nan"),
        (dict(radius="2"), "radius must be a number, got str"),
        (dict(kernel_size=-1), "kernel_size must be an odd number, got -1"),
        (dict(kernel_size=(7, 7)), "kernel_size must be an odd number"),
        (dict(lams=0.7), "lams must be a sequence of finite numbers, got 0.7"),
        (dict(lams=(0.7, float("inf"))), "lams must be a sequence of finite numbers"),
        (dict(lams=np.full((2, 2), 0.7)), "lams must be a sequence of finite numbers"),
        (dict(lams="78"), "lams must be a sequence of finite numbers"),
        (dict(lams=""), "lams must be a sequence of finite numbers"),
        (dict(dim="8"), "dim must be an integer, got str"),
        (dict(boundary="paper"), "boundary must be None or a finite number, got 'paper'"),
        (dict(boundary=float("nan")), "boundary must be None or a finite number, got nan"),
        (dict(dim=0), "dim must be at least 1, got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_of_the_layer(arguments, message):
    with pytest.raises((ValueError, TypeError), match=f"SPAM: {message}"):
        sk.SPAM(**(dict(dim=6) | arguments))


@pytest.mark.parametrize("lams", [np.array([0.5, 1], np.float32), torch.tensor([0.5, 1]), [np.float32(0.5), np.int64(1)]], ids=type)
def test_numbers_of_numpy_and_tensors_are_numbers(lams):
    layer = sk.SPAM(6, np.int64(3), lams, np.float32(2), np.float32(0.25))
    assert (layer.lams, layer.radius, layer.boundary) == ((0.5, 1.0), 2.0, 0.25)
    x = torch.randn(2, 6, 9, 7)
    assert torch.equal(sk.spectral_pool(x, np.float32(0.5), np.int64(2), np.float32(0.25)), sk.spectral_pool(x, 0.5, 2, 0.25))
    layer(x).sum().backward()


def test_whole_lams_are_learned():
    layer = sk.SPAM(6, lams=(0, 1), learnable=True)
    layer(torch.randn(2, 6, 9, 7)).sum().backward()
    assert layer.lams.grad.shape == (2,)


@pytest.mark.parametrize("shape", [(2, 4, 9, 7), (2, 12, 9, 7), (2, 6, 9)], ids=str)
def test_an_input_of_other_channels_is_refused(shape):
    with pytest.raises(ValueError, match=r"SPAM: x must have shape \(B, 6, H, W\), got \(2, "):
        sk.SPAM(6)(torch.randn(shape))


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first, self.second = layer, layer


def test_accelerate_replaces_a_shared_layer_in_both_places():
    model = Twice(PublishedSPAM(6, 7, 8, 8, 2))
    assert sk.accelerate(model) == ["first", "second"]
    assert isinstance(model.first, sk.SPAM)
    assert model.first is model.second


@pytest.mark.parametrize("what", ["learned", "hooks", "compiled", "meta", "nan"])
def test_accelerate_refuses_what_it_would_change(what):
    layer = PublishedSPAM(6, 7, 8, 8, 2)
    reasons = dict(learned="masks are learned", hooks="has hooks", compiled="is compiled", meta="meta device", nan="something else")
    if what == "learned":
        for sp in layer.sps:
            sp.filter = nn.Parameter(sp.filter.clone())
    elif what == "hooks":
        layer.register_forward_hook(hooked([]))
    elif what == "meta":
        layer.to("meta")
    elif what == "nan":
        nn.init.constant_(layer.proj_out.bias, torch.nan)
    model = nn.Sequential(torch.compile(layer) if what == "compiled" else layer)
    with pytest.raises(ValueError, match=f"accelerate: 0 does not fit: .*{reasons[what]}"):
        sk.accelerate(model)
    assert not any(isinstance(module, sk.SPAM) for module in model.modules())
