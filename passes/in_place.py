"""Which nodes of a graph write into tensors, and into which: what every pass asks before it moves, drops or trusts one.

Nothing is listed that a function says of itself: operators have schemas, functions have parameters called `inplace`
and `out`, Python's own stand in `operator`, and by PyTorch's convention all others end in an underscore.
"""

import inspect
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node

# `__iadd__` and its like, but not `__index__` or `__invert__`, which have no counterpart without the i.
_AUGMENTED = tuple(
    name for name in dir(operator) if name.startswith("__i") and hasattr(operator, f"__{name.removeprefix('__i')}")
)
_OPERATORS = (*(getattr(operator, name) for name in _AUGMENTED), operator.setitem)
_METHODS = (*_AUGMENTED, "__setitem__")


def writes(node: Node) -> bool:
    """Whether a node may change a tensor in place."""
    return _written(node) is not None


def written(node: Node) -> list[Node]:
    """What a node writes into, or may."""
    return _nodes(_written(node) or ())


def _written(node: Node) -> Any:
    """The arguments that a node may write into; None where it writes nothing."""
    if node.op == "call_module":
        return node.all_input_nodes
    if node.op == "call_method":
        return _first(node) if node.target in _METHODS or _ends_in_place(str(node.target)) else None
    if node.op != "call_function":
        return None
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return _by_schema(node, target)
    if node.kwargs.get("out") is not None:
        return node.kwargs["out"]
    name = getattr(target, "__name__", "")
    if "mutation" in name:  # a user's Triton kernel, which may write into any argument
        return node.all_input_nodes
    return _first(node) if target in _OPERATORS or _ends_in_place(name) or _told_in_place(node) else None


def _by_schema(node: Node, target: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> Any:
    """Of a packet, which names no overload, what any overload would write of the arguments given."""
    if isinstance(target, torch._ops.OpOverload):
        packet, overloads = target.overloadpacket, [target]
    else:
        packet, overloads = target, [getattr(target, name) for name in target.overloads()]
    found = []
    for overload in overloads:
        for place, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            if place < len(node.args) and not argument.kwarg_only:
                found.append(node.args[place])
            elif node.kwargs.get(argument.name) is not None:
                found.append(node.kwargs[argument.name])
    # The operators of torch.distributed declare nothing.
    return found or (_first(node) if _ends_in_place(packet.__name__) else None)


def _ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _told_in_place(node: Node) -> bool:
    """Whether a function such as `torch.nn.functional.silu` is told to work in place, by keyword or by position."""
    given = dict(zip(_parameters(node.target), node.args, strict=False)) | node.kwargs
    return bool(given.get("inplace", False))


@lru_cache(maxsize=1024)
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # PyTorch's own in C++ tell none
        return ()


def _first(node: Node) -> Any:
    return node.args[0] if node.args else node.all_input_nodes


def _nodes(value: Any) -> list[Node]:
    """The nodes in an argument, which may be a list or tuple of nodes."""
    if isinstance(value, Node):
        return [value]
    return [node for item in value for node in _nodes(item)] if isinstance(value, list | tuple) else []
