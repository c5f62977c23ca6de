"""Residual branches, scale o residual + drop_path(f(norm(x))): what is promised of every one, whatever computes it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import spanet_kernels as sk
from spanet.model import Block
from spanet_kernels import modes
from spanet_kernels.testing import make_input

WEIGHTS = (64, 32, 1, 1), (64,), (32, 64, 1, 1), (32,)
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
}


def mlp_weights(dtype=torch.float32):
    return [(torch.randn(shape) / 8).to(dtype) for shape in WEIGHTS]


@pytest.mark.parametrize("drops", [False, True], ids=["whole", "drops"])
@pytest.mark.parametrize("residual", [*LAYOUTS, "itself", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_that_of_x(layout, residual, drops):
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(4, 32, 9, 9))
    beside = {"itself": x, "none": None}[residual] if residual in ("itself", "none") else LAYOUTS[residual](torch.randn(4, 32, 9, 9))
    drop_path = (torch.tensor([1.0, 0, 1, 1]), 1.5) if drops else None
    layer, weights = sk.SPAM(32), mlp_weights()
    for learns in (False, True):
        with torch.set_grad_enabled(learns):
            for y in (layer(x, beside, drop_path=drop_path), sk.pointwise_mlp(x, *weights, beside, drop_path=drop_path)):
                assert y.is_contiguous(memory_format=modes.memory_format(x))


def test_inplace_is_seen_by_autograd():
    residual, weights, factor = torch.randn(2, 32, 20, 20), mlp_weights(), torch.randn(2, 32, 20, 20, requires_grad=True)
    loss = (factor * residual).sum()
    with torch.no_grad():
        y = sk.pointwise_mlp(torch.randn(2, 32, 20, 20), *weights, residual, inplace=True)
    assert y is residual
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        x = torch.randn(2, 32, 20, 20)
        expected = sk.pointwise_mlp(x, *weights, x)
        assert torch.equal(sk.pointwise_mlp(x, *weights, x, inplace=True), expected)


def test_inplace_writes_nothing_that_is_still_read():
    memory, weights = torch.randn(5, 32, 20, 20), mlp_weights()
    x, residual, before = memory[:4], memory[1:], memory.clone()
    with torch.no_grad():
        y = sk.pointwise_mlp(x, *weights, residual, inplace=True)
        assert torch.equal(y, sk.pointwise_mlp(before[:4], *weights, before[1:]))
    assert torch.equal(memory, before)


def test_a_mask_that_is_written_to_is_noticed():
    x, kept, norm = make_input((3, 32, 9, 8), torch.float32, "channels_last").requires_grad_(), torch.tensor([1.0, 0, 1]), torch.ones(32)
    y = sk.pointwise_mlp(x, *mlp_weights(), x, None, (norm, norm, 1e-5), drop_path=(kept, 2.0))
    kept.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("own", [False, True], ids=["apart", "itself"])
def test_a_mask_has_no_gradient(own):
    x, kept, norm = torch.randn(3, 32, 9, 8, requires_grad=True), torch.tensor([1.0, 0, 1], requires_grad=True), torch.ones(32)
    y = sk.SPAM(32)(x, x if own else torch.ones_like(x), None, (norm, norm, 1e-5), (kept, 2.0))
    assert torch.autograd.grad(y.sum(), (x, kept), allow_unused=True)[1] is None


def test_the_factor_is_not_rounded_with_the_mask():
    x, weights = torch.randn(2, 32, 3, 3, dtype=torch.float64), mlp_weights(torch.float64)
    y = sk.pointwise_mlp(x, *weights, drop_path=(torch.ones(2, dtype=torch.bfloat16), 1 / 0.9))
    torch.testing.assert_close(y, sk.pointwise_mlp(x, *weights) / 0.9, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("sizes", [(32, 0, 32), (0, 32, 32), (32, 32, 0)])
def test_no_channels(sizes):
    channels, hidden, out = sizes
    given = torch.randn(1, channels, 20, 20), torch.randn(hidden, channels, 1, 1), None, torch.randn(out, hidden, 1, 1), None
    with pytest.raises(ValueError, match=f"C, D and E must be at least 1, got {channels}, {hidden} and {out}"):
        sk.pointwise_mlp(*given)
    y = torch.empty(1, out, 20, 20)
    if hidden == 0:
        with pytest.raises(RuntimeError, match="must have input channels"):
            torch.ops.spanet_kernels.pointwise_pair(
                y, given[0], None, None, None, None, None, None, given[1].flatten(1), None, given[3].flatten(1), None
            )


def test_stochastic_depth_is_the_module_s():
    """Not its block's: it may be frozen, or sampled from in evaluation."""
    torch.manual_seed(0)
    block, x = Block(32, 0.9, True, {}), torch.randn(8, 32, 9, 8)
    with torch.no_grad():
        expected = block.eval()(x)
        block.train().drop_path.eval()
        torch.testing.assert_close(block(x), expected)
        block.eval().drop_path.train()
        own = block(x)
        assert not torch.allclose(own, expected)
        block.drop_path.register_forward_hook(lambda *_: None)
        torch.manual_seed(1)
        hooked = block(x)
        block.drop_path._forward_hooks.clear()
        torch.manual_seed(1)
        torch.testing.assert_close(block(x), hooked, rtol=1e-4, atol=1e-4)


def circular(layer):
    for conv in layer.conv:
        conv.padding_mode = "circular"
        conv._reversed_padding_repeated_twice = [size for pad in reversed(conv.padding) for size in (pad, pad)]


def dilated(layer):
    layer.conv[0] = nn.Conv2d(8, 8, (1, 7), padding=(0, 6), dilation=(1, 2), groups=8)


class Halved(nn.Sequential):
    def forward(self, x):
        return super().forward(x) / 2


def halved(layer):
    layer.conv = Halved(*layer.conv)


def grouped(layer):
    layer.proj_in = nn.Conv2d(8, 8, 1, groups=2)


@pytest.mark.parametrize("change", [circular, dilated, halved, grouped])
def test_convolutions_of_another_kind_are_called(change):
    layer, x = sk.SPAM(8), torch.randn(2, 8, 14, 13)
    change(layer)
    z = layer.conv(layer.proj_in(x))
    context = sum(
        pw(sk.spectral_pool(chunk, lam, 2, 1 / 3)) for pw, lam, chunk in zip(layer.pws, layer.lams, z.split([3, 3, 2], 1), strict=True)
    )
    torch.testing.assert_close(layer(x), layer.proj_out(z * context), rtol=1e-4, atol=1e-5)


def test_hooks_of_the_container_of_convolutions_fire():
    layer, x, calls = sk.SPAM(8), torch.randn(2, 8, 14, 13), []
    expected = layer(x)
    watched = copy.deepcopy(layer)
    watched.conv.register_forward_hook(lambda *args: calls.append(args))
    torch.testing.assert_close(watched(x), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
