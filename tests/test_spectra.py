"""The analyses of the paper, against their definitions computed directly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import skimage
import timm
import torch
from PIL import Image

import spanet  # noqa: F401  registers the models
from spanet import spectra
from spanet.images import read_input
from spanet_kernels import SPAM, reference

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
TINY = {"depths": (1, 2, 1, 1), "dims": (16, 24, 32, 48)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("spanet_small", **TINY).eval()


@pytest.fixture(scope="module")
def image(model):
    return read_input(model, PHOTOGRAPHS / "chelsea.png", 64)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 5), (6, 5)])
def test_log_amplitude(height, width):
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(width)) + 1
    spectrum = spectra.log_amplitude(x)
    for u in range(height):
        for v in range(width):
            wave = torch.exp(-2j * math.pi * (torch.arange(height)[:, None] * u / height + torch.arange(width) * v / width))
            expected = ((x * wave).sum((2, 3)).abs() + 1e-6).log().mean()
            place = (u + height // 2) % height, (v + width // 2) % width
            torch.testing.assert_close(spectrum[place], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [6, 7])
def test_relative_log_amplitude(size):
    x = torch.randn(1, 2, size, size) + 1
    curve = spectra.relative_log_amplitude(spectra.log_amplitude(x))
    amplitude = (torch.fft.fft2(x).abs() + 1e-6).log().mean((0, 1))
    expected = torch.stack([amplitude[k, k] - amplitude[0, 0] for k in range((size + 1) // 2)])
    torch.testing.assert_close(curve, expected)


def test_tokens_and_maps():
    x = torch.randn(2, 5, 4, 4)
    tokens = x.flatten(2).transpose(1, 2)
    prefix = torch.randn(2, 2, 5)
    for given in (x, x.permute(0, 2, 3, 1), tokens, torch.cat([prefix, tokens], 1)):
        assert torch.equal(spectra.as_map(given), x)


@pytest.mark.parametrize("name", ["spanet", "poolformer_s12", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "resnet18"])
def test_mixers_of_every_model(model, image, name):
    net = model if name == "spanet" else timm.create_model(name, **({"depth": 3} if "vit" in name else {})).eval()
    x = image if name in ("spanet", "resnet18", "poolformer_s12") else read_input(net, PHOTOGRAPHS / "chelsea.png")
    blocks, mixers = spectra.blocks_and_mixers(net)
    assert len(blocks) == len(mixers) == {"spanet": 5, "resnet18": 8, "vit_tiny_patch16_224": 3}.get(name, 12)
    maps = spectra.mean_log_amplitudes(net, mixers, [x])
    sizes = [len(spectrum) for spectrum in maps]
    stem = {"vit_tiny_patch16_224": 16}.get(name, 4)
    assert sizes[0] == x.shape[2] // stem
    assert sizes[-1] == x.shape[2] // (16 if "vit" in name else 32)
    assert all(spectrum.shape == (size, size) and spectrum.isfinite().all() for spectrum, size in zip(maps, sizes, strict=True))


def test_mean_over_images(model, image):
    other = torch.randn_like(image) + 1
    _, mixers = spectra.blocks_and_mixers(model)
    mean = spectra.mean_log_amplitudes(model, mixers, [image, other])
    for index, mixer in enumerate(mixers):
        kept = []
        handle = mixer.register_forward_hook(lambda m, a, y, kept=kept: kept.append(y))
        with torch.no_grad():
            model(image), model(other)
        handle.remove()
        expected = sum(spectra.log_amplitude(y) for y in kept) / 2
        torch.testing.assert_close(mean[index], expected)


@pytest.mark.parametrize("lams", [(0.7, 0.8, 0.9), (0.6,), ()])
def test_context_is_what_the_layer_multiplies_by(lams):
    torch.manual_seed(1)
    mixer = SPAM(16, lams=lams)
    x = torch.randn(2, 16, 9, 11) + 1
    z = mixer.conv(mixer.proj_in(x))
    torch.testing.assert_close(mixer.proj_out(z * spectra.gate_context(mixer, x)), mixer(x), rtol=1e-4, atol=1e-5)


def test_context_maps(model, image):
    maps = spectra.context_maps(model, image)
    assert [context.shape for context in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    with torch.no_grad():
        x = model.network[0](model.patch_embed(image))  # second stage: its second block is the last
        block = model.network[2]
        x = block[0](model.network[1](x))
        expected = spectra.gate_context(block[1].token_mixer, block[1].norm1(x))[0].mean(0)
    torch.testing.assert_close(maps[1], expected, rtol=1e-4, atol=1e-5)


def test_frequency_response():
    x = torch.randn(2, 3, 8, 9) + 1
    mask = reference.spectral_mask(0.7, 2, 1 / 3, 8, 9)
    y = torch.fft.ifft2(mask * torch.fft.fft2(x)).real
    torch.testing.assert_close(spectra.frequency_response(x, y), mask, rtol=1e-5, atol=1e-6)
    frequency, gain = spectra.radial_mean(mask)
    for d, value in zip(frequency.tolist(), gain.tolist(), strict=True):
        assert value == pytest.approx(0.7 if d < 2 else 1 / 3 if d == 2 else 0.3)


def test_every_filter_does_what_it_is_made_for(model, image):
    layers = spectra.filter_responses(model, image)
    assert [[response.lam for response in layer] for layer in layers] == [[0.7, 0.8, 0.9]] * 5
    for layer in layers:
        for response in layer:
            assert response.profile[0] == response.lam
            torch.testing.assert_close(response.measured, response.profile, rtol=0, atol=1e-3)


def test_figures(model, tmp_path):
    for name in ("chelsea", "coffee"):
        (tmp_path / f"{name}.png").write_bytes((PHOTOGRAPHS / f"{name}.png").read_bytes())
    paths = spectra.save_figures({"tiny": model, "resnet18": timm.create_model("resnet18")}, tmp_path, tmp_path / "out", 64)
    assert [path.stem for path in paths] == ["fourier", "amplitude", "context", "response"]
    for path in paths:
        picture = Image.open(path).convert("RGB")
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        assert len(picture.getcolors(1 << 24)) > 100, "it is not empty"


def test_models_that_cannot_be_analysed(image):
    with pytest.raises(ValueError, match="Sequential has no blocks with a child named token_mixer"):
        spectra.blocks_and_mixers(torch.nn.Sequential())
    with pytest.raises(ValueError, match="ResNet has no SPAM layer"):
        spectra.context_maps(timm.create_model("resnet18"), image)
