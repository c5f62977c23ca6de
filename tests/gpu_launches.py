"""Every GPU kernel once, in every dtype, layout and direction: what the sanitizers of `make gpu` run.

python tests/gpu_launches.py [cuda] [triton]    both without a name
"""

from __future__ import annotations

import contextlib
import itertools
import sys

import torch

import spanet_kernels
from spanet_kernels import modes
from spanet_kernels.testing import DTYPES, LAYOUTS, make_input, make_profile

# one shape for each plan: several planes in a block, odd and unaligned ones, one that is sliced, one beyond shared memory
SHAPES = (((9, 33, 7, 7), 1), ((2, 65, 14, 14), 1), ((2, 40, 56, 56), 2), ((1, 3, 25, 42), 2), ((1, 2, 200, 334), 2), ((1, 3, 20, 24), 9))


def launch_all() -> int:
    launches = 0
    for (shape, radius), dtype, layout in itertools.product(SHAPES, DTYPES, LAYOUTS):
        x, grad = make_input(shape, dtype, layout, "cuda"), make_input(shape, dtype, layout, "cuda", seed=1)
        base, gain = make_profile(shape[1], radius, dtype, "cuda")
        squared = modes.squared_radius(radius)
        y = torch.ops.spanet_kernels.radial_filter(x, base, gain, squared)
        grads = torch.ops.spanet_kernels.radial_filter_backward(grad, x, squared)
        coefficients = torch.ops.spanet_kernels.mode_coefficients(x, squared)
        weight = make_input((1, 1, shape[1], shape[1]), dtype, device="cuda", seed=2)[0, 0] / shape[1]
        gate = x, None, weight, weight[0], base, gain, squared
        gated = torch.ops.spanet_kernels.spectral_gate(*gate), *torch.ops.spanet_kernels.spectral_gate_backward(grad, *gate, True)
        results = [y, *grads, coefficients, *gated]
        y, moments = torch.ops.spanet_kernels.image_norm(x, base, base, 1e-5)
        norms = y, *torch.ops.spanet_kernels.image_norm_backward(grad, x, moments, base)
        hidden = x.permute(0, 2, 3, 1).reshape(-1, shape[1])
        results += [*norms, *torch.ops.spanet_kernels.gelu(hidden, None, hidden.clone()), torch.ops.spanet_kernels.column_sums(hidden)]
        for size in (7, 11):  # compiled for its taps, and any
            weights = [torch.ones(shape[1], n, device="cuda", dtype=base.dtype).squeeze(1) / n for n in (size, 1, size, 1)]
            results += torch.ops.spanet_kernels.axial_conv(x, *weights, squared)
            results += torch.ops.spanet_kernels.axial_conv_backward(grad, x, *weights[:3])
        assert all(result.isfinite().all() for result in results)
        launches += 13
    return launches


if __name__ == "__main__":
    for implementation in sys.argv[1:] or ("cuda", "triton"):
        with spanet_kernels.use("triton") if implementation == "triton" else contextlib.nullcontext():
            print(implementation, launch_all(), "launches")
