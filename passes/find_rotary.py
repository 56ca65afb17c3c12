"""Find the rotary embedding between a key projection and the cache, so that keys can be stored as they were before it.

What is recognised is the identity `key = rotate(unrotated, cos, sin, interleaved)` of `kernels.rotary`, whatever
the values of cos and sin: `x * cos + turn(x) * sin` in either order of every operand, or written half by half; on all
dims or the first E of D; on `[B, H, T, D]` or `[B, T, H, D]`; with casts that lose nothing the key keeps. Tensors
that are written in place after they are read match nothing.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch.fx import Graph, Node

from attnpack_fx.passes.in_place import written
from attnpack_fx.passes.patterns import (
    cast_source,
    columns_of,
    inserted_axis,
    is_call,
    joined_columns,
    swapped_source,
    value_of,
)
from attnpack_fx.passes.state import same_size

# Functions of their arguments alone: the same of the same arguments is the same value. GLM expands cos in every layer.
_PURE = (
    *("getitem", "unsqueeze", "squeeze", "cat", "concat", "concatenate", "stack", "split", "chunk", "narrow", "unbind"),
    *("repeat_interleave", "repeat", "expand", "to", "float", "type", "type_as", "half", "bfloat16", "contiguous"),
    *("transpose", "permute", "reshape", "view", "flatten", "gather", "neg", "mul", "add", "sub", "cos", "sin", "size"),
)
_UNKNOWN_STORAGE = 0  # what is written into it may be written into any


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of one layer's new keys: they equal `rotate(unrotated, cos, sin, interleaved)` of
    `kernels.rotary`, computed as the model does.

    unrotated: `[B, H, k, D]`, the keys before it, in their dtype.
    cos, sin: `[B or 1, k, E / 2]`, one entry per pair; the first E <= D dims are rotated. Any scaling is in them:
    `cos^2 + sin^2` need not be 1. Layers that compute the same cos get the same node.
    interleaved: whether pairs are `(2i, 2i + 1)` rather than `(i, i + E / 2)`.
    """

    unrotated: Node
    cos: Node
    sin: Node
    interleaved: bool


@dataclass(frozen=True)
class _Turn:
    """A matched rotation of columns: `operand` holds just them, `cos` and `sin` one entry a pair if `halved`."""

    operand: Node
    cos: Node
    sin: Node
    interleaved: bool
    halved: bool
    dtype: torch.dtype = torch.float32


