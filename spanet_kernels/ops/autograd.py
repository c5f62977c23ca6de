"""How every operator of the package is called and differentiated.

An operator has kernels below autograd and an `autograd.Function`. torch.compile and torch.export see the operator, whose Autograd
kernel calls the function; eager code calls the function itself, which torch.func asks for and which saves trips through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_library = torch.library.Library("spanet_kernels", "IMPL")


def wants_derivative(args: tuple[Any, ...]) -> bool:
    """Whether a derivative of a call with these arguments may be asked for."""
    return (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)) or forward_ad._current_level >= 0


def call_below_autograd(operator: Any, keyset: Any, *args: Any) -> Any:
    """Go on to the kernels below autograd: from the dispatch keys that an autograd kernel was called with, or (None) from the top."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args) if keyset is None else operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def register(operator: Any, function: Any, vmap: Callable[..., Any]) -> None:
    """The kernel of the Autograd keys records the function where a derivative is wanted, else goes below; and vmap."""

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            name = operator.name().partition(".")[0].replace("::", ".")
            raise RuntimeError(f"{operator}: call {name} under torch.func, in eager mode; the operator has no levels")
        if wants_derivative(args):
            return function.record(keyset, *args)
        return call_below_autograd(operator, keyset, *args)

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    # the same function with one forward that sets up its own context: without torch.func there is no need to inspect signatures
    no_setup = {"forward": staticmethod(forward), "setup_context": torch.autograd.function._SingleLevelFunction.setup_context}
    recorded: Any = type(function.__name__, (function,), no_setup)
    function.record = recorded.apply
    name = operator.name().partition(".")[0]
    _library.impl(name, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(name, vmap)


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


def by_composition(operator: Any, gradient: Any, gradients: Callable[..., Any], composition: Callable[..., Any]) -> Callable[..., Any]:
    """A differentiable call of an operator whose first derivative is another operator.

    operator: its first output is differentiated, others are by-products.
    gradient: the operator of the first derivative.
    gradients: (gradient of the first output, which args need one, by-products, args) to one gradient, or None, for each of args;
        it calls `gradient`.
    composition: the outputs in differentiable PyTorch; it serves every further derivative, forward mode and torch.func.
    """

    class Composed(torch.autograd.Function):
        @staticmethod
        def forward(keyset: Any, *args: Any) -> Any:
            return call_below_autograd(operator, keyset, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _, *args = inputs
            by_products = output[1:] if isinstance(output, tuple) else ()
            ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
            ctx.save_for_backward(*(arg if isinstance(arg, Tensor) else None for arg in args), *by_products)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*by_products)

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
            needed = ctx.needs_input_grad[1:]
            if grad is None:
                return (None,) * (1 + len(needed))
            kept = ctx.saved_tensors  # activation checkpointing hands them out once
            saved, by_products = kept[: len(needed)], kept[len(needed) :]
            args = [other if tensor is None else tensor for tensor, other in zip(saved, ctx.others, strict=True)]
            if not torch.is_grad_enabled():
                return None, *gradients(grad, needed, by_products, *args)
            # aliases in place of the arguments, so that each has a gradient of its own
            wanted = {index: args[index].view_as(args[index]) for index, need in enumerate(needed) if need}
            y = composition(*(wanted.get(index, arg) for index, arg in enumerate(args)))
            y = y[0] if isinstance(y, tuple) else y
            found = torch.autograd.grad(y, list(wanted.values()), grad, create_graph=True, allow_unused=True)
            by_index = dict(zip(wanted, found, strict=True))
            return None, *(by_index.get(index) for index in range(len(args)))

    register(operator, Composed, one_by_one(operator))
    torch.library.register_vmap(gradient.name().partition(".")[0], one_by_one(gradient))

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*args)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return composition(*args)
        if wants_derivative(args):
            return Composed.record(None, *args)  # type: ignore[attr-defined]
        return call_below_autograd(operator, None, *args)

    return call
