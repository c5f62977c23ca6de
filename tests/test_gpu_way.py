"""The way of a block through the operators on a GPU, with fake CUDA tensors: no GPU is needed, and no kernel runs."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("timm")
from spanet.model import Block
from spanet_kernels import composed, modes, pointwise_mlp, spectral_mixer
from spanet_kernels.ops.radial_filter import _fft_pays

# what is kept of shapes and constants for a device would be fake afterwards
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the real thing is tested")

SHAPE = (4, 64, 28, 28)
COPIES = ("copy_", "clone", "_to_copy")


class Log(TorchDispatchMode):
    """Counts our operators, and the copies of tensors as large as an image."""

    def __init__(self):
        super().__init__()
        self.ours, self.copies, self.casts = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name, *_ = str(function).split(".")
        if namespace == "spanet_kernels":
            self.ours[name] += 1
        elif name in ("_foreach_copy_", "_to_copy"):
            self.casts[name] += 1
        if name in COPIES and any(isinstance(arg, torch.Tensor) and arg.numel() >= math.prod(SHAPE[1:]) for arg in args):
            self.copies[name] += 1
        return function(*args, **(kwargs or {}))


def image(dtype):
    return torch.empty(SHAPE, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)


def to_gpu(block, mode, dtype):
    for module in block.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = torch.nn.Parameter(mode.from_tensor(parameter.detach().to(dtype)).to("cuda"))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_inference_in_16_bits_is_our_kernels_alone(compiled):
    """Norms in front and residuals behind are part of the products; nothing as large as an image is copied."""
    block, mode, graph = Block(64, 0.0, True, {}), FakeTensorMode(allow_non_fake_inputs=True), Counter()

    def backend(module, _):
        graph.update(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    with mode, torch.no_grad():
        to_gpu(block, mode, torch.bfloat16)
        x = image(torch.bfloat16)
        if compiled:
            y = torch.compile(block, fullgraph=True, backend=backend)(x)
            found = Counter({name.split(".")[1]: count for name, count in graph.items() if name.startswith("spanet_kernels.")})
            assert not any("group_norm" in name or "contiguous" in name for name in graph)
        else:
            with Log() as log:
                y = block(x)
            found = log.ours
            assert not log.copies
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert found == {"image_moments": 2, "pointwise_pair": 3, "axial_conv": 1, "spectral_gate": 1}


@pytest.mark.parametrize(
    ("dtype", "gate"), [(torch.bfloat16, "spectral_gate_backward"), (torch.float32, "radial_filter_backward")], ids=["bf16", "fp32"]
)
def test_training_copies_no_image(dtype, gate):
    """The mixer's gradients: in 16 bits by the fused gate, in fp32 by products of the library."""
    with FakeTensorMode(), torch.no_grad():
        x = image(dtype)
        weight, vector = torch.empty(64, 64, device="cuda", dtype=dtype), torch.empty(64, device="cuda", dtype=dtype)
        taps, wide, gain = (torch.empty(size, device="cuda") for size in ((64, 7), 64, (4, 64)))
        args = weight, vector, taps, wide, taps, wide, weight, vector, wide, gain, weight, vector
        with Log() as log:
            out, *kept = composed.spectral_mixer(x, *args, 4, True)
            grads = composed.spectral_mixer_backward(out, x, *kept, *(arg for i, arg in enumerate(args) if i not in (1, 11)), 4, True)
        assert [grad.shape for grad in grads] == [x.shape, *(arg.shape for arg in args)]
        assert grads[0].is_contiguous(memory_format=torch.channels_last)
    assert log.ours[gate] == 1
    assert not log.copies


def test_weights_in_fp32_are_cast_in_one_launch():
    """And the gradients of those that were, from 16 bits; biases are summed in fp32, which theirs stay."""
    with FakeTensorMode(), torch.no_grad():
        x, weight, vector = image(torch.bfloat16), torch.empty(64, 64, device="cuda"), torch.empty(64, device="cuda")
        taps, gain = torch.empty(64, 7, device="cuda"), torch.empty(4, 64, device="cuda")
        args = weight, vector, taps, vector, taps, vector, weight, vector, vector, gain, weight, vector
        with Log() as forward:
            out, *kept = composed.spectral_mixer(x, *args, 4, True)
        with Log() as backward:
            grads = composed.spectral_mixer_backward(out, x, *kept, *(arg for i, arg in enumerate(args) if i not in (1, 11)), 4, True)
        assert [grad.dtype for grad in grads] == [x.dtype, *[torch.float32] * 12]
    assert forward.casts == {"_foreach_copy_": 1}
    assert backward.casts["_foreach_copy_"] == 2


