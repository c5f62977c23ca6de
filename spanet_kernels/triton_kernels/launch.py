"""Launches of Triton kernels on the device of their tensors.

Triton reads the type, the alignment and the divisibility of every argument of every launch to find the compiled kernel, which takes the
host longer than most of these kernels take a GPU. Here a launch is a key to what Triton found for it the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton import JITFunction

# of every kernel; with 255 registers allowed, ptxas does not spill a few bytes to fit one more block on a multiprocessor
OPTIONS: dict[str, Any] = dict(enable_fp_fusion=True) if torch.version.hip else dict(enable_fp_fusion=True, maxnreg=255)
MOST = 4096  # launches that are remembered

_PLAIN = frozenset((int, float, type(None)))  # arguments that are no tensors; isinstance of a tensor takes half a microsecond
_known: dict[tuple[Any, ...], tuple[Callable[..., None], tuple[Any, ...]]] = {}  # what launches, and the compile-time arguments


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv takes seven microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two from n on, like triton.next_power_of_2."""
    return 1 << max(n - 1, 0).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options): the first argument a tensor, the compile-time ones by name, in the same order at every call.

    ROCm's kernels depend on the sizes of tensors too, and the interpreter compiles nothing: there Triton launches.
    """
    with torch.cuda.device_of(args[0]):
        if not isinstance(kernel, JITFunction) or torch.version.hip:
            kernel[grid](*args, **options, **OPTIONS)
            return
        key = [kernel.fn, grid, args[0].get_device(), *options.values()]
        for arg in args:
            key.append(arg if type(arg) in _PLAIN else (arg.dtype, arg.data_ptr() % 16 == 0))
        known = _known.get(tuple(key))
        if known:
            run, constants = known
            run(*args, *constants)
            return
        compiled = kernel[grid](*args, **options, **OPTIONS)
        if len(_known) >= MOST:
            _known.clear()
        _known[tuple(key)] = compiled[(*grid, 1, 1)[:3]], tuple(options[name] for name in kernel.arg_names[len(args) :])
