"""Modules: the spectral pooling filter `SPF`, the gate `SPG`, the mixer `SPAM`, the MLP beside it, and `accelerate` for models of other
making."""

from __future__ import annotations

import itertools
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import modes, reference
from .ops.checks import check_boundary, check_branch, check_radius
from .ops.pointwise_mlp import pointwise_mlp
from .ops.radial_filter import deciding_size, radial_filter, spectral_pool
from .ops.spectral_mixer import spectral_mixer


class SPF(nn.Module):
    """Spectral pooling filter: lam for frequencies d < radius, 1 - lam for the others (arXiv 2308.11568, eqs. 5-18).

    Args:
        lam: weight of the low frequencies; a number, or a tensor of shape () or (C,) for one per channel.
        radius: of the low-pass disc, in cycles per image.
        boundary: weight on the circle d == radius; None is the paper's 1 - lam, the published code has 1/3.
        learnable: make lam a parameter; otherwise it is part of the module's description, not of its state, unless it is a parameter
            already, which the module shares.

    Shape: (B, C, H, W) to the same, any size, dtype and layout; the module has no activation memory of its own.

    Raises:
        what `spectral_pool` raises, on the first call.
    """

    def __init__(self, lam: float | Tensor, radius: float, boundary: float | None = None, learnable: bool = False) -> None:
        super().__init__()
        self.lam: float | Tensor
        if learnable:
            self.lam = nn.Parameter(torch.as_tensor(lam, dtype=torch.get_default_dtype()).clone())
        elif isinstance(lam, Tensor) and not isinstance(lam, nn.Parameter):
            self.register_buffer("lam", lam, persistent=False)
        else:
            self.lam = lam
        self.radius = radius
        self.boundary = boundary

    def forward(self, x: Tensor) -> Tensor:
        return spectral_pool(x, self.lam, self.radius, self.boundary)

    def extra_repr(self) -> str:
        lam = f"{tuple(self.lam.shape)} tensor" if isinstance(self.lam, Tensor) else self.lam
        return f"lam={lam}, radius={self.radius}, boundary={self.boundary}, learnable={isinstance(self.lam, nn.Parameter)}"


def is_plain(layer: nn.Module, groups: int = 1) -> bool:
    """Whether a convolution, parametrized or not, is no more than its weight and bias: it has no hooks, which look at its calls or make its
    weight, nothing stands in its place, and it keeps the size of zero-padded maps, at stride 1, in so many groups."""
    if "forward" in layer.__dict__ or type(layer).forward is not nn.Conv2d.forward or has_hooks(layer):
        return False
    conv = cast(nn.Conv2d, layer)
    keeps_size = conv.stride == conv.dilation == (1, 1) and conv.padding == (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
    return keeps_size and conv.groups == groups and conv.padding_mode == "zeros"


def has_hooks(module: nn.Module) -> bool:
    """Whether something looks at the calls of a module, or changes what goes in or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _parameters_of(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution, parametrized or not; those that are its own without `nn.Module.__getattr__`, which takes a
    microsecond."""
    own = layer._parameters
    if "weight" in own and "bias" in own:
        return cast(Tensor, own["weight"]), own["bias"]
    return cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)


class SPG(nn.Sequential):
    """Spectral pooling gate: the filter of some channels, mixed into all: W SPF(x) + b (arXiv 2308.11568, eq. 19).

    Args:
        in_channels, out_channels: of the 1x1 convolution.
        lam, radius, boundary, learnable: as for `SPF`.

    Shape: (B, in_channels, H, W) to (B, out_channels, H, W). In `SPAM` all gates are one matrix product and no filter is computed.
    """

    def __init__(
        self, in_channels: int, out_channels: int, lam: float, radius: float, boundary: float | None = None, learnable: bool = False
    ) -> None:
        super().__init__(SPF(lam, radius, boundary, learnable), nn.Conv2d(in_channels, out_channels, 1))


