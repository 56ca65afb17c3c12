"""Small matchers over Dynamo's graph, where an operation may stand as a function, a method or an operator."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from attnpack_fx.passes.state import same_size

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
    # A decorator around `forward` calls it with `*args`, of which the model is the first.
    path = path.replace("L['self'].", "").replace("L['args'][0].", "").replace("L['", "").replace("']", "")
    for noise in ("_modules['", "._modules."):
        path = path.replace(noise, "")
    path = re.sub(r"^\w+\[\d+\]\.", "", path)  # the model itself, where it is an argument by number: args[0]
    return path or node.name


# ---- casts, layouts and pieces of the last dimension -------------------------------------------------------


def value_of(node: Any) -> torch.Tensor | None:
    """The fake tensor Dynamo traced for a node, or None when it is no tensor."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def cast_source(node: Node) -> Node | None:
    """What `node` casts, or copies by `contiguous`, on the same device; None when it is neither."""
    if not is_call(node, "to", "type", "type_as", "float", "half", "bfloat16", "double", *_NO_OPS) or not node.args:
        return None
    source = node.args[0]
    after, before = value_of(node), value_of(source)
    if after is None or before is None or after.device != before.device:
        return None
    return source  # type: ignore[return-value]


def swapped_source(node: Node) -> Node | None:
    """The `[B, T, H, D]` below `[B, H, T, D]`, or the other way round; None when nothing else is swapped."""
    value = value_of(node)
    if value is None or value.dim() != 4 or not node.args or not isinstance(node.args[0], Node):
        return None
    if is_call(node, "transpose", "swapaxes", "swapdims"):
        dims = [argument(node, 1, "dim0"), argument(node, 2, "dim1")]
        swapped = all(isinstance(dim, int) for dim in dims) and {dim % 4 for dim in dims} == {1, 2}
    elif is_call(node, "permute"):
        order = argument(node, 1, "dims") if len(node.args) < 3 else node.args[1:]
        swapped = isinstance(order, list | tuple) and tuple(order) == (0, 2, 1, 3)
    else:
        swapped = False
    return node.args[0] if swapped else None


def inserted_axis(node: Node) -> tuple[Node, int] | None:
    """`x.unsqueeze(dim)` or `x[:, None]`: x and the axis of the result, counted from the end (so negative)."""
    value = value_of(node)
    if value is None or not node.args or not isinstance(node.args[0], Node):
        return None
    if is_call(node, "unsqueeze"):
        dim = argument(node, 1, "dim")
        if isinstance(dim, int):
            return node.args[0], dim if dim < 0 else dim - value.dim()
    elif is_call(node, "getitem"):
        keys = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if sum(key is None for key in keys) != 1 or not all(_takes_all(key) for key in keys):
            return None
        place = keys.index(None)
        behind = len(keys) - place - 1
        return node.args[0], -behind - 1 if Ellipsis in keys[:place] else place - value.dim()
    return None


def _takes_all(key: Any) -> bool:
    return key is None or key is Ellipsis or key == slice(None, None, None)


def columns_of(node: Node) -> tuple[Node, range] | None:
    """The tensor from whose last dimension `node` takes columns, and which: a slice, `narrow`, an item of `split`,
    `chunk` or `tensor_split`, or of `unbind` over the pairs of `x.reshape(..., -1, 2)`. None when it does not, or
    the columns are not fixed.
    """
    if not node.args:
        return None
    if is_call(node, "narrow"):
        source, start, length = node.args[0], argument(node, 2, "start"), argument(node, 3, "length")
        value = value_of(source)
        fixed = isinstance(start, int) and isinstance(length, int) and start >= 0
        if value is None or not fixed or argument(node, 1, "dim") not in (-1, value.dim() - 1):
            return None
        return source, range(start, start + length)  # type: ignore[return-value]
    if not is_call(node, "getitem") or not isinstance(node.args[0], Node):
        return None
    source, key = node.args[:2]
    if isinstance(key, int):
        return _item_columns(source, key)  # type: ignore[arg-type]
    value = value_of(source)
    if value is None or not isinstance(key, tuple) or not key:
        return None
    *leading, last = key
    if any(item is None or not _takes_all(item) for item in leading):
        return None
    if len(leading) != value.dim() - 1 and Ellipsis not in leading:
        return None
    if isinstance(last, int):
        return _pair_columns(source, last)  # type: ignore[arg-type]
    width = value.shape[-1]
    if not isinstance(width, int) or not isinstance(last, slice):
        return None
    if not all(bound is None or isinstance(bound, int) for bound in (last.start, last.stop, last.step)):
        return None
    return source, range(width)[last]  # type: ignore[return-value]


