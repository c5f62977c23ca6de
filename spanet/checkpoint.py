"""Checkpoints of SPANet: files of the published code in, the same and safetensors out.

Nothing but tensors is read from a file, a file that does not fit changes nothing, and a file is written whole or not at all.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from spanet_kernels import SPAM

from .errors import as_value_error
from .model import SPANet, checkpoint_filter_fn
from .runs import replacing, write_weights


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file under flat names, averaged weights if it has any; code in a file is not run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, holds more than tensors and plain values, or no state dict.
    """
    _there(path)
    trusted = torch.serialization.safe_globals([argparse.Namespace])  # training scripts keep their arguments
    with as_value_error(f"{path} cannot be read as a checkpoint"), trusted:
        try:
            state = checkpoint_filter_fn(load_state_dict(str(path), weights_only=True))
        except (RuntimeError, LookupError, EOFError) as error:
            if isinstance(error, RuntimeError) and "weights_only" not in str(error):
                raise
            raise ValueError("it is no PyTorch or safetensors file, or holds code, which is not run") from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: it has {', '.join(map(str, list(state)[:4])) or 'nothing'}")
    return state


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for one without, or of another format. Raises FileNotFoundError if there is no file."""
    _there(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError:
        return {}


def _there(path: str | Path) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a file into a SPANet, or into the SPANet inside of another module, if all of it fits; otherwise nothing is changed.

    Raises:
        what `read_state` and `SPANet.load_state_dict` raise, with the name of the file.
    """
    state = read_state(path)
    try:
        backbone_of(model).load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def backbone_of(model: nn.Module) -> SPANet:
    """The first SPANet of a module: itself, or the one in timm's feature extractor, a wrapper or a task's model."""
    for module in model.modules():
        if isinstance(module, SPANet):
            return module
    raise ValueError(f"{type(model).__name__} holds no SPANet")


def model_of(state: Mapping[str, Tensor]) -> SPANet:
    """A SPANet with the weights of a state, of the sizes that its tensors tell; radii and lams are the published ones.

    Raises:
        ValueError: it is no state of a SPANet; what `SPANet.load_state_dict` raises.
    """
    stages = [key.removesuffix("0.norm1.weight") for key in state if re.fullmatch(r"network\.\d+\.0\.norm1\.weight", key)]
    try:
        model = SPANet(
            depths=[sum(key.startswith(stage) and key.endswith(".norm1.weight") for key in state) for stage in stages],
            dims=[state[f"{stage}0.norm1.weight"].shape[0] for stage in stages],
            kernel_size=state["network.0.0.token_mixer.conv.0.weight"].shape[-1],
            in_chans=state["patch_embed.proj.weight"].shape[1],
            num_classes=state["head.weight"].shape[0] if "head.weight" in state else 0,
            dense="norm0.weight" in state,
        )
    except KeyError as error:
        raise ValueError(f"the state is not of a SPANet: it lacks {error.args[0]}") from None
    except IndexError:
        raise ValueError("the state is not of a SPANet: a weight has too few dimensions") from None
    model.load_state_dict(state)
    return model


def published_state(model: SPANet) -> dict[str, Tensor]:
    """The state dict as the published code has it for 224 x 224 images: with masks (1, h, w), h = w = 56, 28, 14 and 7."""
    state = model.state_dict()
    for info in model.feature_info:
        for name, layer in model.get_submodule(info["module"]).named_modules(prefix=info["module"]):
            if isinstance(layer, SPAM):
                size = 224 // info["reduction"]
                state |= {f"{name}.{key}": value for key, value in layer.published_state(size, size).items()}
                state.pop(f"{name}.lams", None)
    return state


def save_checkpoint(model: nn.Module, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write the SPANet of a module: to *.safetensors its own state, to any other name the published one, flat, masks included.

    metadata: of a *.safetensors; the published layout has none.

    Raises:
        ValueError: the published layout has no such form; OSError: the file could not be written.
    """
    model = backbone_of(model)
    if Path(path).suffix == ".safetensors":
        return write_weights(Path(path), model.state_dict(), metadata)
    with as_value_error(f"{path}: the published layout has no such form, *.safetensors has"):
        state = published_state(model)
    with replacing(Path(path)) as file:
        torch.save(state, file)
