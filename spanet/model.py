"""SPANet: Frequency-balancing Token Mixer using Spectral Pooling Aggregation Modulation (ICCV 2023, arXiv 2308.11568).

A four-stage MetaFormer whose token mixer is `spanet_kernels.SPAM`. Parameter names are those of the published code. The five
variants are registered with timm: `import spanet`, then `timm.create_model("spanet_small", ...)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, GroupNorm1, calculate_drop_path_rates, create_classifier, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from spanet_kernels import SPAM, PointwiseMLP, has_hooks


class ResScale(nn.Module):
    """A factor per channel on the skip branch, 1 at first (arXiv 2110.09456)."""

    def __init__(self, dim: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None]


class Block(nn.Module):
    """x = res_scale1(x) + SPAM(norm1(x)), x = res_scale2(x) + MLP(norm2(x)); (B, dim, H, W) to the same.

    Args:
        dim: channels; the MLP has 4 dim.
        drop_path: probability of dropping a branch for a sample.
        res_scale: learn a factor per channel on the skip branches.
        mixer: arguments of `SPAM`.
    """

    def __init__(
        self, dim: int, drop_path: float, res_scale: bool, mixer: Mapping[str, Any], device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = GroupNorm1(dim, **dd)
        self.token_mixer = SPAM(dim, **mixer).to(**dd)
        self.res_scale1 = ResScale(dim, **dd) if res_scale else nn.Identity()
        self.norm2 = GroupNorm1(dim, **dd)
        self.mlp = PointwiseMLP(dim, 4 * dim, **dd)
        self.res_scale2 = ResScale(dim, **dd) if res_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        own = cast(dict[str, nn.Module], self._modules)  # without `nn.Module.__getattr__`, which takes microseconds
        x = self._branch(x, own["res_scale1"], own["token_mixer"], own["norm1"])
        # nobody else sees the result of the first branch
        owned = not (module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)
        return self._branch(x, own["res_scale2"], own["mlp"], own["norm2"], owned)

    def _branch(self, x: Tensor, res_scale: nn.Module, body: nn.Module, norm: nn.Module, *inplace: bool) -> Tensor:
        """res_scale(x) + drop_path(body(norm(x))): one call of the body, unless a module was exchanged or a hook looks at one."""
        drop_path = cast(nn.Module, self._modules["drop_path"])
        own = isinstance(body, (SPAM, PointwiseMLP)) and type(norm) is GroupNorm1 and isinstance(res_scale, (ResScale, nn.Identity))
        if not own or type(drop_path) not in (DropPath, nn.Identity) or any(map(has_hooks, (res_scale, body, norm, drop_path))):
            return cast(Tensor, res_scale(x) + drop_path(body(norm(x))))
        scale = res_scale.scale if isinstance(res_scale, ResScale) else None
        dropped = _sample(drop_path, x) if isinstance(drop_path, DropPath) and drop_path.training else None
        return cast(Tensor, body(x, x, scale, (norm.weight, norm.bias, norm.eps), dropped, *inplace))


def _sample(drop_path: DropPath, x: Tensor) -> tuple[Tensor, float] | None:
    """The images that timm's DropPath keeps, by the same random numbers, and its factor."""
    kept = 1 - drop_path.drop_prob
    if kept == 1:
        return None
    return x.new_empty(x.shape[0]).bernoulli_(kept), 1 / kept if kept > 0 and drop_path.scale_by_keep else 1.0


