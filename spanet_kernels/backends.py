"""Which implementation serves which operator on which device, and why not the others.

Importing this module loads the compiled operators and fills the dispatcher's empty slots, once:

    CPU      operator by operator: _cpu.so, else composed of these and of matrix products, else the reference
    CUDA     operator by operator: _cuda.so, else the Triton kernels (what the library lacks, AMD), else the modes in PyTorch
    others   the modes in PyTorch
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import composed, reference

OPERATORS = (
    "radial_filter",
    "radial_filter_backward",
    "mode_coefficients",
    "axial_conv",
    "axial_conv_backward",
    "spectral_gate",
    "spectral_gate_backward",
    "spectral_mixer",
    "spectral_mixer_backward",
    "mixer_branch",
    "mixer_branch_backward",
    "outer_sum",
    "gelu",
    "column_sums",
    "image_norm",
    "image_norm_backward",
    "image_moments",
    "branch_norm",
    "branch_norm_backward",
    "branch_sum",
    "pointwise_pair",
    "pointwise_mlp_backward",
)
_FOLDER = Path(__file__).parent
_library = torch.library.Library("spanet_kernels", "IMPL")


def _load(name: str) -> str | None:
    """Load a library of compiled operators; returns why it is not there, or None."""
    path = _FOLDER / f"{name}.so"
    if not path.exists():
        return f"{name}.so was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{name}.so does not load: {error}"
    return None


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def _triton(op: str) -> Callable[..., Any]:
    @functools.cache
    def launcher() -> Callable[..., Any]:
        # triton is imported by the first call, not by the package
        found: Callable[..., Any] = getattr(importlib.import_module(f"spanet_kernels.triton_kernels.{_IN_TRITON[op]}"), op)
        return found

    return lambda *args: launcher()(*args)


_BY_MODES = {
    "radial_filter": reference.radial_filter_modes,
    "radial_filter_backward": reference.radial_filter_modes_backward,
    "spectral_gate": composed.spectral_gate,
    "spectral_gate_backward": composed.spectral_gate_backward,
    "spectral_mixer": composed.spectral_mixer,
    "spectral_mixer_backward": composed.spectral_mixer_backward,
    "mixer_branch": functools.partial(reference.mixer_branch, mixer=composed.mixer_in_parts),
    "mixer_branch_backward": functools.partial(reference.mixer_branch_backward, gradients=composed.gradients_in_parts),
}
# the operators that Triton has, and the file of each
_IN_TRITON = {
    "radial_filter": "radial_filter",
    "radial_filter_backward": "radial_filter",
    "spectral_gate": "spectral_gate",
    "spectral_gate_backward": "spectral_gate",
    "gelu": "gelu",
    "column_sums": "column_sums",
    "image_moments": "image_moments",
    "pointwise_pair": "pointwise_pair",
    "image_norm": "image_norm",
    "image_norm_backward": "image_norm",
}


def _implementations(op: str) -> dict[str, Callable[..., Any]]:
    found = {"reference": getattr(reference, op), "modes": _BY_MODES.get(op, getattr(reference, op))}
    return found | ({"triton": _triton(op)} if op in _IN_TRITON else {})


_cpu_missing = _load("_cpu")
if _cpu_missing:
    raise ImportError(f"spanet_kernels: {_cpu_missing}; install the package with `pip install .`, or run `make build` in a checkout")
_cuda_missing = _load("_cuda")
_triton_why_not = _triton_missing()


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"spanet_kernels::{op}", key)


_IN_CUDA = tuple(op for op in OPERATORS if _has_kernel(op, "CUDA"))


def _on_cuda(op: str) -> str:
    """What serves the operator on CUDA devices."""
    return "cuda" if op in _IN_CUDA else "triton" if op in _IN_TRITON and not _triton_why_not else "modes"


for _op in OPERATORS:
    _library.impl(_op, _implementations(_op)["modes"], "CompositeExplicitAutograd")
    if _on_cuda(_op) == "triton":
        _library.impl(_op, _triton(_op), "CUDA")


@contextlib.contextmanager
def use(implementation: str) -> Iterator[None]:
    """Force one implementation of every operator, for tests and benchmarks; the whole process is switched, not a thread.

    implementation: "reference" (torch.fft as the paper has it) or "modes" (plain PyTorch), on the CPU and on GPUs, or "triton" (GPUs;
    an operator that Triton does not have stays as it is).
    Raises ValueError for another name.
    """
    if implementation not in ("reference", "modes", "triton"):
        raise ValueError(f"use: implementation must be 'reference', 'modes' or 'triton', got {implementation!r}")
    override = torch.library.Library("spanet_kernels", "IMPL")
    try:
        for op in OPERATORS:
            if implementation in _implementations(op):
                for key in ("CUDA",) if implementation == "triton" else ("CPU", "CUDA"):
                    override.impl(op, _implementations(op)[implementation], key, allow_override=True)
        yield
    finally:
        override._destroy()


def backends() -> dict[str, Any]:
    """Versions, devices, and for every operator and device the implementation in use and the reason for each that is not."""
    from . import __version__, _native

    capability = _native.cpu_capability()
    cuda = torch.cuda.is_available()
    no_gpu = None if cuda else "no GPU is visible to torch"

    def on_cuda(op: str) -> dict[str, Any]:
        in_use = _on_cuda(op)
        reasons = {
            "cuda": _cuda_missing or (None if op in _IN_CUDA else "the CUDA library does not have it"),
            "triton": _triton_why_not or (None if op in _IN_TRITON else "there is no Triton kernel of it"),
            "modes": None,
        }
        not_in_use = {k: why or no_gpu or f"{in_use} comes first" for k, why in reasons.items() if not cuda or k != in_use}
        return {"in use": in_use if cuda else None, "not in use": not_in_use}

    return {
        "versions": {
            "spanet_kernels": __version__,
            "torch": torch.__version__,
            "triton": None if _triton_why_not else importlib.metadata.version("triton"),
            "python": platform.python_version(),
            "built with": _native.build_info(),
        },
        "devices": {
            "cpu": {"capability": capability, "threads": torch.get_num_threads(), "forced": os.environ.get("SPANET_KERNELS_CPU")},
            "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        },
        "operators": {
            op: {
                "cpu": {"in use": f"C++ ({capability})", "not in use": {"modes": "C++ comes first"}}
                if _has_kernel(op, "CPU")
                else {"in use": "composed" if op in _BY_MODES else "reference", "not in use": {}},
                "cuda": on_cuda(op),
                "other": {"in use": "modes", "not in use": {}},
            }
            for op in OPERATORS
        },
    }
