"""What has no gradient says so when a backward pass asks for one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnpack_fx.kernels.registering import LIBRARY, fake, operator


@operator()
def no_gradient(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """What a backward pass through an operator of the packed cache runs into.

    An operator, because AOTAutograd traces the backward of every graph, also of those that never run it.
    """
    raise RuntimeError("the packed cache is not differentiable; run under torch.no_grad() or keep the cache dense")


@fake("no_gradient")
def _(grad, shape):
    return grad.new_empty(shape)


def _remember_shapes(ctx, inputs, output):
    ctx.shapes = [
        [getattr(each, "shape", None) for each in argument]
        if isinstance(argument, list | tuple)
        else getattr(argument, "shape", None)
        for argument in inputs
    ]


def _refuse(ctx, grad, *_):
    def refuse(shape, needed):
        if isinstance(needed, list):
            return [refuse(*pair) for pair in zip(shape, needed, strict=True)]
        return no_gradient(grad, shape) if needed else None

    # PyTorch leaves arguments out that are their defaults, the last ones.
    return tuple(refuse(*pair) for pair in zip(ctx.shapes, ctx.needs_input_grad, strict=False))


def refuse_gradient(name: str) -> None:
    """Let a backward pass through `attnpack::<name>` raise; its first result is what a loss would depend on."""
    torch.library.register_autograd(f"attnpack::{name}", _refuse, setup_context=_remember_shapes, lib=LIBRARY)