class Downsample(nn.Module):
    """A strided convolution: the stem (7, 4, 2) and what stands between the stages (3, 2, 1)."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, padding: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, padding, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(x))


class SPANet(nn.Module, PyTorchModelHubMixin, library_name="spanet", license="apache-2.0", paper_url="https://arxiv.org/abs/2308.11568"):
    """The network: stem, four stages of blocks at strides 4, 8, 16 and 32, and a linear classifier.

    Args:
        depths, dims: blocks and channels of each stage.
        radii: of the low-pass disc of each stage, in cycles per image.
        lams, kernel_size, learnable: as for `SPAM`.
        boundary: weight on the circle d == radius; the published code's 1/3, or "paper" for its 1 - lam.
        in_chans, num_classes: 0 classes for no classifier.
        global_pool: a pooling of timm; "" for none, with 0 classes.
        drop_rate, drop_path_rate: dropout before the classifier; stochastic depth of the last block, rising linearly from 0.
        dense: a backbone for dense features, with a norm for each stage (norm0, norm2, norm4, norm6) in place of final norm and head.
        output_stride: only 32.
        device, dtype: of the parameters.

    Shape: (B, in_chans, H, W) with H, W >= 3 to (B, num_classes); any layout, channels_last kept throughout.

    Raises:
        ValueError: another output_stride or boundary, a smaller input; what `load_state_dict` raises.
    """

    def __init__(
        self,
        depths: Sequence[int] = (4, 4, 12, 4),
        dims: Sequence[int] = (64, 128, 320, 512),
        radii: Sequence[float] = (2, 2, 1, 1),
        lams: Sequence[float] = (0.7, 0.8, 0.9),
        kernel_size: int = 7,
        boundary: float | str = 1 / 3,
        learnable: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dense: bool = False,
        output_stride: int = 32,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < len(depths) == len(dims) <= len(radii):
            raise ValueError(f"SPANet: depths, dims and radii must have an entry for every stage, got {depths}, {dims} and {radii}")
        if num_classes < 0:
            raise ValueError(f"SPANet: num_classes must be at least 0, got {num_classes}")
        if output_stride != 32:
            raise ValueError(f"SPANet: output_stride must be 32, the stages cannot be dilated, got {output_stride}")
        if isinstance(boundary, str) and boundary != "paper":
            raise ValueError(f'SPANet: boundary must be a number or "paper", got {boundary!r}')
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        mixer = {"kernel_size": kernel_size, "lams": lams, "boundary": None if boundary == "paper" else boundary, "learnable": learnable}
        self.num_classes = 0 if dense else num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.grad_checkpointing = self._is_pruned = False
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": 4 << i, "module": f"network.{2 * i}"} for i, dim in enumerate(dims)
        ]
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        self.patch_embed = Downsample(in_chans, dims[0], 7, 4, 2, **dd)
        layers: list[nn.Module] = []
        for i, dim in enumerate(dims):
            if i > 0:
                layers.append(Downsample(dims[i - 1], dim, 3, 2, 1, **dd))
            layers.append(nn.Sequential(*(Block(dim, rate, i >= 2, mixer | {"radius": radii[i]}, **dd) for rate in rates[i])))
            if dense:
                self.add_module(f"norm{2 * i}", GroupNorm1(dim, **dd))
        self.network = nn.ModuleList(layers)
        self.norm = nn.Identity() if dense else GroupNorm1(dims[-1], **dd)
        self.global_pool, self.head = create_classifier(self.num_features, self.num_classes, pool_type=global_pool, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(_init_weights)
        self._tell(lams=_plain(lams), radii=_plain(radii))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the normalised last features (B, dims[-1], H / 32, W / 32)."""
        x = self._embed(x)
        for layer in self.network:
            x = self._run(layer, x)
        return cast(Tensor, self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits, or to what the classifier would take."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, and the normalised last features before them unless intermediates_only.

        Args:
            indices: the last n stages if an int, all if None.
            norm: through norm0, norm2, norm4, norm6 of a dense model, in any other the last stage through the final norm.
            stop_early: run no stage behind the last index.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"SPANet.forward_intermediates: output_fmt must be NCHW, got {output_fmt}")
        take, intermediates = self._stages(indices), []
        x = self._embed(x)
        for index, layer in enumerate(self.network[: 2 * max(take) + 1] if stop_early else self.network):
            x = self._run(layer, x)
            if index % 2 == 0 and index // 2 in take:
                final = self.norm if index == len(self.network) - 1 else nn.Identity()
                intermediates.append(getattr(self, f"norm{index}", final)(x) if norm else x)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Remove what the given stages do not need; returns their indices from 0."""
        take = self._stages(indices)
        end = 2 * max(take) + 1
        shorter = end < len(self.network)
        for index in range(0, len(self.network), 2):
            if prune_norm or index // 2 not in take:
                self._is_pruned |= self._modules.pop(f"norm{index}", None) is not None
        self.network = self.network[:end]
        self.num_features = self.head_hidden_size = self.feature_info[max(take)]["num_chs"]
        if prune_norm or shorter:
            self.norm, self._is_pruned = nn.Identity(), True
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        """A new head for num_classes, none for 0; and another pooling if one is given."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        stem = self.patch_embed.proj.weight
        dd = {"device": device or stem.device, "dtype": dtype or stem.dtype}
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool_type=pool, **dd)
        _init_weights(self.head.train(self.training))
        self._tell(num_classes=num_classes, global_pool=pool)

    def _save_pretrained(self, save_directory: Path) -> None:
        if self._is_pruned:
            raise ValueError("SPANet: save_pretrained writes what arguments make, not a pruned network; write its state_dict")
        super()._save_pretrained(save_directory)

    def _tell(self, **arguments: Any) -> None:
        """What `save_pretrained` writes of the arguments that make this model."""
        self._hub_mixin_config = cast(dict[str, Any], self._hub_mixin_config or {}) | arguments

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the inputs of the blocks only, and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates: one per stage if coarse, else one per block."""
        fine = [(r"^network\.(\d+)\.(\d+)", None), (r"^network\.(\d+)\.proj", (0,)), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^network\.(\d+)" if coarse else fine}

    def no_weight_decay(self) -> set[str]:
        """Parameters that stand for a factor or a mask, not for a matrix."""
        return {name for name, _ in self.named_parameters() if name.endswith((".scale", ".lams"))}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state of any published layout, if all of it fits; otherwise nothing is changed.

        Raises:
            ValueError: a missing, unexpected (only if strict) or wrongly shaped tensor, or a mask of another radius, lam or boundary.
        """
        own = self.state_dict()
        state = _fitted(checkpoint_filter_fn(state_dict), own)
        mixers = {name: module for name, module in self.named_modules() if isinstance(module, SPAM)}
        masks = {key for key in state if key.partition(".sps.")[0] in mixers}
        learned = {f"{mask.partition('.sps.')[0]}.lams" for mask in masks}  # masks tell them
        missing, unexpected = own.keys() - state.keys() - learned, state.keys() - own.keys() - masks
        if strict and (missing or unexpected):
            lists = [f"{what} {', '.join(_first(keys))}" for what, keys in (("lacks", missing), ("has", unexpected)) if keys]
            raise ValueError(f"SPANet: the state {' and '.join(lists)}, unlike this model")
        for key in sorted(own.keys() & state.keys()):
            shape = getattr(state[key], "shape", None)
            if shape != own[key].shape:
                came = type(state[key]).__name__ if shape is None else tuple(shape)
                raise ValueError(f"SPANet: {key} must have shape {tuple(own[key].shape)}, got {came}")
        for name, mixer in mixers.items():
            mixer.check_state(state, f"{name}.")
        return super().load_state_dict(state, strict, assign)

    def _stages(self, indices: int | Sequence[int] | None) -> list[int]:
        """The chosen stages, counted from 0: the last n for an int, all for None."""
        stages = range(len(self.network) // 2 + 1)
        chosen = stages if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        if not chosen or not all(-len(stages) <= i < len(stages) for i in chosen):
            raise ValueError(f"SPANet: indices must choose among {len(stages)} stages, got {indices}")
        return [stages[i] for i in chosen]

    def _embed(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"SPANet: the input must have shape (B, C, H, W), got {tuple(x.shape)}")
        if min(x.shape[-2:]) < 3:
            raise ValueError(f"SPANet: the input must have at least 3 x 3 pixels, got {x.shape[-2]} x {x.shape[-1]}")
        x = self.patch_embed(x)
        # Inductor's convolutions on a CPU are channels_last whatever x is; what takes their results need not be given copies then
        return x.contiguous(memory_format=torch.channels_last) if torch.compiler.is_compiling() and x.device.type == "cpu" else x

    def _run(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and isinstance(layer, nn.Sequential):
            return cast(Tensor, checkpoint_seq(layer, x))
        return cast(Tensor, layer(x))


def _plain(numbers: Any) -> list[float]:
    """Of a sequence, an array or a tensor."""
    return numbers.tolist() if hasattr(numbers, "tolist") else list(numbers)


def _init_weights(module: nn.Module) -> None:
    """Truncated normal of 0.02 for the MLPs and the classifier, PyTorch's default for everything else."""
    layers = (module.fc1, module.fc2) if isinstance(module, PointwiseMLP) else (module,) if isinstance(module, nn.Linear) else ()
    for layer in layers:
        trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(cast(Tensor, layer.bias))


def _first(keys: set[str], count: int = 4) -> list[str]:
    return [*sorted(keys)[:count], *([f"{len(keys) - count} more"] if len(keys) > count else [])]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
    """The flat state of any published layout: flat, under `state_dict` or `model`, after `module.` or `backbone.`."""
    state = dict(state_dict)
    for nest in ("state_dict", "model"):
        state = dict(state[nest]) if isinstance(state.get(nest), Mapping) else state
    for prefix in ("module.", "backbone."):
        state = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)} or state
    return state