@pytest.mark.parametrize("radius_squared", [-1, 20])
def test_the_gate_without_a_kernel_of_its_own_has_the_gradients_of_its_inputs(radius_squared):
    """Their shapes and dtypes, where a disc has too many modes, or none, for the fused gate."""
    with FakeTensorMode(), torch.no_grad():
        z, weight, vector = image(torch.bfloat16), *(torch.empty(size, device="cuda", dtype=torch.bfloat16) for size in ((64, 64), 64))
        base, gain = torch.empty(64, device="cuda"), torch.empty(len(modes.shells(radius_squared)), 64, device="cuda")
        grads = composed.spectral_gate_backward(z, z, None, weight, vector, base, gain, radius_squared, True)
        assert [(grad.shape, grad.dtype) for grad in grads] == [(given.shape, given.dtype) for given in (z, weight, vector, base, gain)]


def test_a_training_step_records_one_function_for_a_branch():
    """Norm, body and residual; nothing as large as an image is copied."""
    block, mode = Block(64, 0.0, True, {}), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        to_gpu(block, mode, torch.bfloat16)
        x = image(torch.bfloat16).requires_grad_()
        with Log() as log:
            y = block(x)
        second = y.grad_fn
        first = second.next_functions[0][0]
        assert first.next_functions[0][0].variable is x
        assert {first.name(), second.name()} == {"_RecordedBackward"}
    assert log.ours["image_norm"] == 2
    assert not log.copies


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_gradients_of_a_branch(monkeypatch, normed, scaled, dropped):
    """By the way of a GPU, on a CPU in float64: to everything, of first and second order."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    x, residual, scale, norm = draw(2, 3, 4, 5), draw(2, 3, 4, 5), draw(3), (draw(3), draw(3))
    mixer = draw(3, 3), None, draw(3, 1, 1, 3), draw(3), draw(3, 1, 3, 1), draw(3), draw(3, 3), draw(3), draw(3), draw(2, 3)
    mlp = draw(4, 3, 1, 1), draw(4), draw(3, 4, 1, 1), None
    around = residual, scale if scaled else None, (*norm, 1e-5) if normed else None
    drop_path = (torch.tensor([0.0, 1.0]).double(), 1.5) if dropped else None
    inputs = x, residual, *((scale,) if scaled else ()), *(norm if normed else ())

    def mixed(*_):
        return spectral_mixer(x, *mixer, 1.0, mixer[0], None, *around, drop_path)

    def hidden(*_):
        return pointwise_mlp(x, *mlp, *around, drop_path=drop_path)

    for function, weights in ((mixed, mixer), (hidden, mlp)):
        given = (*inputs, *(weight for weight in weights if weight is not None))
        assert function().grad_fn.name() == "_RecordedBackward"
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given, atol=1e-4)


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_gradient_of_a_residual_alone(monkeypatch, create_graph):
    """Of a branch that is frozen, without what it computes."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    x, residual, weight = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(3, 3, 1, 1)
    y = pointwise_mlp(x, weight, None, weight, None, residual)
    (grad,) = torch.autograd.grad(y.sum(), residual, create_graph=create_graph)
    assert torch.equal(grad, torch.ones_like(x))


def test_planes_in_parts_leave_many_functions_to_ffts():
    with FakeTensorMode():
        small, large = (torch.empty(2, 3, *size, device="cuda") for size in ((56, 56), (200, 334)))
    assert [_fft_pays(small, radius**2) for radius in (1, 2, 3, 4, 5)] == [False, False, False, False, True]
    assert [_fft_pays(large, radius**2) for radius in (1, 2, 3, 4, 5)] == [False, False, True, True, True]
