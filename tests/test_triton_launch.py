"""`launch` against Triton's own launches, with a driver that records in place of a GPU: the same kernel with the same arguments."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.knobs import HookChain
from triton.runtime.jit import JITFunction

from spanet_kernels.triton_kernels import launch as module
from spanet_kernels.triton_kernels.column_sums import _sums_kernel
from spanet_kernels.triton_kernels.launch import OPTIONS, cdiv, launch, next_power_of_2

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU its driver is the one that counts")


class Driver:
    """Compiles for sm_90, loads nothing, and keeps what is launched: grid, machine code, arguments and hooks."""

    def __init__(self):
        self.launches = []
        self.utils = self
        self.unload_module = lambda module: None
        self.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_properties = lambda device: {"max_shared_mem": 232448}

    def load_binary(self, name, binary, shared, device):
        return "module", hash(binary), 32, 0, 1024

    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, packed, about, before, after, *args):
            self.launches.append(((x, y, z), function, args, (before, after)))

        return run


class Elsewhere(torch.Tensor):
    """Of a GPU that is not there."""

    def get_device(self):
        return 1


@pytest.fixture(scope="module")
def only_driver():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", Driver())
        yield triton.runtime.driver.active


@pytest.fixture
def driver(only_driver, monkeypatch):
    """With nothing launched and nothing remembered; a compiled kernel stays with the driver that loaded it."""
    monkeypatch.setattr(module, "_known", {})
    only_driver.launches.clear()
    return only_driver


def launches():
    """Of matrices whose dtype, alignment, size or number of programs differ: compiled kernels differ by all but the last."""
    storage = torch.zeros(20000)
    for dtype, offset, (rows, columns), programs in itertools.product(
        (torch.float32, torch.bfloat16), (0, 1), ((128, 32), (100, 33), (1, 32)), (1, 2)
    ):
        x = storage.to(dtype)[offset : offset + rows * columns].view(rows, columns)
        yield (programs, cdiv(columns, 16)), (x, storage, rows, columns, 64), dict(BR=64, BC=16, V=1, num_warps=4)


def same(left, right):
    """As a kernel has them: of tensors their addresses."""
    return addressed(left) == addressed(right)


def addressed(launch):
    return *launch[:2], [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in launch[2]]


def test_a_remembered_launch_is_tritons(driver, monkeypatch):
    cases = list(launches())
    for grid, args, options in cases:
        _sums_kernel[grid](*args, **options, **OPTIONS)
    for grid, args, options in cases:
        launch(_sums_kernel, grid, *args, **options)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: pytest.fail("Triton was asked again"))
    for grid, args, options in cases:
        launch(_sums_kernel, grid, *args, **options)
    count = len(cases)
    theirs, first, again = (driver.launches[i * count : (i + 1) * count] for i in range(3))
    assert len(driver.launches) == 3 * count
    assert all(map(same, theirs, first))
    assert all(map(same, theirs, again))
    assert len({function for _, function, *_ in theirs}) >= 6  # the cases tell kernels apart


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_the_launches(driver, monkeypatch, hook):
    """Those of a profiler, whose kernels may not be launched past them."""
    x, chain = torch.zeros(64, 32), HookChain()
    monkeypatch.setattr(triton.knobs.runtime, hook, chain)
    for watches in (False, False, True, False):
        chain.calls = [print] if watches else []
        launch(_sums_kernel, (1, 2), x, x, 64, 32, 64, BR=64, BC=16, V=1, num_warps=4)
    hooks = [launched[3][hook == "launch_exit_hook"] for launched in driver.launches]
    assert hooks == [chain, None, chain, None]
    assert len({launched[:2] for launched in driver.launches}) == 1


def test_a_tensor_of_another_device_is_tritons_to_refuse(driver):
    """Addresses say nothing of the device, so it is part of what is remembered."""
    x, elsewhere = torch.zeros(64, 32), Elsewhere(torch.zeros(64, 32))
    for out in (x, x, elsewhere):
        launch(_sums_kernel, (1, 2), x, out, 64, 32, 64, BR=64, BC=16, V=1, num_warps=4)
    assert driver.launches[1][2][1] == x.data_ptr()
    assert driver.launches[2][2][1] is elsewhere


def test_remembered_launches_are_few(driver, monkeypatch):
    monkeypatch.setattr(module, "MOST", 3)
    x = torch.zeros(64, 32)
    for programs in range(1, 9):
        launch(_sums_kernel, (programs, 2), x, x, 64, 32, 64, BR=64, BC=16, V=1, num_warps=4)
        assert len(module._known) <= 3
    assert [grid for grid, *_ in driver.launches] == [(programs, 2, 1) for programs in range(1, 9)]


def test_sizes_are_tritons():
    assert all(cdiv(n, d) == triton.cdiv(n, d) for n in range(50) for d in (1, 2, 7, 64))
    assert all(next_power_of_2(n) == triton.next_power_of_2(n) for n in range(1, 300))
