"""How every operator of the package is called and differentiated.

An operator has kernels below autograd and an `autograd.Function`. torch.compile and torch.export see the operator, whose Autograd
kernel calls the function; eager code calls the function itself, which torch.func asks for and which saves trips through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..decompositions import call_in_graph

_library = torch.library.Library("spanet_kernels", "IMPL")


# this is what a call of an operator on a small tensor spends its time on: no look-ups that can be spared
_is_compiling, _is_inference, _is_recording = torch.compiler.is_compiling, torch.is_inference_mode_enabled, torch.is_grad_enabled
_is_transformed, _any_requires_grad = torch._C._are_functorch_transforms_active, torch._C._any_requires_grad
_tracing_state = torch._C._get_tracing_state
_casts = torch.is_autocast_enabled
below_autograd = torch._C._AutoDispatchBelowAutograd


def is_eager() -> bool:
    """Whether a call is neither compiled nor transformed nor differentiated forward."""
    return not (_is_compiling() or _is_transformed() or forward_ad._current_level >= 0)


def is_traced() -> bool:
    """Whether TorchScript traces the call: numbers are constants of its graph, so no size may decide how an operator goes about it."""
    return not _is_compiling() and _tracing_state() is not None


def infers(*args: Any) -> bool:
    """Whether no derivative may be asked of an eager or compiled call with these arguments."""
    if _is_compiling():
        differentiated = torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        return not differentiated and not torch.compiler.is_exporting()
    return is_eager() and not (_is_recording() and _any_requires_grad(*args))


def infers_plainly(x: Any) -> bool:
    """Whether a call on x is eager inference on a CPU with nothing around it: gradients are off, and so is autocast."""
    eager = is_eager() and not _is_recording() and _tracing_state() is None and not _casts("cpu")
    return eager and type(x) is Tensor and x.is_cpu


def call_below_autograd(operator: Any, *args: Any) -> Any:
    """Call the kernels below autograd."""
    with below_autograd():
        return operator(*args)


def register(operator: Any, function: Any, transformed: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Register vmap, and as the kernel of the Autograd keys: record the function where a derivative is wanted, else go below.

    transformed: what serves torch.func and forward mode, the function if None.

    Returns how eager code calls the operator.
    """
    call_operator, setup_context = operator._op, function.setup_context  # without the frame of `operator.__call__`

    def forward(ctx: Any, *args: Any) -> Any:
        with below_autograd():
            output = call_operator(*args)
        setup_context(ctx, args, output)
        return output

    # the same function with one forward that sets up its own context: without torch.func there is no need to inspect signatures
    no_setup = {"forward": staticmethod(forward), "setup_context": torch.autograd.function._SingleLevelFunction.setup_context}
    recorded: Any = type(function.__name__, (function,), no_setup)
    record, transformed = recorded.apply, transformed or function.apply

    def eager(*args: Any) -> Any:
        if forward_ad._current_level >= 0 or _is_transformed():
            return transformed(*args)
        if _tracing_state() is not None:
            return operator(*args)
        if _is_recording() and (args[0].requires_grad or _any_requires_grad(*args)):
            return record(*args)
        if _is_inference():  # is below autograd already
            return call_operator(*args)
        with below_autograd():
            return call_operator(*args)

    def kernel(*args: Any) -> Any:
        if _is_transformed():
            name = operator.name().partition(".")[0].replace("::", ".")
            raise RuntimeError(f"{operator}: call {name} under torch.func, in eager mode; the operator has no levels")
        return eager(*args)

    name = operator.name().partition(".")[0]
    _library.impl(name, kernel, "Autograd")
    torch.library.register_vmap(name, function.vmap)
    return eager


def one_by_one(operator: Any) -> Callable[..., Any]:
    """The vmap rule that calls the operator once for every member of the batch."""

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        def member(index: int) -> Any:
            return operator(*(arg if dim is None else arg.select(dim, index) for arg, dim in zip(args, in_dims, strict=True)))

        each = [member(index) for index in range(info.batch_size)]
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        outputs = tuple(torch.stack(output) for output in zip(*each, strict=True))
        return outputs, (0,) * len(outputs)

    return vmap


def gradients_in_graph(
    composition: Callable[..., Tensor], grad: Tensor, needed: Sequence[bool], args: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """Gradients of a differentiable composition to the args that need one, to be differentiated again."""
    # aliases in place of the arguments, so that each has a gradient of its own
    wanted = {index: args[index].view_as(args[index]) for index, need in enumerate(needed) if need and args[index] is not None}
    if not wanted:
        return (None,) * len(args)
    y = composition(*(wanted.get(index, arg) for index, arg in enumerate(args)))
    found = torch.autograd.grad(y, list(wanted.values()), grad, create_graph=True, allow_unused=True)
    by_index = dict(zip(wanted, found, strict=True))
    return tuple(by_index.get(index) for index in range(len(args)))


def _first(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def by_composition(operator: Any, gradient: Any, gradients: Callable[..., Any], composition: Callable[..., Any]) -> Callable[..., Any]:
    """A differentiable call of an operator whose first derivative is another operator.

    operator: its first output is differentiated, others are by-products.
    gradient: the operator of the first derivative.
    gradients: (gradient of the first output, which args need one, by-products, args) to one gradient, or None, for each of args;
        it calls `gradient`.
    composition: the outputs in differentiable PyTorch; it serves every further derivative, forward mode and torch.func.
    """

    class Composed(torch.autograd.Function):
        vmap = staticmethod(one_by_one(operator))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            by_products = output[1:] if isinstance(output, tuple) else ()
            ctx.others = [None if isinstance(arg, Tensor) else arg for arg in inputs]
            ctx.save_for_backward(*(arg if isinstance(arg, Tensor) else None for arg in inputs), *by_products)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*by_products)

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
            needed = ctx.needs_input_grad
            if grad is None:
                return (None,) * len(needed)
            kept = ctx.saved_tensors  # activation checkpointing hands them out once
            saved, by_products = kept[: len(needed)], kept[len(needed) :]
            args = [other if tensor is None else tensor for tensor, other in zip(saved, ctx.others, strict=True)]
            if not torch.is_grad_enabled():
                return tuple(gradients(grad, needed, by_products, *args))
            return gradients_in_graph(lambda *args: _first(composition(*args)), grad, needed, args)

    torch.library.register_vmap(gradient.name().partition(".")[0], one_by_one(gradient))
    eager = register(operator, Composed, composition)

    def call(*args: Any) -> Any:
        return call_in_graph(operator, *args) if _is_compiling() else eager(*args)

    return call