def _item_columns(pieces: Node, item: int) -> tuple[Node, range] | None:
    if is_call(pieces, "unbind"):
        source = pieces.args[0]
        value = value_of(source)
        if value is None or argument(pieces, 1, "dim", 0) not in (-1, value.dim() - 1):
            return None
        return _pair_columns(source, item)  # type: ignore[arg-type]
    if not is_call(pieces, "split", "chunk", "tensor_split"):
        return None
    source, values = pieces.args[0], pieces.meta.get("example_value")
    value = value_of(source)
    if value is None or argument(pieces, 2, "dim", 0) not in (-1, value.dim() - 1):
        return None
    if not isinstance(values, list | tuple) or not -len(values) <= item < len(values):
        return None
    widths = [piece.shape[-1] for piece in values]
    if not all(isinstance(width, int) for width in widths):
        return None
    item %= len(widths)
    return source, range(sum(widths[:item]), sum(widths[: item + 1]))  # type: ignore[return-value]


def _pair_columns(pairs: Node, member: int) -> tuple[Node, range] | None:
    """Member 0 or 1 of every pair, where `pairs` is `x.reshape(..., -1, 2)`."""
    if not is_call(pairs, "reshape", "view", "unflatten") or not isinstance(pairs.args[0], Node):
        return None
    after, before = value_of(pairs), value_of(pairs.args[0])
    if after is None or before is None or after.shape[-1] != 2 or member not in (0, 1, -1, -2):
        return None
    return (pairs.args[0], range(member % 2, before.shape[-1], 2)) if _merges(after, before) else None


def _merges(pairs: torch.Tensor, merged: torch.Tensor) -> bool:
    """Whether a reshape between the two only joins the last two dimensions of `pairs`."""
    sizes = (*pairs.shape[-2:], merged.shape[-1])
    if pairs.dim() != merged.dim() + 1 or not all(isinstance(size, int) for size in sizes):
        return False
    if sizes[0] * sizes[1] != sizes[2]:
        return False
    return all(same_size(left, right) for left, right in zip(pairs.shape[:-2], merged.shape[:-1], strict=True))


def joined_columns(node: Node) -> tuple[Node, Node, bool] | None:
    """Two tensors joined along the last dimension: one behind the other by `cat` (False) or alternating by `stack`
    and `flatten` (True).
    """
    value = value_of(node)
    if value is None or not node.args:
        return None
    alternating = is_call(node, "flatten", "reshape", "view", "reshape_as")
    joined = node.args[0] if alternating else node
    if not is_call(joined, *(("stack",) if alternating else ("cat", "concat", "concatenate"))):
        return None
    stacked = value_of(joined)
    if alternating and (stacked is None or not _merges(stacked, value)):
        return None
    last = (-1, value.dim() if alternating else value.dim() - 1)
    pieces = argument(joined, 0, "tensors")  # type: ignore[arg-type]
    if argument(joined, 1, "dim", 0) not in last or not isinstance(pieces, list | tuple) or len(pieces) != 2:  # type: ignore[arg-type]
        return None
    if not all(value_of(piece) is not None for piece in pieces):
        return None
    return pieces[0], pieces[1], alternating


def layer_number(layer: str) -> int | None:
    """The number of the layer a module path leads into: its first number, as in `model.layers.3.self_attn`."""
    return next((int(number) for number in re.findall(r"(?<![A-Za-z_])\d+", layer)), None)


def layer_count(nodes: Iterable[Node]) -> int | None:
    """How many decoder layers there are, from nodes in all of them; None where the layer of one is not known."""
    numbers = [layer_number(layer_of(node)) for node in nodes]
    known = [number for number in numbers if number is not None]
    return 1 + max(known) if known and len(known) == len(numbers) else None