def _fitted(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """state without the parts of a whole SPANet that own goes without: head, norms, stages of a pruned backbone.

    The norms of dense features that a classifier's state does not have stay as they are.
    """
    whole = {"norm", "head", *(f"norm{i}" for i in range(0, 8, 2)), *(f"network.{i}" for i in range(7))}
    left_out = whole - {_part(key) for key in own}
    dense_norms = {key: own[key] for key in own if key.startswith("norm") and not key.startswith("norm.")}
    return dense_norms | {key: state[key] for key in state if _part(key) not in left_out}


def _part(key: str) -> str:
    """The part of the network that a key belongs to, such as head or network.2."""
    return ".".join(key.split(".")[: 2 if key.startswith("network.") else 1])


def _cfg(crop_pct: float) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2308.11568",
    }


default_cfgs = generate_default_cfgs(
    {
        "spanet_small": _cfg(crop_pct=0.9),
        "spanet_medium": _cfg(crop_pct=0.9),
        "spanet_mediumx": _cfg(crop_pct=0.9),
        "spanet_base": _cfg(crop_pct=0.95),
        "spanet_basex": _cfg(crop_pct=0.95),
    }
)
_NARROW, _WIDE = (64, 128, 320, 512), (96, 192, 384, 768)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    return cast(
        nn.Module,
        build_model_with_cfg(
            SPANet,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter", "norm": True},
            **{"dense": kwargs.get("features_only", False)} | kwargs,
        ),
    )


@register_model
def spanet_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SPANet-S: 28.6M parameters, 4.6G MACs, 83.1 % top-1."""
    return _create("spanet_small", pretrained, {"depths": (4, 4, 12, 4), "dims": _NARROW} | kwargs)


@register_model
def spanet_medium(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SPANet-M: 41.7M parameters, 6.8G MACs, 83.5 % top-1."""
    return _create("spanet_medium", pretrained, {"depths": (6, 6, 18, 6), "dims": _NARROW} | kwargs)


@register_model
def spanet_mediumx(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SPANet-MX: 54.8M parameters, 9.0G MACs, 83.8 % top-1."""
    return _create("spanet_mediumx", pretrained, {"depths": (8, 8, 24, 8), "dims": _NARROW} | kwargs)


@register_model
def spanet_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SPANet-B: 75.9M parameters, 11.9G MACs, 84.0 % top-1."""
    return _create("spanet_base", pretrained, {"depths": (6, 6, 18, 6), "dims": _WIDE} | kwargs)


@register_model
def spanet_basex(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SPANet-BX: 99.7M parameters, 15.8G MACs, 84.4 % top-1."""
    return _create("spanet_basex", pretrained, {"depths": (8, 8, 24, 8), "dims": _WIDE} | kwargs)