class SPAM(nn.Module):
    """Spectral pooling aggregation modulation, the token mixer of SPANet (arXiv 2308.11568, section 3.3).

    z = conv_kx1(conv_1xk(proj_in(x))),  out = proj_out(z o sum_i W_i SPF_i(z_i) + b_i), z_i the i-th channel chunk of z.
    The function of the published layer under its parameter names. Its masks are a function of lams, radius and boundary: a state
    dict that has them must agree with this module, and then they are not kept; learned lams that it lacks are read from them. Runs as one
    `spectral_mixer`, which reads the weights of the convolutions and calls none of them; where one has hooks, pads otherwise or is no
    `Conv2d` of PyTorch's, they are called one by one.

    Args:
        dim: channels.
        kernel_size: k of the two depthwise convolutions, odd.
        lams: weight of the low frequencies of each gate; as many gates as numbers. Empty: one gate without a filter.
        radius: of the low-pass disc, in cycles per image.
        boundary: weight on the circle d == radius; the published code's 1/3, or None for the paper's 1 - lam.
        learnable: make lams, if there are any, a parameter, (gates,).

    Shape: (B, dim, H, W) to the same, any size, dtype and layout. Called with residual, residual_scale, norm (weight, bias, eps) or
    drop_path it is a residual branch, residual_scale o residual + drop_path(SPAM(norm(x))), in one call: see `spectral_mixer`.

    Raises:
        TypeError: radius is no number.
        ValueError: an even kernel_size, no channels or fewer than gates, a lam or boundary that is not finite, a negative or NaN radius;
            on loading, masks that disagree or a key of another shape, before anything is changed; so a missing one, by
            `load_state_dict` of the layer; on a call, an input of other channels.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        lams: Sequence[float] | np.ndarray | Tensor = (0.7, 0.8, 0.9),
        radius: float = 2,
        boundary: float | None = 1 / 3,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(kernel_size, (int, np.integer)) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"SPAM: kernel_size must be an odd number, got {kernel_size}")
        given = lams.tolist() if isinstance(lams, (np.ndarray, Tensor)) else lams
        numbers_alone = isinstance(given, Sequence) and not isinstance(given, str)
        if not numbers_alone or not all(isinstance(lam, numbers.Real) and math.isfinite(lam) for lam in given):
            raise ValueError(f"SPAM: lams must be a sequence of finite numbers, got {lams}")
        lams = tuple(map(float, given))
        if not isinstance(dim, (int, np.integer)):
            raise TypeError(f"SPAM: dim must be an integer, got {type(dim).__name__}")
        if dim < 1:
            raise ValueError(f"SPAM: dim must be at least 1, got {dim}")
        chunks = modes.chunks(dim, max(len(lams), 1))
        if len(chunks) < len(lams):
            raise ValueError(f"SPAM: dim must give each of {len(lams)} gates a channel, got {dim}")
        self.dim = dim
        self.radius = check_radius("SPAM", radius)
        self.boundary = None if boundary is None else check_boundary("SPAM", boundary)
        self.lams = nn.Parameter(torch.tensor(lams)) if learnable and lams else lams
        pad = kernel_size // 2
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim, (1, kernel_size), padding=(0, pad), groups=dim),
            nn.Conv2d(dim, dim, (kernel_size, 1), padding=(pad, 0), groups=dim),
        )
        self.pws = nn.ModuleList(nn.Conv2d(chunk, dim, 1) for chunk in chunks)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.register_load_state_dict_pre_hook(_check_loaded)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        residual_scale: Tensor | None = None,
        norm: tuple[Tensor, Tensor, float] | None = None,
        drop_path: tuple[Tensor, float] | None = None,
    ) -> Tensor:
        base, gain, squared = self._profile(x)
        layers = self._plain_layers()
        if layers is None:
            branch = check_branch("SPAM", x, tuple(x.shape), norm, residual, residual_scale, drop_path)
            return branch.added(self._by_convolutions(branch.normalised(x), base, gain, modes.radius_of(squared)))
        (in_weight, in_bias), row, column, (out_weight, out_bias), *gates = map(_parameters_of, layers)
        weight, bias = _as_one(gates)
        return spectral_mixer(
            x,
            in_weight.flatten(1),
            in_bias,
            *row,
            *column,
            weight,
            bias,
            base,
            gain,
            modes.radius_of(squared),
            out_weight.flatten(1),
            out_bias,
            residual,
            residual_scale,
            norm,
            drop_path,
        )

    def _plain_layers(self) -> tuple[nn.Module, ...] | None:
        """proj_in, the two depthwise convolutions, proj_out and those of the gates, if all are plain (`is_plain`) and conv is no more than
        one after the other."""
        own = cast(dict[str, Any], self._modules)  # without `nn.Module.__getattr__`
        conv = own["conv"]
        if type(conv) is not nn.Sequential or "forward" in conv.__dict__ or has_hooks(conv) or len(conv._modules) != 2:
            return None
        proj_in, proj_out, gates = own["proj_in"], own["proj_out"], own["pws"]._modules.values()
        row, column = conv._modules.values()
        plain = all(map(is_plain, (proj_in, proj_out, *gates))) and is_plain(row, self.dim) and is_plain(column, self.dim)
        return (proj_in, row, column, proj_out, *gates) if plain else None

    def _by_convolutions(self, x: Tensor, base: Tensor, gain: Tensor, radius: float | None) -> Tensor:
        """The mixer of calls of its convolutions, the filter alone an operator."""
        z = self.conv(self.proj_in(x))
        filtered = z if radius is None else radial_filter(z, base, gain, radius)
        chunks = filtered.split(modes.chunks(z.shape[1], len(self.pws)), 1)
        context = [pw(chunk) for pw, chunk in zip(self.pws, chunks, strict=True)]
        return cast(Tensor, self.proj_out(z * sum(context[1:], context[0])))

    def _profile(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """base (C,), gain (S, C) and squared radius of all filters together; -1 without filters."""
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(f"SPAM: x must have shape (B, {self.dim}, H, W), got {tuple(x.shape)}")
        channels, height, width = x.shape[1], *deciding_size(x, self.radius)
        dtype = modes.profile_dtype(x.dtype)
        if isinstance(self.lams, tuple) and not torch.compiler.is_compiling():
            return modes.constant_profile(self.lams, channels, self.radius, self.boundary, height, width, dtype, x.device)
        lams = torch.as_tensor(self.lams, dtype=dtype, device=x.device)
        return modes.chunked_profile(lams, channels, self.radius, self.boundary, height, width)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of every module, but that of a state which does not fit nothing is taken."""
        own = self.state_dict()
        masks = _masks(state_dict, "")
        lacking = [name for name in own if name not in state_dict and not (name == "lams" and masks)]
        strange = [name for name in state_dict if name not in own and name not in masks]
        for what, names in (("lacks", lacking), ("has", strange)):
            if strict and names:
                raise ValueError(f"SPAM: the state {what} {', '.join(names)}, unlike this layer")
        return super().load_state_dict(state_dict, strict, assign)

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> Tensor | None:
        """Learned lams that a state, under a prefix, has in its masks alone; None if there are none.

        Raises ValueError where a tensor or a mask is not this layer's.
        """
        for name, value in self.state_dict().items():
            shape = getattr(state.get(prefix + name, value), "shape", None)
            if shape != value.shape:
                came = None if shape is None else tuple(shape)
                raise ValueError(f"SPAM: {prefix + name} must have shape {tuple(value.shape)}, got {came}")
        given, gates = state.get(f"{prefix}lams") if isinstance(self.lams, Tensor) else self.lams, len(self.lams)
        lams = [math.nan] * gates if given is None else _numbers(given)
        for key in _masks(state, prefix):
            mask, index = state[key], int(key.split(".")[-2])
            if index >= gates:
                raise ValueError(f"SPAM: {key} is the mask of a gate that a layer of {gates} gates does not have")
            fits = mask.dim() == 3 and mask.shape[0] == 1 and mask.numel() > 0
            if fits:
                height, width = mask.shape[1:]
                if given is None:
                    lams[index] = _tidy(float(mask[0, height // 2, width // 2]), _rounding(mask))
                expected = _mask(lams[index], self.radius, self.boundary, height, width)
                fits = torch.allclose(mask.cpu().float(), expected, atol=max(1e-3, torch.finfo(mask.dtype).eps))
            if not fits:
                own = f"lam={lams[index]}, radius={self.radius}, boundary={self.boundary}"
                raise ValueError(f"SPAM: {key}, {tuple(mask.shape)}, is not the mask of {own}")
        return torch.tensor(lams) if given is None and all(map(math.isfinite, lams)) else None

    def published_state(self, height: int, width: int) -> dict[str, Tensor]:
        """The state dict of the published layer for maps of this size: the convolutions and the masks (1, height, width), learned or not.

        Raises ValueError for a layer without a filter, which the published one cannot be.
        """
        if height < 1 or width < 1:
            raise ValueError(f"SPAM.published_state: height and width must be at least 1, got {height} and {width}")
        if not len(self.lams):
            raise ValueError("SPAM.published_state: the published layer has a filter, this one has no lams")
        lams = _numbers(self.lams)
        masks = {f"sps.{i}.filter": _mask(lam, self.radius, self.boundary, height, width) for i, lam in enumerate(lams)}
        return {key: value for key, value in self.state_dict().items() if key != "lams"} | masks

    def extra_repr(self) -> str:
        return f"lams={self.lams}, radius={self.radius}, boundary={self.boundary}"


class PointwiseMLP(nn.Module):
    """fc2(gelu(fc1(x))), two 1x1 convolutions around an exact GELU: the MLP of a block.

    Runs as one `pointwise_mlp`, which reads the weights of the convolutions and calls neither; where one has hooks, pads otherwise or is
    no `Conv2d` of PyTorch's, they are called.

    Args:
        dim: channels of the input and the output.
        hidden_dim: channels between the convolutions.
        device, dtype: of the parameters.

    Shape: (B, dim, H, W) to the same, any size, dtype and layout. Called with residual, residual_scale, norm or drop_path it is a
    residual branch, as `SPAM` is; inplace as for `pointwise_mlp`.

    Raises:
        what `pointwise_mlp` raises, on a call.
    """

    def __init__(self, dim: int, hidden_dim: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        residual_scale: Tensor | None = None,
        norm: tuple[Tensor, Tensor, float] | None = None,
        drop_path: tuple[Tensor, float] | None = None,
        inplace: bool = False,
    ) -> Tensor:
        own = cast(dict[str, Any], self._modules)  # without `nn.Module.__getattr__`
        fc1, fc2 = own["fc1"], own["fc2"]
        if is_plain(fc1) and is_plain(fc2):
            return pointwise_mlp(x, *_parameters_of(fc1), *_parameters_of(fc2), residual, residual_scale, norm, inplace, drop_path)
        branch = check_branch("PointwiseMLP", x, tuple(x.shape), norm, residual, residual_scale, drop_path)
        return branch.added(fc2(functional.gelu(fc1(branch.normalised(x)))))


def _as_one(gates: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """The 1x1 convolutions of all gates as one: weights side by side, biases summed."""
    biases = [bias for _, bias in gates if bias is not None]
    weight = gates[0][0] if len(gates) == 1 else torch.cat([weight for weight, _ in gates], 1)
    # added one by one: the gradients of stack(...).sum() would be one memory, which accumulation adds to three times
    return weight.flatten(1), sum(biases[1:], biases[0]) if biases else None


def _numbers(lams: tuple[float, ...] | Tensor) -> list[float]:
    return lams.tolist() if isinstance(lams, Tensor) else list(lams)


def _mask(lam: float, radius: float, boundary: float | None, height: int, width: int) -> Tensor:
    """(1, H, W) mask of the published layer: the constant mode in the centre."""
    return torch.fft.fftshift(reference.spectral_mask(lam, radius, boundary, height, width))[None].float()


def _check_loaded(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], strict: bool, *_: list[str]) -> None:
    """Refuse a state that does not fit, before anything is copied; keep no masks of one that does, but learned lams that it lacks."""
    lams = cast(SPAM, module).check_state(state, prefix)
    for key in _masks(state, prefix):
        del state[key]
    if lams is not None:
        state[f"{prefix}lams"] = lams


def _masks(state: Mapping[str, Any], prefix: str) -> list[str]:
    return [key for key in state if key.startswith(prefix) and _MASK.fullmatch(key, len(prefix))]


def accelerate(model: nn.Module) -> list[str]:
    """Replace, in place, every layer of the published SPAM's structure by a `SPAM` that shares its parameters.

    A layer has that structure if it has proj_in, conv, sps, pws and proj_out; lams, radius and boundary are read from its masks,
    and the replacement must reproduce its output on random maps of the masks' size. Training state, layouts, dtypes and devices stay.

    Args:
        model: any module; when it is itself such a layer there is nothing to put the replacement into, which is an error.

    Returns:
        the names of the replaced layers.

    Raises:
        TypeError: model is no module. ValueError: the model has no such layer, or one that does not fit, and why; then nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a module, got {type(model).__name__}")
    modules = model.named_modules(remove_duplicate=False)  # a layer that stands in two places is replaced in both
    found = {name: layer for name, layer in modules if all(hasattr(layer, part) for part in _PUBLISHED_PARTS)}
    if not found:
        raise ValueError(f"accelerate: {type(model).__name__} has no layer with {', '.join(_PUBLISHED_PARTS)}")
    if "" in found:
        raise ValueError("accelerate: model is itself the layer; give the model that holds it")
    names = {layer: name for name, layer in found.items()}
    with torch.device("cpu"):  # masks are compared there, whatever the default device
        twins = {layer: _twin(name, layer) for layer, name in names.items()}
    for name, layer in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, twins[layer])
    return list(found)


_MASK = re.compile(r"sps\.\d+\.filter")
_PUBLISHED_PARTS = ("proj_in", "conv", "sps", "pws", "proj_out")


def _twin(name: str, layer: Any) -> SPAM:
    """The `SPAM` that shares the convolutions of a published layer and computes the same."""
    try:
        if "_orig_mod" in layer._modules:
            raise ValueError("it is compiled; first accelerate, then compile")
        if has_hooks(layer):
            raise ValueError("it has hooks, which its replacement would not have")
        if any(getattr(sp.filter, "requires_grad", False) for sp in layer.sps):
            raise ValueError("its masks are learned")
        if layer.proj_in.weight.is_meta:
            raise ValueError("its parameters are on the meta device, where nothing can be compared")
        masks = [torch.as_tensor(sp.filter).detach().squeeze(0) for sp in layer.sps]
        lams, radii, boundaries = zip(*(_mask_parameters(mask) for mask in masks), strict=True)
        if len(set(radii)) > 1 or len(set(boundaries)) > 1:
            raise ValueError(f"its gates differ in radius {radii} or boundary {boundaries}")
        with torch.device("meta"):
            twin = SPAM(layer.proj_in.in_channels, max(layer.conv[0].kernel_size), lams, radii[0], boundaries[0])
        for part in ("proj_in", "conv", "pws", "proj_out"):
            for key, own in getattr(twin, part).named_modules():
                theirs = getattr(layer, part).get_submodule(key)
                if isinstance(own, nn.Conv2d) and own.extra_repr() != theirs.extra_repr():
                    raise ValueError(f"{part}.{key} is Conv2d({theirs.extra_repr()}), not Conv2d({own.extra_repr()})")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"accelerate: {name} does not fit: {error}") from None
    for part in ("proj_in", "conv", "pws", "proj_out"):
        setattr(twin, part, getattr(layer, part))
    weight, random = layer.proj_in.weight, torch.Generator().manual_seed(0)
    probe = torch.randn((1, weight.shape[1], *masks[0].shape), generator=random).to(weight.device)
    # away from zeros and ones that a layer may start from
    moved = {
        key: value.float() + 0.1 * torch.randn(value.shape, generator=random).to(value.device) for key, value in twin.state_dict().items()
    }
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        # in float32: the published layer computes in no 16-bit dtype
        theirs, ours = (
            torch.func.functional_call(module, {key: moved.get(key, value.float()) for key, value in module.state_dict().items()}, probe)
            for module in (layer, twin)
        )
    tolerance = 1e-4 + max(map(_rounding, masks))  # of masks that were cast with their model
    if theirs.shape != ours.shape or not float((theirs - ours).abs().max()) <= tolerance * float(theirs.abs().max()):
        raise ValueError(f"accelerate: {name} does not fit: it computes something else from the same parameters")
    return twin.train(layer.training)


def _rounding(mask: Tensor) -> float:
    """Of the coarsest dtype that holds its values: a mask is cast with its model, to and fro."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if mask.to(dtype).to(mask.dtype).equal(mask):
            return float(torch.finfo(dtype).eps)
    return float(torch.finfo(mask.dtype).eps)


def _mask_parameters(mask: Tensor) -> tuple[float, float, float | None]:
    """lam, radius and boundary of a centred (H, W) mask; on the circle a value of its own, or the circle is not in the disc."""
    height, width, rounding = *mask.shape, _rounding(mask)
    squared = torch.fft.fftshift(reference.squared_frequencies(height, width)).flatten().tolist()
    values = {shell: _tidy(value, rounding) for shell, value in zip(squared, mask.flatten().tolist(), strict=True)}
    shells = sorted(values)
    inside = [shell for shell in shells if values[shell] == values[0]]
    edge = next((shell for shell in shells if shell not in inside), None)
    if edge is None:
        raise ValueError(f"its masks hold {values[0]:g} at every frequency")
    boundary = None if abs(values[edge] - (1 - values[0])) <= rounding else values[edge]
    radius = math.sqrt(edge) if math.isqrt(edge) ** 2 == edge or boundary is not None else math.sqrt((inside[-1] + edge) / 2)
    if not torch.allclose(mask.cpu().float(), _mask(values[0], radius, boundary, height, width)[0], atol=rounding, rtol=0):
        raise ValueError("its masks are not radial, with 1 - lam outside the disc")
    return values[0], radius, boundary


def _tidy(value: float, rounding: float) -> float:
    """The number of fewest digits, or else the fraction of least denominator, that rounds to value."""
    candidates = itertools.chain((round(value, digits) for digits in range(5)), (round(value * d) / d for d in range(1, 100)))
    return next((near for near in candidates if abs(near - value) <= rounding * abs(value) / 2), value)
