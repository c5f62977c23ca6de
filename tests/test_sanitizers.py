"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: every dtype, layout and instruction set."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = """
import itertools, torch
from spanet_kernels import modes
from spanet_kernels.testing import CASES, DTYPES, LAYOUTS, make_input
for ((shape, radius), dtype, layout) in itertools.product(CASES["radial_filter"].test, DTYPES, LAYOUTS):
    x, base, gain, _ = CASES["radial_filter"].sample(shape, radius, dtype, layout)
    squared = modes.squared_radius(radius)
    y = torch.ops.spanet_kernels.radial_filter(x, base, gain, squared)
    grads = torch.ops.spanet_kernels.radial_filter_backward(make_input(shape, dtype, layout, seed=1), x, squared)
    z = torch.ops.spanet_kernels.mode_coefficients(x, squared)
    assert all(t.isfinite().all() for t in (y, *grads, z))
for ((shape, setting), dtype, layout) in itertools.product(CASES["axial_conv"].test, DTYPES, LAYOUTS[:3]):
    x, row, row_bias, column, column_bias, radius = CASES["axial_conv"].sample(shape, setting, dtype, layout)
    squared = -1 if radius is None else modes.squared_radius(radius)
    row, column = row.flatten(1), column.flatten(1)
    outputs = torch.ops.spanet_kernels.axial_conv(x, row, row_bias, column, column_bias, squared)
    grads = torch.ops.spanet_kernels.axial_conv_backward(make_input(shape, dtype, layout, seed=1), x, row, row_bias, column)
    assert all(t.isfinite().all() for t in (*outputs, *grads))
for (shape, dtype, layout) in itertools.product(((2, 3, 33, 130), (1, 17, 131, 70), (1, 2, 3, 400)), DTYPES, LAYOUTS):  # by FFT
    x, wide = make_input(shape, dtype, layout), modes.profile_dtype(dtype)
    base, gain = torch.ones(shape[1], dtype=wide), torch.ones(len(modes.shells(4900)), shape[1], dtype=wide)
    y = torch.ops.spanet_kernels.radial_filter(x, base, gain, 4900)
    assert all(t.isfinite().all() for t in (y, *torch.ops.spanet_kernels.radial_filter_backward(y, x, 4900)))
big = torch.randn(5, 48, 180, 180)  # large enough to be streamed past the caches
for x in (big, big.contiguous(memory_format=torch.channels_last)):
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.ops.spanet_kernels.radial_filter(x.to(dtype), torch.ones(48), torch.ones(4, 48), 4).isfinite().all()
for dtype, layout, last, factor in itertools.product((torch.float32, torch.bfloat16), LAYOUTS[:2], (False, True), (False, True)):
    for (b, c, h, w), hidden, out in (((1, 32, 1, 1), 32, 32), ((2, 64, 7, 9), 288, 32), ((1, 32, 17, 19), 64, 96)):
        x, f = (make_input((b, channels, h, w), dtype, layout) for channels in (c, hidden))
        weights = torch.randn(hidden, c, dtype=dtype), None, torch.randn(out, hidden, dtype=dtype), torch.randn(out, dtype=dtype)
        y = make_input((b, out, h, w), dtype, LAYOUTS[last])
        f, r = (f, None) if factor else (None, y.clone())
        norm = (None, None) if factor else torch.randn(2, c, dtype=dtype)
        moments = None if factor else torch.ops.spanet_kernels.image_moments(x, 1e-5)
        torch.ops.spanet_kernels.pointwise_pair(y, x, moments, *norm, f, r, None, *weights)
        if not factor:
            before = torch.empty(b, hidden, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
            torch.ops.spanet_kernels.pointwise_pair(y, x, moments, *norm, f, r, None, *weights, before)
            grads = torch.empty_like(x), torch.empty_like(before)
            torch.ops.spanet_kernels.pointwise_mlp_backward(*grads, y, before, weights[0], weights[2])
            assert all(t.isfinite().all() for t in (before, *grads))
        assert y.isfinite().all()
for dtype, layout in itertools.product((torch.float32, torch.bfloat16), LAYOUTS[:2]):
    for shape in ((1, 32, 1, 1), (3, 64, 66, 65)):  # of the second two images at a time, and the last alone
        x, c = make_input(shape, dtype, layout), shape[1]
        norm = torch.ones(c, dtype=dtype), torch.zeros(c, dtype=dtype), 1e-5
        square, vector = torch.randn(c, c, dtype=dtype), torch.randn(c, dtype=dtype)
        taps = (torch.randn(c, 7), torch.randn(c)) * 2
        for kept in ((None, None), [torch.empty_like(x, memory_format=torch.channels_last) for _ in range(2)]):
            y, profile = torch.empty_like(x), (torch.ones(c), torch.ones(4, c))
            weights = square, vector, *taps, square, vector, *profile, square, vector
            added = torch.ops.spanet_kernels.mixer_branch(y, *kept, x, *norm, x, vector, *weights, 4)
            assert y.isfinite().all()
        weights = square, *taps, square, vector, *profile, square
        grads = torch.ops.spanet_kernels.mixer_branch_backward(y, x, x, *kept, added, *weights, 4, True)
        assert all(g.isfinite().all() for g in (y, *grads))
for (of_x, of_n), layout in itertools.product(((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)), LAYOUTS[:2]):
    for shape in ((2, 3, 1, 1), (2, 37, 9, 11), (1, 64, 17, 16)):
        x, n = make_input(shape, of_x, layout), make_input(shape, of_n, layout)
        weight, bias, scale = torch.randn(3, shape[1])
        moments, y = torch.ops.spanet_kernels.image_moments(x, 1e-5), torch.empty_like(x)
        torch.ops.spanet_kernels.branch_norm(n, x, moments, weight, bias)
        grads = torch.ops.spanet_kernels.branch_norm_backward(y, n, x, moments, weight, x, scale)
        assert all(t.isfinite().all() for t in (n, y, *grads))
        torch.ops.spanet_kernels.branch_sum(y, n, x, scale)
        assert y.isfinite().all()
for dtype, (n, d) in itertools.product(DTYPES, ((1, 1), (65, 37), (130, 64))):
    h, bias, grad = (torch.randn(shape, dtype=dtype) for shape in ((n, d), d, (n, d)))
    for given in (None, grad):
        assert all(t.isfinite().all() for t in torch.ops.spanet_kernels.gelu(h, bias, given))
    if dtype in (torch.float32, torch.bfloat16):
        for factor, gelu in ((None, True), (grad, False)):
            torch.ops.spanet_kernels.outer_sum(h, factor, torch.randn(n, 35).to(dtype)[:, 1:], None, gelu)
print("done")
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A copy of the package whose CPU library is built with both sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    shutil.copytree(ROOT / "spanet_kernels", folder / "spanet_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for native in (ROOT / "spanet_kernels").glob("_native*.so"):
        shutil.copy(native, folder / "spanet_kernels")
    compiler = os.environ.get("CXX", "g++")
    torch_folder = Path(torch.__file__).parent
    flags = ["-O0", "-g1", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
    # checks are many, so what the kernels inline everywhere is called here: half the compilation
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Dalways_inline=unused"]
    include = [
        "-I",
        str(ROOT / "csrc"),
        "-I",
        str(torch_folder / "include"),
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DTORCH_STABLE_ONLY",
    ]
    simd = {"plain": ["-DSIMD_NAME=plain", "-DSIMD_BYTES=16"]}
    if platform.machine() == "x86_64":
        simd["avx2"] = ["-DSIMD_NAME=avx2", "-DSIMD_BYTES=32", "-mavx2", "-mfma", "-mf16c"]
        avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
        simd["avx512"] = ["-DSIMD_NAME=avx512", "-DSIMD_BYTES=64", *avx512]
    jobs = [("library", ROOT / "csrc/library.cpp", [])]
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):  # kernels once per instruction set
        sets = simd if source.stem.endswith("_kernel") else {"once": []}
        jobs += [(f"{source.stem}_{name}", source, options) for name, options in sets.items()]

    def compile_job(job):
        name, source, options = job
        command = [compiler, *flags, *include, *options, "-c", str(source), "-o", str(folder / f"{name}.o")]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_job, jobs))
    link = [compiler, "-shared", "-fsanitize=address,undefined", *(str(folder / f"{name}.o") for name, *_ in jobs)]
    link += ["-o", str(folder / "spanet_kernels/_cpu.so"), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    subprocess.run(link, check=True)
    return folder


@pytest.mark.parametrize("capability", ["plain", "avx2", "avx512", "avx512_bf16", "amx"])
def test_clean_under_asan_and_ubsan(sanitized, capability):
    runtimes = [
        subprocess.run([os.environ.get("CXX", "g++"), f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    env = dict(
        os.environ, LD_PRELOAD=":".join(runtimes), ASAN_OPTIONS="detect_leaks=0", SPANET_KERNELS_CPU=capability, PYTHONPATH=str(sanitized)
    )
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=sanitized, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip() == "done"
