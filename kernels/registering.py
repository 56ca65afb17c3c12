"""How operators `attnpack::` come to be: schemas, shape functions (fakes), devices, and what Inductor sees of them.

An operator takes plain tensors. On a CPU it is one call; on a GPU Inductor may see through it, and launch the Triton
kernels that it launches itself.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled, triton_ops_to_kernels
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.export._trace import custom_triton_ops_decomposition_disabled
from torch.utils._pytree import tree_leaves

if importlib.util.find_spec("triton") is not None:
    from attnpack_fx.kernels import triton
else:  # Triton has no packages for this platform, so torch has no GPU that needs them
    triton = None  # type: ignore[assignment]

# A bare Library rather than `torch.library.custom_op`: the latter wraps every call in Python layers that cost 10 us,
# three times per layer and decode step.
LIBRARY = torch.library.Library("attnpack", "FRAGMENT")


def operator(
    mutates: Sequence[str] = (), visible: Callable[..., bool] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the operator `attnpack::<its name>`, with the schema its annotations say.

    visible: says of its arguments whether Inductor shall see the Triton kernels that it launches for them on a GPU;
        None: it launches none.
    """

    def define(function: Callable[..., Any]) -> Any:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        packet = getattr(torch.ops.attnpack, name)
        packet.__doc__ = function.__doc__
        if visible is not None and triton is not None:
            _show_kernels(packet.default, function, visible)
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        LIBRARY.impl(name, _launched_at_once(function), "CUDA")
        return packet

    return define


def _launched_at_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """What runs on a device: nothing traces it, and kernels go to the device of the tensors, current or not."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with set_wrap_triton_enabled(False), torch.cuda.device(_device(args)):
            return function(*args, **kwargs)

    return run


def _show_kernels(operator: torch._ops.OpOverload, function: Callable[..., Any], visible: Callable[..., bool]) -> None:
    """Let Inductor see the kernels inside an operator and launch them itself: `torch.library.triton_op`, on a GPU only.

    On a CPU the operator stays one call: its products are ATen's, which Inductor's lowering would slow down.
    """

    def decompose(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        opaque = custom_triton_ops_decomposition_disabled() or _device(args).type != "cuda"
        if opaque or not visible(*args):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return function(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(operator, FunctionalTensorMode, decompose, lib=LIBRARY)
    # So that keys of AOTAutograd's cache cover the kernels' source.
    triton_ops_to_kernels[operator._name] = list(triton.KERNELS)


def _device(arguments: Sequence[Any]) -> torch.device:
    """Of the first tensor among the arguments of an operator."""
    return next(tensor.device for tensor in tree_leaves(arguments) if isinstance(tensor, Tensor))


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the one that says which shapes and dtypes `attnpack::<name>` returns."""
    return torch.library.register_fake(f"attnpack::{name}", lib=LIBRARY)
