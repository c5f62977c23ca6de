"""The paper's analyses (arXiv 2308.11568): what mixers and blocks do to the spectrum of real images, and where the gates look.

    log_amplitude(x)             mean over B and C of log(|fft2(x)| + 1e-6), centred            Fourier spectrum map
    relative_log_amplitude(.)    its diagonal from the centre on, less its first element        curve over frequency 0 to pi
    gate_context(mixer, x)       sum_i W_i SPF_i(z_i) + b_i                                     aggregated context
    frequency_response(x, y)     sum Re(Y conj(X)) / sum |X|^2 over B and C                     effective response of a filter

The first two serve any model of timm whose blocks name their mixer or its residual branch as `MIXERS` lists; images are
square, so that maps and tokens tell their height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from torch import Tensor, nn

from spanet_kernels import SPAM, reference, spectral_pool

from .errors import as_value_error
from .images import as_picture, image_files, read_images, save_picture
from .processes import progress_bar

# the child of a block whose output is the mixer's: MetaFormers; the residual branch of transformers; ConvNeXt; ResNet
MIXERS = ("token_mixer", "drop_path1", "conv_dw", "conv2")


def _fft2(x: Tensor) -> Tensor:
    """The transform of planes that are contiguous: along long strided axes MKL's writes beyond its memory (torch 2.14.1)."""
    return torch.fft.fft2(x.contiguous())


def log_amplitude(x: Tensor) -> Tensor:
    """(H, W) mean over batch and channels of log(|fft2(x)| + 1e-6), the constant mode at [H // 2, W // 2]; x (B, C, H, W)."""
    amplitude = _fft2(x.float()).abs() + 1e-6
    return torch.fft.fftshift(amplitude.log().mean((0, 1)))


