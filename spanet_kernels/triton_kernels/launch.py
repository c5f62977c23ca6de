"""Launches of Triton kernels on the device of their tensors.

Triton reads the type, the alignment and the divisibility of every argument of every launch to find the compiled kernel, and asks the
driver about every pointer, which takes the host longer than most of these kernels take a GPU. Here a launch is a key to what Triton
found for it the first time, which is given the addresses of the tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from triton import JITFunction, knobs
from triton.runtime import driver

# of every kernel; with 255 registers allowed, ptxas does not spill a few bytes to fit one more block on a multiprocessor
OPTIONS: dict[str, Any] = dict(enable_fp_fusion=True) if torch.version.hip else dict(enable_fp_fusion=True, maxnreg=255)
MOST = 4096  # launches that are remembered

_PLAIN = frozenset((int, float, type(None)))  # arguments that are no tensors; isinstance of a tensor takes half a microsecond
_known: dict[tuple[Any, ...], tuple[Any, tuple[int, ...], tuple[Any, ...]]] = {}  # compiled, its grid and compile-time arguments


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
    if not isinstance(kernel, JITFunction) or torch.version.hip:
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **options, **OPTIONS)
    elif args[0].get_device() == driver.active.get_current_device():
        _launch(kernel, grid, args, options)
    else:
        with torch.cuda.device_of(args[0]):
            _launch(kernel, grid, args, options)


def _launch(kernel: JITFunction[Any], grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """On the current device."""
    key, given = [kernel.fn, grid, *options.values()], []
    for arg in args:
        if type(arg) in _PLAIN:
            key.append(arg)
            given.append(arg)
        else:
            address = arg.data_ptr()
            key += arg.dtype, arg.get_device(), address % 16 == 0
            given.append(address)
    known = _known.get(tuple(key))
    if known is None:
        compiled = kernel[grid](*args, **options, **OPTIONS)
        if len(_known) >= MOST:
            _known.clear()
        _known[tuple(key)] = compiled, (*grid, 1, 1)[:3], tuple(options[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, whole_grid, constants = known
    if _is_watched():
        compiled[whole_grid](*args, *constants)
        return
    stream = driver.active.get_current_stream(driver.active.get_current_device())
    compiled.run(*whole_grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *given, *constants)


def _is_watched() -> bool:
    """Whether a profiler has hooks on launches, which read the arguments."""
    return bool(_calls(knobs.runtime.launch_enter_hook) or _calls(knobs.runtime.launch_exit_hook))


def _calls(hook: Any) -> Any:
    """What a chain of hooks calls; a hook that stands in place of the chain, or None, is itself."""
    return getattr(hook, "calls", hook)
