"""Derivatives of the streaming ops: gradients made ahead, and refusals."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

REMEDY = "use impl='reference'"


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Apply `function`, so that forward-mode differentiation is refused with the remedy.

    torch.compile traces no Function with a `jvp`; compiled, PyTorch's own error has to do.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)
    return _refusing_forward_mode(function).apply(*args)


@functools.cache
def _refusing_forward_mode(function: type[torch.autograd.Function]) -> Any:
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "the streaming implementations have no forward mode, nor Hessians, which use it; "
            f"{REMEDY} to differentiate forward"
        )

    # read by every call, and slow to make
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return type(function.__name__, (function,), {"jvp": staticmethod(jvp)})


class Refusing(torch.autograd.Function):
    """Base of functions whose results are gradients, which have none themselves."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"the streaming implementations have no second derivative; {REMEDY} to "
            "differentiate twice"
        )


class MadeAhead(torch.autograd.Function):
    """Base of functions that return a value and its gradients, which the backward pass scales.

    The last arguments are the links, see `Scaled`, of the inputs that the gradients belong to.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        gradients, links = output[1:], inputs[len(inputs) - len(output) + 1 :]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)  # no zeros of the gradients' size for them
        ctx.save_for_backward(*gradients, *links)


class Scaled(Refusing):
    """A gradient made ahead times what comes from above, in a new tensor of a given dtype.

    `link` is an empty part of the input that the gradient belongs to: differentiating the result
    is refused, without the input being kept.
    """

    @staticmethod
    def forward(grad: Tensor, gradient: Tensor, link: Tensor) -> Tensor:
        missing = gradient.dim() - grad.dim()
        return (grad.reshape(grad.shape + (1,) * missing) * gradient).to(link.dtype)


def scaled(grad: Tensor, gradient: Tensor, link: Tensor) -> Tensor:
    """Apply `Scaled`, without a node in the graph where nobody can differentiate again."""
    if not torch.is_grad_enabled():
        return Scaled.forward(grad, gradient, link)
    found: Tensor = applied(Scaled, grad, gradient, link)
    return found


def products(ctx: Any, grad: Tensor | None) -> list[Tensor | None]:
    """Gradients of the first arguments of a `MadeAhead`; None where none is needed."""
    saved, count = ctx.saved_tensors, len(ctx.saved_tensors) // 2
    if grad is None:
        return [None] * count
    needed = zip(saved[:count], saved[count:], ctx.needs_input_grad[:count], strict=True)
    return [scaled(grad, gradient, link) if need else None for gradient, link, need in needed]


def link_to(tensor: Tensor) -> Tensor:
    """An empty tensor that carries the autograd history of `tensor`, not its memory."""
    return tensor.flatten()[:0].clone()