def relative_log_amplitude(spectrum: Tensor) -> Tensor:
    """The diagonal of a centred spectrum (H, W) from the constant mode outwards, relative to the constant mode."""
    height, width = spectrum.shape
    diagonal = spectrum[height // 2 :, width // 2 :].diagonal()
    return diagonal - diagonal[0]


def as_map(x: Tensor) -> Tensor:
    """(B, C, S, S) of a square map (B, C, S, S) or (B, S, S, C), or of tokens (B, prefix + S S, C)."""
    if x.ndim == 3:
        side = math.isqrt(x.shape[1])
        return x[:, -side * side :].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return x if x.shape[2] == x.shape[3] else x.permute(0, 3, 1, 2)


def blocks_and_mixers(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The blocks of a model, in order, and of each the module whose output is its mixer's. Raises ValueError without any."""
    found = []
    for block in model.modules():
        children = dict(block.named_children())
        if name := next((name for name in MIXERS if name in children), None):
            found.append((block, children[name]))
    if not found:
        raise ValueError(f"{type(model).__name__} has no blocks with a child named {', '.join(MIXERS)}")
    return [block for block, _ in found], [mixer for _, mixer in found]


@torch.inference_mode()
def outputs(model: nn.Module, modules: Sequence[nn.Module], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """First argument and result of each of the modules in one pass of the model in evaluation mode.

    Raises ValueError if the model does not take an image of this size.
    """
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    handles = [module.register_forward_hook(lambda m, args, y: seen.update({m: (args[0], y)})) for module in modules]
    try:
        with as_value_error(f"size: {type(model).__name__} does not take an image of {x.shape[2]} x {x.shape[3]}"):
            model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[module] for module in modules]


def mean_log_amplitudes(model: nn.Module, modules: Sequence[nn.Module], images: Iterable[Tensor]) -> list[Tensor]:
    """`log_amplitude` of the output of each of the modules, averaged over the images (1, 3, S, S)."""
    each = [[log_amplitude(as_map(y)) for _, y in outputs(model, modules, x)] for x in images]
    return [torch.stack(spectra).mean(0) for spectra in zip(*each, strict=True)]


def gates(mixer: SPAM, x: Tensor) -> Iterator[tuple[float | None, nn.Conv2d, Tensor, Tensor]]:
    """lam, 1x1 convolution, channels z_i and SPF_i(z_i) of each gate of a SPAM layer on its input x; no lam, no filter."""
    z = mixer.conv(mixer.proj_in(x))
    pointwise = cast(list[nn.Conv2d], list(mixer.pws))
    lams: list[float | None] = [float(lam) for lam in mixer.lams] or [None]
    for lam, pw, chunk in zip(lams, pointwise, z.split([pw.in_channels for pw in pointwise], 1), strict=True):
        yield lam, pw, chunk, chunk if lam is None else spectral_pool(chunk, lam, mixer.radius, mixer.boundary)


def gate_context(mixer: SPAM, x: Tensor) -> Tensor:
    """(B, C, H, W) aggregated context of a SPAM layer on its input x: sum_i W_i SPF_i(z_i) + b_i."""
    return torch.stack([pw(filtered) for _, pw, _, filtered in gates(mixer, x)]).sum(0)


def stage_ends(model: nn.Module) -> list[SPAM]:
    """The last SPAM layer of each stage: those after which the number of channels changes. Raises ValueError without any."""
    mixers = [module for module in model.modules() if isinstance(module, SPAM)]
    if not mixers:
        raise ValueError(f"{type(model).__name__} has no SPAM layer, whose gates this analysis shows")
    dims = [mixer.proj_in.in_channels for mixer in mixers] + [0]
    return [mixer for mixer, dim, following in zip(mixers, dims[:-1], dims[1:], strict=True) if dim != following]


@torch.inference_mode()
def context_maps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """(H, W) aggregated context at the end of each stage, averaged over the channels, for one image x (1, 3, S, S)."""
    mixers = stage_ends(model)
    return [gate_context(mixer, z)[0].mean(0) for mixer, (z, _) in zip(mixers, outputs(model, mixers, x), strict=True)]


def frequency_response(x: Tensor, y: Tensor) -> Tensor:
    """(H, W) gain from x to y on every bin of `torch.fft.fft2`, by least squares over batch and channels of (B, C, H, W) maps."""
    spectrum = _fft2(x.double())
    return (_fft2(y.double()) * spectrum.conj()).real.sum((0, 1)) / spectrum.abs().square().sum((0, 1))


def radial_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct frequencies d, in cycles per image, of (H, W) values on the bins of `torch.fft.fft2`, and the mean on each."""
    squared, shell = reference.squared_frequencies(*values.shape).unique(return_inverse=True)
    sums = values.new_zeros(len(squared)).index_add(0, shell.flatten(), values.flatten())
    return squared.sqrt(), sums / shell.flatten().bincount()


class Response(NamedTuple):
    """Gain of one filter at frequencies d, in cycles per image: the one it is made for, and the one it shows on an image."""

    lam: float
    frequency: Tensor
    profile: Tensor
    measured: Tensor


@torch.inference_mode()
def filter_responses(model: nn.Module, x: Tensor) -> list[list[Response]]:
    """The responses of the filters of every SPAM layer of a model, measured on what an image x (1, 3, S, S) gives them."""
    mixers = [module for module in model.modules() if isinstance(module, SPAM)]
    layers: list[list[Response]] = []
    for mixer, (layer_input, _) in zip(mixers, outputs(model, mixers, x), strict=True):
        layers.append([])
        for lam, _, z, filtered in gates(mixer, layer_input):
            if lam is None:
                continue
            frequency, profile = radial_mean(reference.spectral_mask(lam, mixer.radius, mixer.boundary, *z.shape[2:]))
            layers[-1].append(Response(lam, frequency, profile, radial_mean(frequency_response(z, filtered))[1]))
    return layers


def panels(rows: int, columns: int, size: float) -> tuple[Figure, Any]:
    """A white figure, which reads on light and dark pages, with rows x columns square panels."""
    fig = Figure(figsize=(size * columns, size * rows + 0.5), facecolor="white", layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def fourier_figure(spectra: dict[str, list[Tensor]], columns: int = 8) -> Figure:
    """A row per model: the mean log amplitude of its mixers' outputs, from the first block to the last."""
    fig, axes = panels(len(spectra), columns, 1.7)
    for line, (name, maps) in zip(axes, spectra.items(), strict=True):
        chosen = torch.linspace(0, len(maps) - 1, columns).round().int().unique().tolist()
        for ax, index in zip(line, chosen, strict=False):
            ax.imshow(maps[index].numpy(), cmap="magma")
            ax.set_title(f"block {index + 1}, {len(maps[index])}²", fontsize=8)
        for ax in line:
            ax.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(name, fontsize=8)
    fig.suptitle("Fourier spectra of mixer outputs: mean log amplitude, constant mode in the middle", fontsize=10)
    return fig


def amplitude_figure(spectra: dict[str, list[Tensor]]) -> Figure:
    """A panel per model: relative log amplitude over frequency, one curve per block, coloured by depth."""
    fig, axes = panels(1, len(spectra), 3.4)
    depth = colormaps["viridis"]
    for ax, (name, maps) in zip(axes[0], spectra.items(), strict=True):
        for index, spectrum in enumerate(maps):
            curve = relative_log_amplitude(spectrum)
            frequency = torch.arange(len(curve)) / (len(spectrum) / 2)
            ax.plot(frequency.numpy(), curve.numpy(), color=depth(index / max(len(maps) - 1, 1)))
        ax.set(title=name, xlabel="frequency / π", ylabel="relative log amplitude")
        ax.grid(alpha=0.3)
    fig.colorbar(ScalarMappable(cmap=depth), ax=list(axes[0]), label="depth")
    return fig


def context_figure(rows: Sequence[tuple[Tensor, list[Tensor]]]) -> Figure:
    """A row per image (H, W, 3): itself, and the aggregated context at the end of each stage over it."""
    fig, axes = panels(len(rows), 1 + len(rows[0][1]), 2.2)
    for line, (image, contexts) in zip(axes, rows, strict=True):
        for ax in line:
            ax.imshow(image.numpy())
            ax.set_axis_off()
        for ax, context in zip(line[1:], contexts, strict=True):
            overlay(ax, context, image.shape[:2])
    for stage, ax in enumerate(axes[0][1:], 1):
        ax.set_title(f"context, stage {stage}", fontsize=9)
    return fig


def overlay(ax: Axes, values: Tensor, size: Sequence[int]) -> None:
    """values (h, w), bilinearly to the size of the image in the panel, over it."""
    values = nn.functional.interpolate(values[None, None], tuple(size), mode="bilinear", align_corners=False)[0, 0]
    ax.imshow(values.numpy(), cmap="turbo", alpha=0.55)


def response_figure(layers: Sequence[Sequence[Response]], columns: int = 6) -> Figure:
    """A panel per SPAM layer: of each of its filters, the gain it is made for as a line, the measured one as dots."""
    fig, axes = panels(-(-len(layers) // columns), columns, 1.9)
    for ax in axes.flat[len(layers) :]:
        ax.set_visible(False)
    for index, (ax, filters) in enumerate(zip(axes.flat, layers, strict=False)):
        for response, colour in zip(filters, ("#1f6feb", "#d4790f", "#b62324", "#2da44e") * len(filters), strict=False):
            ax.plot(response.frequency.numpy(), response.profile.numpy(), color=colour, lw=1, label=f"λ = {response.lam:.3g}")
            ax.plot(response.frequency.numpy(), response.measured.numpy(), ".", color=colour, ms=3)
        ax.set_title(f"layer {index + 1}", fontsize=8)
        ax.set_xlim(-0.5, 8.5)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=6)
    fig.suptitle("Gain of the filters over frequency in cycles per image: made for (lines), measured (dots)", fontsize=10)
    return fig


def save_figures(models: dict[str, nn.Module], source: Path, out: Path, size: int | None = None) -> list[Path]:
    """Write all analyses of one image or a folder's: spectra of every model, contexts and responses of the first, a SPANet.

    Args:
        models: by the name to show.
        out: folder, made if it is not there.
        size: of the square that the models see; their own without.

    Returns:
        the figures' files; the spectra are means over all images, contexts are of the first 8 and responses of the first.

    Raises:
        ValueError: no readable image; a model without blocks or SPAM layers.
    """
    first = next(iter(models.values()))
    mixers, blocks, count = {}, {}, len(image_files(source))
    with progress_bar(count > 1) as bar:
        for name, model in models.items():
            parts = blocks_and_mixers(model)
            seen = bar.track(read_images(model, source, size), total=count, description=name)
            amplitudes = mean_log_amplitudes(model, [module for part in parts for module in part], seen)
            blocks[name], mixers[name] = amplitudes[: len(parts[0])], amplitudes[len(parts[0]) :]
    images = list(islice(read_images(first, source, size), 8))
    figures = {
        "fourier": fourier_figure(mixers),
        "amplitude": amplitude_figure(blocks),
        "context": context_figure([(as_picture(first, x), context_maps(first, x)) for x in images]),
        "response": response_figure(filter_responses(first, images[0])),
    }
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        save_picture(figure, paths[-1])
    return paths
