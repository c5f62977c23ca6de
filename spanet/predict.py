"""Classification of one photograph, and a picture of where the model looks.

    activation = sum_c f_c o d logit / d f_c      f (B, C, h, w) the last features, before pooling

With SPANet's head, a mean over the map and a linear layer, its sum is the logit less the bias: it is the class activation map
(arXiv 1512.04150), and for other heads its element-wise extension (arXiv 2011.08891).
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from .errors import as_value_error
from .images import as_picture
from .spectra import as_map, context_maps, overlay, panels

ENDINGS = {f".{ending}" for ending in FigureCanvasBase.get_supported_filetypes()}  # of figures that can be written


class Guess(NamedTuple):
    """A class of a model, its name and its probability."""

    label: int
    name: str
    probability: float


def predict(model: nn.Module, x: Tensor, classes: list[str] | None = None, top: int = 5) -> list[Guess]:
    """The most probable classes of one image x (1, 3, H, W), best first; without names of its own, a model of 1000 has ImageNet's.

    Raises ValueError if the model does not take an image of this size.
    """
    with torch.inference_mode(), as_value_error(f"size: {type(model).__name__} does not take an image of {x.shape[2]} x {x.shape[3]}"):
        probabilities = model.eval()(x)[0].softmax(0)
    if classes is None:
        imagenet = ImageNetInfo() if len(probabilities) == 1000 else None
        classes = [imagenet.index_to_description(i) if imagenet else f"class {i}" for i in range(len(probabilities))]
    best = probabilities.topk(min(top, len(probabilities)))
    return [Guess(i, classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def class_activation(model: nn.Module, x: Tensor, index: int) -> Tensor:
    """(h, w) part that each place of the last features has in the logit of a class, for one square image x (1, 3, S, S)."""
    net = cast(Any, model.eval())
    with torch.no_grad():
        features = net.forward_features(x)
    features.requires_grad_()
    (gradient,) = torch.autograd.grad(net.forward_head(features)[0, index], features)
    return as_map((features * gradient).detach())[0].sum(0)


def prediction_figure(model: nn.Module, x: Tensor, guess: Guess) -> Figure:
    """The image (1, 3, S, S), the aggregated context at the end of each stage over it, and the activation of a class."""
    picture = as_picture(model, x)
    shown = {f"context, stage {stage}": context for stage, context in enumerate(context_maps(model, x), 1)}
    shown["activation of the class"] = class_activation(model, x, guess.label)
    fig, axes = panels(1, 1 + len(shown), 2.4)
    for ax in axes[0]:
        ax.imshow(picture.numpy())
        ax.set_axis_off()
    for ax, (title, values) in zip(axes[0][1:], shown.items(), strict=True):
        overlay(ax, values, x.shape[2:])
        ax.set_title(title, fontsize=9)
    axes[0][0].set_title(f"{guess.name.split(',')[0]}, {guess.probability:.1%}", fontsize=9)
    return fig
