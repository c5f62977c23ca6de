"""The models against the published network, and what timm and its users expect of a model."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import pickle

import pytest
import timm
import torch
from published import PublishedSPANet
from timm.layers import DropPath
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

import spanet
from spanet.checkpoint import published_state
from spanet.macs import count_macs
from spanet_kernels import SPAM, use

# parameters without masks, MACs in units of 1e9 at 224, masks of the published code
VARIANTS = {
    "spanet_small": (28_605_096, 4.606, 54_684),
    "spanet_medium": (41_686_952, 6.793, 82_026),
    "spanet_mediumx": (54_768_808, 8.980, 109_368),
    "spanet_base": (75_856_168, 11.940, 82_026),
    "spanet_basex": (99_718_312, 15.775, 109_368),
}
TINY = {"depths": (1, 2, 2, 1), "dims": (16, 20, 24, 32), "num_classes": 11}


def scatter_(model: torch.nn.Module) -> torch.nn.Module:
    """Move every parameter off the value that it starts at, ones and zeros above all."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def tiny(**kwargs):
    torch.manual_seed(0)
    return scatter_(timm.create_model("spanet_small", **TINY | kwargs))


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)) + 0.5


def published_twin(model, size, dtype=torch.float64):
    """The published network with the weights of a small model, for images of any size."""
    twin = PublishedSPANet(TINY["depths"], TINY["dims"], size, TINY["num_classes"], dense=hasattr(model, "norm0")).to(dtype)
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(key.endswith(".filter") for key in missing)
    return twin


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_the_published_network(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    state = published_state(model)
    with torch.device("meta"):
        published = PublishedSPANet([len(model.network[i]) for i in (0, 2, 4, 6)], [info["num_chs"] for info in model.feature_info])
    assert state.keys() == published.state_dict().keys()
    published.load_state_dict(state, strict=True, assign=True)
    x = image(1, 3, 224, 224)
    with torch.no_grad():
        ours, theirs = model(x), published(x)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_macs(name):
    parameters, macs, masks = VARIANTS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert not list(model.buffers())
    published = published_state(model)
    assert sum(value.numel() for key, value in published.items() if key.endswith(".filter")) == masks
    assert round(count_macs(model, torch.empty(1, 3, 224, 224, device="meta")) / 1e9, 3) == macs
    assert name != "spanet_small" or len(published) == 644


@pytest.mark.parametrize("size", [(64, 64), (57, 83), (3, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_features_and_gradients_of_the_published_network(size, channels_last):
    model = tiny()
    twin = published_twin(model, size)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    x = image(2, 3, *size)
    exact = x.double().requires_grad_()
    ours = x.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()
    target = torch.tensor([3, 7])
    features = [ours, *model.forward_intermediates(ours, intermediates_only=True)]
    expected = [exact, *twin.features(exact)]
    for one, other in zip(features, expected, strict=True):
        assert not channels_last or one.is_contiguous(memory_format=torch.channels_last)
        assert (one - other).abs().max() <= 2e-6 * other.abs().max()
    functional.cross_entropy(model(ours), target).backward()
    functional.cross_entropy(twin(exact), target).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()} | {"x": ours.grad}
    judge = {key: parameter.grad for key, parameter in twin.named_parameters() if parameter.requires_grad} | {"x": exact.grad}
    assert gradients.keys() == judge.keys()
    # behind a norm the sum of many gradients of one sign is taken from each: judged by the largest of all
    largest = max(grad.abs().max() for grad in judge.values())
    for key, grad in judge.items():
        assert (gradients[key] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-7 * largest, key


def test_dense_features_of_the_published_network():
    backbone = scatter_(timm.create_model("spanet_small", features_only=True, **TINY))
    assert backbone.feature_info.channels() == list(TINY["dims"])
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    twin = published_twin(backbone.model, (64, 96))
    x = image(2, 3, 64, 96)
    for feature, expected, stride in zip(backbone(x), twin.features(x.double()), (4, 8, 16, 32), strict=True):
        assert feature.shape[2:] == (64 // stride, 96 // stride)
        assert (feature - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("out_indices", [(1, 2, 3), (0, 2), (-2,), (0, 1)])
def test_chosen_features_are_those_of_all(out_indices):
    everything = scatter_(timm.create_model("spanet_small", features_only=True, **TINY))
    some = timm.create_model("spanet_small", features_only=True, out_indices=out_indices, **TINY)
    some.model.load_state_dict(everything.model.state_dict())
    x = image(1, 3, 64, 64)
    expected = everything(x)
    for feature, index in zip(some(x), out_indices, strict=True):
        assert torch.equal(feature, expected[index])
    sum(feature.square().mean() for feature in some(x)).backward()
    assert all(parameter.grad is not None for parameter in some.parameters()), "a parameter takes no part"


def test_forward_in_parts():
    model = tiny(num_classes=7, drop_rate=0.5).eval()
    x = image(2, 3, 64, 64)
    logits, features = model(x), model.forward_features(x)
    assert features.shape == (2, 32, 2, 2)
    assert torch.equal(model.forward_head(features), logits)
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (2, model.num_features)
    assert torch.equal(model.get_classifier()(before), logits)
    last, stages = model.forward_intermediates(x)
    assert torch.equal(last, features)
    assert [tuple(stage.shape[1:]) for stage in stages] == [(16, 16, 16), (20, 8, 8), (24, 4, 4), (32, 2, 2)]
    assert torch.equal(model.norm(stages[-1]), features)
    assert torch.equal(model.forward_intermediates(x, 1, norm=True, intermediates_only=True)[0], features)
    early = model.forward_intermediates(x, [0, -3], stop_early=True, intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(early, stages, strict=False))


def test_classifier():
    model = tiny()
    x = image(2, 3, 64, 64)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.num_classes == 5
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 32, 2, 2)
    model.reset_classifier(4, "max")
    assert torch.allclose(model.forward_head(model.forward_features(x), pre_logits=True), model.forward_features(x).amax((2, 3)))
    assert tiny(num_classes=0, global_pool="")(x).shape == (2, 32, 2, 2)
    assert tiny(in_chans=5)(image(1, 5, 32, 32)).shape == (1, 11)
    with pytest.raises(ValueError, match="output_stride must be 32"):
        tiny(output_stride=16)
    with pytest.raises(ValueError, match="boundary must be a number or"):
        tiny(boundary="published")


@pytest.mark.parametrize("dense", [False, True])
def test_checkpointing_computes_the_same(dense):
    model = tiny(features_only=dense)
    x = image(2, 3, 64, 64)
    results = []
    for enable in (False, True):
        model.zero_grad()
        (model.model if dense else model).set_grad_checkpointing(enable)
        saved = 0

        def count(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out = model(x)
        loss = sum(feature.square().mean() for feature in out) if dense else out.square().mean()
        loss.backward()
        results.append((saved, loss, [parameter.grad for parameter in model.parameters()]))
    (plain, loss, grads), (sparing, loss2, grads2) = results
    assert sparing < plain / 3
    assert torch.equal(loss, loss2)
    assert all(torch.equal(one, other) for one, other in zip(grads, grads2, strict=True))


def test_stochastic_depth():
    model = timm.create_model("spanet_small", drop_path_rate=0.1, device="meta")
    blocks = [block for stage in model.network[::2] for block in stage]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.1 * index / 23 for index in range(24)])
    model = tiny(drop_path_rate=0.9)
    x = image(4, 3, 32, 32)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_stochastic_depth_drops_what_timm_drops(scale_by_keep):
    """By the same random numbers: where a hook looks on, timm's module is called."""
    model, x = tiny(drop_path_rate=0.6).train(), image(6, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for module in model.modules():
        if isinstance(module, DropPath):
            module.scale_by_keep = scale_by_keep

    def results(function):
        torch.manual_seed(5)
        y = function(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]

    ours, in_graph = results(model), results(compiled)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.register_forward_hook(lambda *_: None)
    for found, graph, timms in zip(ours, in_graph, results(model), strict=True):
        torch.testing.assert_close(found, timms, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(graph, timms, rtol=1e-4, atol=1e-4)


def test_hooks_see_every_module_of_a_block_and_an_exchanged_module_serves():
    model, x = tiny(), image(2, 3, 64, 64)
    with torch.no_grad():
        together = model(x)
        for name in ("norm1", "token_mixer", "norm2", "mlp"):
            seen = []
            handle = (
                model.network[4][0].get_submodule(name).register_forward_hook(lambda module, args, y, seen=seen: seen.append((args, y)))
            )
            torch.testing.assert_close(model(x), together)
            handle.remove()
            ((args, y),) = seen
            assert len(args) == 1
            assert y.shape == args[0].shape
        model.network[4][0].norm1 = torch.nn.Identity()
        model.network[4][0].token_mixer = torch.nn.AvgPool2d(3, 1, 1)
        assert not torch.equal(model(x), together)


def test_initial_weights():
    torch.manual_seed(0)
    model = spanet.SPANet()
    block = model.network[4][0]
    for weight in (block.mlp.fc1.weight, block.mlp.fc2.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(bias.any() for bias in (block.mlp.fc1.bias, block.mlp.fc2.bias, model.head.bias))
    assert block.token_mixer.proj_in.bias.any()
    assert block.token_mixer.proj_in.weight.std().item() == pytest.approx((3 * 320) ** -0.5, rel=0.05)
    assert (block.res_scale1.scale == 1).all()
    assert not isinstance(model.network[2][0].res_scale1, type(block.res_scale1))


def test_groups_and_decay():
    model = tiny(learnable=True)
    assert (
        {"network.4.0.res_scale1.scale", "network.0.0.token_mixer.lams"} <= model.no_weight_decay() <= dict(model.named_parameters()).keys()
    )
    fine = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {round(group["lr_scale"], 9) for group in fine}
    assert len(scales) == 1 + 6 + 3 + 1  # stem, blocks, downsampling, norm and head
    scale_of = {id(parameter): group["lr_scale"] for group in fine for parameter in group["params"]}
    ordered = [model.patch_embed.proj, model.network[0][0].mlp.fc1, model.network[1].proj, model.network[2][0].mlp.fc1, model.head]
    assert all(scale_of[id(one.weight)] < scale_of[id(other.weight)] for one, other in itertools.pairwise(ordered))
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(coarse) == 1 + 7 + 1
    assert create_optimizer_v2(model, opt="adamw", layer_decay=0.7).param_groups


def test_pretrained_cfg():
    model = timm.create_model("spanet_base", device="meta")
    config = model.pretrained_cfg
    assert (config["crop_pct"], config["interpolation"], config["num_classes"]) == (0.95, "bicubic", 1000)
    assert timm.data.resolve_model_data_config(model)["std"] == (0.229, 0.224, 0.225)
    assert isinstance(model.get_submodule(config["classifier"]), torch.nn.Linear)
    assert isinstance(model.get_submodule(config["first_conv"]), torch.nn.Conv2d)
    assert sorted(timm.list_models("spanet_*")) == sorted(VARIANTS)


def test_device_and_dtype():
    model = tiny(device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.reset_classifier(3)
    assert model(image(1, 3, 32, 32).bfloat16()).dtype == torch.bfloat16
    meta = timm.create_model("spanet_small", device="meta")
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
    assert meta(torch.empty(2, 3, 96, 96, device="meta")).shape == (2, 1000)


def test_autocast_trains():
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.cross_entropy(model(image(2, 3, 64, 64)), torch.tensor([1, 2]))
    loss.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("features_only", [False, True])
def test_compiles_whole(features_only):
    """No graph break, and one graph for all sizes."""
    model = tiny(features_only=features_only, depths=(1, 1, 1, 1)).eval()
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    # the first one decides: equal sides would be taken for one symbol, and small convolutions have another implementation
    for size in ((96, 128), (128, 96), (113, 160), (128, 128)):
        x = image(2, 3, *size)
        with torch.no_grad():
            ours, expected = compiled(x), model(x)
        for one, other in zip(ours, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_whole_with_constant_weights(dtype):
    """No graph break in what inference on a CPU is compiled to."""
    model = tiny(depths=(1, 1, 1, 1)).eval().to(dtype, memory_format=torch.channels_last)
    torch.compiler.reset()
    x = image(2, 3, 64, 64).to(dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True)
        with torch._inductor.config.patch(freezing=True):
            compiled(x)
        with torch.profiler.profile() as found:
            ours = compiled(x)
    packed = "mkldnn::_convolution_pointwise"
    assert dtype != torch.float32 or not torch.backends.mkldnn.is_available() or packed in {event.key for event in found.key_averages()}
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(ours, expected, rtol=bound, atol=bound)


def test_compiles_contiguous_images_of_16_bits():
    """Inductor of torch 2.14 writes NaN where it transposes 16 bits for two readers: nothing in the network may need that."""
    model = tiny(depths=(1, 1, 1, 1), dims=(64, 64, 96, 96)).eval().bfloat16()
    torch.compiler.reset()
    x = image(2, 3, 64, 64).bfloat16()
    with torch.inference_mode():
        ours, expected = torch.compile(model, fullgraph=True)(x), model(x)
    assert torch.allclose(ours, expected, rtol=0.05, atol=0.05)


def test_compiles_training_with_checkpointing():
    model = tiny(depths=(1, 1, 1, 1))
    model.set_grad_checkpointing()
    x = image(2, 3, 64, 64)
    model(x).square().mean().backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[key], rtol=1e-4, atol=1e-6), key


def test_copies_at_any_time():
    model = tiny()
    x = image(1, 3, 32, 32)
    model(x).sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


def test_the_filter_matters():
    """The ablations are other networks with the same weights: the tests above would see a lost filter."""
    model, x = tiny(), image(1, 3, 64, 64)
    for other in (tiny(radii=(1, 1, 1, 1)), tiny(boundary="paper"), tiny(lams=(0.9, 0.8, 0.7))):
        other.load_state_dict(model.state_dict())
        assert (other(x) - model(x)).abs().max() > 1e-4
    with use("reference"):
        assert torch.allclose(model(x), tiny()(x), atol=1e-5)
    assert sum(isinstance(module, SPAM) for module in model.modules()) == sum(TINY["depths"])


@pytest.mark.parametrize("shape", [(1, 3, 2, 64), (1, 3, 64, 1)])
def test_smaller_than_the_stem(shape):
    with pytest.raises(ValueError, match=r"at least 3 x 3 pixels, got"):
        tiny()(torch.zeros(shape))


def test_an_image_without_a_batch():
    with pytest.raises(ValueError, match=r"the input must have shape .B, C, H, W., got .3, 32, 32."):
        tiny()(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        tiny(num_classes=-1)


def test_indices_out_of_range():
    for indices in (5, 0, [4], [-5], []):
        with pytest.raises(ValueError, match="indices must choose among 4 stages"):
            tiny().forward_intermediates(image(1, 3, 32, 32), indices)


@pytest.mark.skipif(importlib.util.find_spec("segmentation_models_pytorch") is None, reason="segmentation_models_pytorch is not installed")
def test_encoder_of_segmentation_models_pytorch():
    from segmentation_models_pytorch import Unet

    model = Unet("tu-spanet_small", encoder_weights=None, classes=4, in_channels=3)
    logits = model(image(1, 3, 64, 96))
    assert logits.shape == (1, 4, 64, 96)
    logits.square().mean().backward()
    assert model.encoder.model.model.network[6][3].token_mixer.proj_in.weight.grad.any()
