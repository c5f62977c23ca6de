"""Every GPU kernel once, in every dtype, layout and direction: what the sanitizers of `make gpu` run.

python tests/gpu_launches.py [cuda] [triton] [float64] [float32] [bfloat16] [float16]    all without a name
"""

from __future__ import annotations

import contextlib
import itertools
import sys

import torch

import spanet_kernels
from spanet_kernels import modes
from spanet_kernels.testing import DTYPES, make_input, make_profile

LAYOUTS = ("contiguous", "channels_last", "sliced", "offset")
# one shape for each plan: several planes in a block, odd and unaligned ones, one that is sliced, one beyond shared memory
SHAPES = (((9, 33, 7, 7), 1), ((2, 65, 14, 14), 1), ((2, 40, 56, 56), 2), ((1, 3, 25, 42), 2), ((1, 2, 200, 334), 2), ((1, 3, 20, 24), 9))


def launch_all(dtypes: list[torch.dtype]) -> int:
    launches = 0
    for (shape, radius), dtype, layout in itertools.product(SHAPES, dtypes, LAYOUTS):
        x, grad = make_input(shape, dtype, layout, "cuda"), make_input(shape, dtype, layout, "cuda", seed=1)
        grad.mul_(1 / 64)  # its sums over a batch stay below 65504
        base, gain = make_profile(shape[1], radius, dtype, "cuda")
        squared = modes.squared_radius(radius)
        y = torch.ops.spanet_kernels.radial_filter(x, base, gain, squared)
        grads = torch.ops.spanet_kernels.radial_filter_backward(grad, x, squared)
        coefficients = torch.ops.spanet_kernels.mode_coefficients(x, squared)
        weight = make_input((1, 1, shape[1], shape[1]), dtype, device="cuda", seed=2)[0, 0] / shape[1]
        results = [y, *grads, coefficients]
        if dtype.itemsize == 2:  # what is composed of PyTorch's operators has no kernel of ours
            gate = x, None, weight, weight[0], base, gain, squared
            results += [torch.ops.spanet_kernels.spectral_gate(*gate)]
            results += torch.ops.spanet_kernels.spectral_gate_backward(grad, *gate, True)
            dense, out = x.contiguous(memory_format=torch.channels_last), torch.empty_like(x, memory_format=torch.channels_last)
            moments = torch.ops.spanet_kernels.image_moments(dense, 1e-5)
            norm = moments, weight[0], weight[0]
            torch.ops.spanet_kernels.pointwise_pair(out, dense, *norm, None, dense, weight[0], weight, weight[0], weight, weight[0])
            results.append(out)
        y, moments = torch.ops.spanet_kernels.image_norm(x, base, base, 1e-5)
        norms = y, *torch.ops.spanet_kernels.image_norm_backward(grad, x, moments, base)
        hidden = x.permute(0, 2, 3, 1).reshape(-1, shape[1])
        results += [*norms, *torch.ops.spanet_kernels.gelu(hidden, None, hidden.clone()), torch.ops.spanet_kernels.column_sums(hidden)]
        for size in (7, 11):  # compiled for its taps, and any
            weights = [torch.ones(shape[1], n, device="cuda", dtype=base.dtype).squeeze(1) / n for n in (size, 1, size, 1)]
            results += torch.ops.spanet_kernels.axial_conv(x, *weights, squared)
            results += torch.ops.spanet_kernels.axial_conv_backward(grad, x, *weights[:3])
        launches += len(results)
        assert all(result.isfinite().all() for result in results)
    return launches


if __name__ == "__main__":
    chosen = [dtype for dtype in DTYPES if str(dtype).removeprefix("torch.") in sys.argv] or list(DTYPES)
    for implementation in [name for name in ("cuda", "triton") if name in sys.argv] or ("cuda", "triton"):
        with spanet_kernels.use("triton") if implementation == "triton" else contextlib.nullcontext():
            print(implementation, launch_all(chosen), "results")
