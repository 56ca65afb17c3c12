"""Small matchers over Dynamo's graph, where an operation may stand as a function, a method or an operator."""

from typing import Any

import torch
from torch.fx import Node

_NO_OPS = ("contiguous",)


def is_call(node: Any, *names: str) -> bool:
    """Whether `node` calls one of `names`, as `tensor.name(...)`, `torch.name(...)` or `operator.name(...)`."""
    if not isinstance(node, Node):
        return False
    if node.op == "call_method":
        return node.target in names
    return node.op == "call_function" and getattr(node.target, "__name__", None) in names


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def cat_along_tokens(node: Any) -> list[Node]:
    """What `node` concatenates along dimension 2 of `[B, H, T, D]`; empty when it is no such concatenation."""
    if not is_call(node, "cat", "concat", "concatenate"):
        return []
    pieces = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    known = isinstance(pieces, list | tuple) and all(isinstance(piece, Node) for piece in pieces)
    return list(pieces) if known and dim in (2, -2) else []


def through_no_ops(node: Any) -> Any:
    """The tensor below operations that change neither values nor shape: `contiguous`, and `to` without a change of
    dtype.
    """
    while isinstance(node, Node):
        source = node.args[0] if node.args else None
        if not isinstance(source, Node):
            break
        if is_call(node, *_NO_OPS) or (is_call(node, "to", "float", "type") and _same_kind(node, source)):
            node = source
        else:
            break
    return node


def _same_kind(node: Node, source: Node) -> bool:
    after, before = node.meta.get("example_value"), source.meta.get("example_value")
    if not isinstance(after, torch.Tensor) or not isinstance(before, torch.Tensor):
        return False
    return after.dtype == before.dtype and after.device == before.device


def strip_repeat_kv(node: Any) -> Any:
    """The KV heads below `repeat_kv`: `x[:, :, None].expand(...).reshape(...)` or `repeat_interleave(x, n, dim=1)`."""
    node = through_no_ops(node)
    if is_call(node, "repeat_interleave") and argument(node, 2, "dim") in (1, -3):
        return through_no_ops(node.args[0])
    if not is_call(node, "reshape", "view", "flatten"):
        return node
    expanded = node.args[0]
    if not is_call(expanded, "expand"):
        return node
    viewed = expanded.args[0]
    if is_call(viewed, "getitem"):
        key = viewed.args[1]
        full = slice(None, None, None)
        inserted = isinstance(key, tuple) and key[:3] == (full, full, None) and all(item == full for item in key[3:])
    else:
        inserted = is_call(viewed, "unsqueeze") and argument(viewed, 1, "dim") in (2, -3)
    if not inserted:
        return node
    base = through_no_ops(viewed.args[0])
    before, after = base.meta.get("example_value"), node.meta.get("example_value")
    if (
        not isinstance(before, torch.Tensor)
        or before.dim() != 4
        or not isinstance(after, torch.Tensor)
        or after.dim() != 4
    ):
        return node
    return base


def layer_of(node: Node) -> str:
    """The module a node was traced in, for people: the innermost module path Dynamo recorded."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = next(reversed(stack.values()))[0]
    path = path.replace("L['self'].", "").replace("L['", "").replace("']", "")
    for noise in ("_modules['", "._modules."):
        path = path.replace(noise, "")
    return path or node.name