class RotaryFinder:
    """Rotary embeddings of one graph. The nodes it inserts to bring operands into the form of `Rotation` (views, casts,
    the first half of cos, whose second is the same) stand right after what they read, once for all layers.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._values = _Values(graph)
        self._made: dict[Any, Node] = {}
        self._read: list[Node] = []
        self._adder: Node | None = None

    def rotation_of(self, key: Node) -> Rotation | None:
        """The rotation that made `key`, the new keys `[B, H, k, D]` as attention reads them: the last piece of the
        cache's `cat`, or what stands in its place where nothing is cached. None where there is none, or none that is
        understood.
        """
        self._read, self._adder = [], None
        value = value_of(key)
        if value is None or value.dim() != 4 or not value.is_floating_point():
            return None
        node, heads_first = self._below(key, value.dtype)
        passed = None
        turn = self._turn(node)
        if turn is None:
            partial = joined_columns(node)
            if partial is None or partial[2]:
                return None
            self._read.append(node)
            rotated, passed = partial[:2]
            turn = self._turn(self._uncast(rotated, value.dtype))
        if turn is None or not _holds(turn.dtype, value.dtype):
            return None
        unrotated = self._operand(turn.operand, passed)
        if unrotated is None or not _same_shape(unrotated, value, heads_first):
            return None
        before = value_of(unrotated)
        assert before is not None
        if not _holds(value.dtype, before.dtype):
            return None
        width = len(self._columns(turn.operand)[1]) // (2 if turn.halved else 1)
        if not all(_is_angle(node, value, width, heads_first) for node in (turn.cos, turn.sin)):
            return None
        if any(self._values.written_later(node, self._adder) for node in self._read):
            return None
        cos, sin = (self._angle(node, turn, value.dtype, heads_first) for node in (turn.cos, turn.sin))
        if not heads_first:
            unrotated = self._insert(unrotated, "transpose", 1, 2)
        if before.dtype != value.dtype:
            unrotated = self._insert(unrotated, "to", value.dtype)
        return Rotation(unrotated, cos, sin, turn.interleaved)

    # ---- the way down from the key

    def _below(self, node: Node, kept: torch.dtype) -> tuple[Node, bool]:
        """What is cast and transposed to make the key, and whether it is `[B, H, T, D]`."""
        heads_first = True
        while True:
            node = self._uncast(node, kept)
            source = swapped_source(node)
            if source is None:
                return node, heads_first
            node, heads_first = source, not heads_first

    def _uncast(self, node: Node, kept: torch.dtype | None = None) -> Node:
        """Below casts from a dtype that holds all of `kept`, or, without it, below those that lose nothing."""
        self._read.append(node)
        while (source := cast_source(node)) is not None:
            after, before = value_of(node), value_of(source)
            assert after is not None and before is not None
            if not (_holds(before.dtype, kept) if kept is not None else _holds(after.dtype, before.dtype)):
                break
            node = source
            self._read.append(node)
        return node

    def _columns(self, node: Node) -> tuple[Node, range]:
        """The tensor that `node` takes columns of, through slices of slices and exact casts, and which."""
        node = self._uncast(node)
        taken = columns_of(node)
        if taken is None:
            value = value_of(node)
            width = value.shape[-1] if value is not None and value.dim() else 0
            return self._values.first(node), range(width if isinstance(width, int) else 0)
        source, part = taken
        while node is not source:
            self._read.append(node)
            node = node.args[0]  # type: ignore[assignment]
        root, whole = self._columns(source)
        return root, whole[part.start : part.stop : part.step]

    def _operand(self, operand: Node, passed: Node | None) -> Node | None:
        """The tensor whose columns are those rotated and, behind them, those passed by; None if there is none."""
        root, wanted = self._columns(operand)
        if passed is not None:
            other, rest = self._columns(passed)
            if other is not root or wanted.step != 1 or rest.step != 1 or wanted.stop != rest.start:
                return None
            wanted = range(wanted.start, rest.stop)
        node = operand
        while True:
            node = self._uncast(node)
            if self._columns(node)[1] == wanted:
                return node
            taken = columns_of(node)
            if taken is None:
                return None
            node = taken[0]

    # ---- the rotation itself

    def _turn(self, node: Node) -> _Turn | None:
        return self._turn_of_whole(node) or self._turn_of_halves(node)

    def _turn_of_whole(self, node: Node) -> _Turn | None:
        """`x * cos + turn(x) * sin`."""
        for plain, turned in _orders(_operands(node, "add", "iadd", "add_")):
            for (x, cos), (turned_x, sin) in product(_orders(_factors(plain)), _orders(_factors(turned))):
                found = self._turned(turned_x)
                if found is not None and self._columns(x) == found[:2]:
                    if is_call(node, "iadd", "add_"):
                        self._adder = node
                    return self._checked(_Turn(x, cos, sin, found[2], False), [node, plain, turned])
        return None

    def _turned(self, node: Node) -> tuple[Node, range, bool] | None:
        """The columns x of `turn(x)`, and whether they turn in pairs `(2i, 2i + 1)`."""
        node = self._uncast(node)
        joined = joined_columns(node)
        if joined is None:
            return None
        negated, first, interleaved = self._uncast(joined[0]), joined[1], joined[2]
        if interleaved:
            self._read.append(node.args[0])  # type: ignore[arg-type]
        if not is_call(negated, "neg", "negative") or value_of(negated.args[0]) is None:
            return None
        whole = self._whole(first, negated.args[0], interleaved)  # type: ignore[arg-type]
        return None if whole is None else (*whole, interleaved)

    def _whole(self, first: Node, second: Node, interleaved: bool) -> tuple[Node, range] | None:
        """The columns of which `first` and `second` are the two halves, or the even and the odd ones."""
        (root, left), (other, right) = self._columns(first), self._columns(second)
        if root is not other or not left:
            return None
        whole = range(left.start, left.start + 2 * len(left))
        halves = (whole[::2], whole[1::2]) if interleaved else (whole[: len(left)], whole[len(left) :])
        return (root, whole) if (left, right) == halves else None

    def _turn_of_halves(self, node: Node) -> _Turn | None:
        """`a * cos - b * sin` and `b * cos + a * sin`, joined as a and b were: halves, or even and odd columns."""
        joined = joined_columns(node)
        if joined is None:
            return None
        first, second, interleaved = joined
        if interleaved:
            self._read.append(node.args[0])  # type: ignore[arg-type]
        first_of = self._values.first
        for one, two in product(_orders(_operands(first, "sub"))[:1], _orders(_operands(second, "add"))):
            parts = [*one, *two]
            for (a, cos), (b, sin), (b2, cos2), (a2, sin2) in product(*(_orders(_factors(part)) for part in parts)):
                whole = self._whole(a, b, interleaved)
                same_rows = self._columns(a2) == self._columns(a) and self._columns(b2) == self._columns(b)
                same_angles = first_of(cos) is first_of(cos2) and first_of(sin) is first_of(sin2)
                source = self._holder(a, whole) if whole is not None and same_rows and same_angles else None
                if source is not None:
                    self._read += [cos2, sin2]
                    turn = _Turn(source, cos, sin, interleaved, True)
                    return self._checked(turn, [node, first, second, *parts])
        return None

    def _holder(self, part: Node, whole: tuple[Node, range]) -> Node | None:
        """The tensor that holds just the columns `whole`, of which `part` was taken."""
        while (taken := columns_of(self._uncast(part))) is not None:
            part = taken[0]
            if self._columns(part) == whole:
                return part
        return None

    def _checked(self, turn: _Turn, steps: list[Node]) -> _Turn | None:
        """`turn` with the dtype it is computed in, if all its steps share it."""
        dtypes = {value.dtype for value in map(value_of, steps) if value is not None}
        if len(dtypes) != 1 or not all(dtype.is_floating_point for dtype in dtypes):
            return None
        self._read += [*steps, turn.cos, turn.sin]
        return replace(turn, dtype=dtypes.pop())

    # ---- the form in which it is handed on

    def _angle(self, node: Node, turn: _Turn, kept: torch.dtype, heads_first: bool) -> Node:
        """Cos or sin as `[B or 1, k, E / 2]`, of a dtype that makes `rotate` compute as the model does."""
        node = self._values.first(node)
        value, inserted = value_of(node), inserted_axis(node)
        assert value is not None
        axis = -3 if heads_first else -2
        if value.dim() == 4 and inserted is not None and inserted[1] == axis:
            node = self._values.first(inserted[0])
        elif value.dim() == 4:
            node = self._insert(node, "squeeze", axis)
        elif value.dim() == 2:
            node = self._insert(node, "unsqueeze", 0)
        elif not heads_first:
            node = self._insert(node, "transpose", 0, 1)
        if not turn.halved:
            # Not by a size, which may be a symbol where a layer is compiled by itself.
            sizes, dim = ((-1, 2), -1) if turn.interleaved else ((2, -1), -2)
            node = self._insert(self._insert(node, "unflatten", -1, sizes), "select", dim, 0)
        if torch.promote_types(value.dtype, kept) != turn.dtype:
            node = self._insert(node, "to", turn.dtype)
        return node

    def _insert(self, source: Node, method: str, *arguments: Any) -> Node:
        """`source.method(*arguments)`, once."""
        made = self._made.get((source, method, arguments))
        if made is None:
            before = source if source.op != "placeholder" else _last_placeholder(self._graph)
            with self._graph.inserting_after(before):
                made = self._graph.call_method(method, (source, *arguments))
            made.meta["example_value"] = getattr(value_of(source), method)(*arguments)
            self._made[source, method, arguments] = made
        return made


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    return wide.is_floating_point and narrow.is_floating_point and torch.promote_types(wide, narrow) == wide


def _same_shape(node: Node, key: torch.Tensor, heads_first: bool) -> bool:
    value = value_of(node)
    if value is None or value.dim() != 4:
        return False
    batch, heads, tokens, width = key.shape
    shape = (batch, heads, tokens, width) if heads_first else (batch, tokens, heads, width)
    return all(same_size(left, right) for left, right in zip(value.shape, shape, strict=True))


def _is_angle(node: Node, key: torch.Tensor, width: int, heads_first: bool) -> bool:
    """Whether `node`, which is multiplied with the keys, holds one row a token, the same for all heads."""
    value = value_of(node)
    if value is None or not 2 <= value.dim() <= 4 or not value.is_floating_point():
        return False
    batch, *middle, last = (1,) * (4 - value.dim()) + tuple(value.shape)
    heads, tokens = middle if heads_first else reversed(middle)
    per_token = same_size(heads, 1) and same_size(tokens, key.shape[2]) and same_size(last, width)
    return per_token and (same_size(batch, 1) or same_size(batch, key.shape[0]))


def _operands(node: Node, *names: str) -> list[Node]:
    """The two tensors that `node` combines by one of `names`, or nothing."""
    known = is_call(node, *names) and len(node.args) == 2 and not node.kwargs
    return list(node.args) if known and all(value_of(item) is not None for item in node.args) else []  # type: ignore[arg-type]


def _factors(node: Node) -> list[Node]:
    return _operands(node, "mul", "multiply")


def _orders(pair: list[Node]) -> list[tuple[Node, Node]]:
    return [(pair[0], pair[1]), (pair[1], pair[0])] if pair else []


def _last_placeholder(graph: Graph) -> Node:
    return [node for node in graph.nodes if node.op == "placeholder"][-1]


# ---- equal values, and values that change ------------------------------------------------------------------


class _Values:
    """Which nodes of a graph have one value, and which of their values are written into."""

    def __init__(self, graph: Graph) -> None:
        self._writers: dict[int, list[Node]] = {}
        for node in graph.nodes:
            for storage in {_storage(value) for value in map(value_of, written(node)) if value is not None}:
                self._writers.setdefault(storage, []).append(node)
        self._first: dict[Node, Node] = {}
        known: dict[Any, Node] = {}
        for node in graph.nodes:
            if not is_call(node, *_PURE) or any(self._writers_of(each) for each in (node, *node.all_input_nodes)):
                continue
            value = value_of(node)
            arguments = _frozen((node.args, node.kwargs), self._first)
            form = (node.op, node.target, arguments, value.dtype if value is not None else None)
            self._first[node] = known.setdefault(form, node)

    def first(self, node: Node) -> Node:
        """The first node of the same value, as far as can be told."""
        return self._first.get(node, node)

    def written_later(self, node: Node, but_by: Node | None) -> bool:
        """Whether what `node` gave is changed after it, other than by `but_by`."""
        return any(node < writer and writer is not but_by for writer in self._writers_of(node))

    def _writers_of(self, node: Node) -> list[Node]:
        value = value_of(node)
        if value is None:
            return []
        return [*self._writers.get(_storage(value), []), *self._writers.get(_UNKNOWN_STORAGE, [])]


def _frozen(argument: Any, first: dict[Node, Node]) -> Any:
    """An argument as a key of a mapping, where nodes of equal value are equal."""
    if isinstance(argument, Node):
        return first.get(argument, argument)
    if isinstance(argument, list | tuple):
        return tuple(_frozen(item, first) for item in argument)
    if isinstance(argument, dict):
        return tuple((name, _frozen(item, first)) for name, item in sorted(argument.items()))
    if isinstance(argument, slice):
        return slice, *(_frozen(item, first) for item in (argument.start, argument.stop, argument.step))
    return type(argument), argument


def _storage(value: torch.Tensor) -> int:
    try:
        return value.untyped_storage()._cdata
    except NotImplementedError:  # a tensor inside vmap, as in transformers' mask functions
        return _UNKNOWN_STORAGE
