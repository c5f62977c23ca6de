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

_known: dict[tuple[Any, ...], tuple[Any, tuple[int, ...], tuple[Any, ...]]] = {}  # compiled, its grid and compile-time arguments


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv takes seven microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two from n on, like triton.next_power_of_2."""
    return 1 << max(n - 1, 0).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options): tensors, or None, the first a tensor, then numbers, the first an int; the compile-time arguments by
    name, in the same order at every call.

    ROCm's kernels depend on the sizes of tensors too, and the interpreter compiles nothing: there Triton launches.
    """
    if not isinstance(kernel, JITFunction) or torch.version.hip:
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **options, **OPTIONS)
        return
    device, current = args[0].get_device(), driver.active
    if device == current.get_current_device():
        _launch(device, current, kernel, grid, args, options)
    else:
        with torch.cuda.device_of(args[0]):
            _launch(device, current, kernel, grid, args, options)


def _launch(
    device: int, current: Any, kernel: JITFunction[Any], grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """On the current device, by its driver."""
    key: list[Any] = [kernel.fn, device, grid, *options.values()]
    given: list[Any] = []
    addresses = 0
    for arg in args:
        if arg is None:
            key.append(None)
            given.append(None)
        elif type(arg) is int:  # and all that follow are numbers
            numbers = args[len(given) :]
            key.append(numbers)
            given += numbers
            break
        elif arg.get_device() == device:
            address = arg.data_ptr()
            addresses |= address
            key.append(arg.dtype)
            given.append(address)
        else:
            kernel[grid](*args, **options, **OPTIONS)  # Triton refuses it
            return
    if addresses % 16:  # not all are aligned
        key += [value is not None and value % 16 == 0 for value in given]
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
    stream = current.get_current_stream(device)
    compiled.run(*whole_grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *given, *constants)


def _is_watched() -> bool:
    """Whether a profiler has hooks on launches, which read the arguments."""
    return bool(_calls(knobs.runtime.launch_enter_hook) or _calls(knobs.runtime.launch_exit_hook))


def _calls(hook: Any) -> Any:
    """What a chain of hooks calls; a hook that stands in place of the chain, or None, is itself."""
    return getattr(hook, "calls", hook)
