"""Follow the token dimension through decoder layers, and find what must change where there are fewer tokens.

Every operation behind the boundary is tried on shapes with another number of tokens: meta tensors, nothing is computed.
A dimension that changes with it holds tokens. Sizes written into the graph are rewritten where a view's prefix products
say that a size is the number of tokens, so that another size of the same value is left alone. What comes from outside
and does not fit is gathered in the dimensions that make it fit. What cannot be followed so is a reason to leave the
whole graph as it is.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from attnpack_fx.passes.cleanup import writes
from attnpack_fx.passes.layer_boundary import Boundary
from attnpack_fx.passes.patterns import argument, cast_source, inserted_axis, is_call, layer_of, value_of
from attnpack_fx.passes.state import GraphState, same_size, shape_of
from attnpack_fx.passes.token_spans import (
    Gathered,
    GatheredMask,
    Lost,
    Span,
    Spans,
    Tokens,
    expression,
    expressions,
    hint,
    regrouped,
)


@dataclass(frozen=True)
class Value:
    """A node's value on the other number of tokens; spans: of each dimension, None for one without tokens."""

    fake: Any
    spans: Spans = ()

    @property
    def tracked(self) -> bool:
        return any(self.spans)


@dataclass
class Followed:
    """What must change. arguments: new args and kwargs by node, with the markers above in them.

    exits: nodes `[B, T', C]` read behind the layers, with their readers there.
    """

    arguments: dict[Node, tuple[Any, Any]] = field(default_factory=dict)
    exits: dict[Node, list[Node]] = field(default_factory=dict)


def follow(state: GraphState, boundary: Boundary) -> Followed | str:
    """Everything that must change for the layers behind the boundary to see fewer tokens, or why they cannot."""
    try:
        return _Follower(state, boundary).run()
    except Lost as lost:
        return str(lost)


#: Operations that pick rows by number: on fewer rows the numbers mean others.
_POSITIONAL = (
    *("index_select", "gather", "take", "take_along_dim", "narrow", "select", "setitem", "masked_scatter"),
    *("index_copy", "index_put", "index_add", "scatter", "scatter_add", "index_copy_", "index_put_", "index_add_"),
    *("scatter_", "scatter_add_", "masked_scatter_", "roll", "flip", "split", "chunk", "tensor_split", "unbind"),
    *("topk", "sort", "argsort"),
)
_VIEWS = ("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as")
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)


_META = torch.device("meta")


class _Follower:
    def __init__(self, state: GraphState, boundary: Boundary) -> None:
        self.state, self.boundary = state, boundary
        shape = shape_of(boundary.hidden)
        assert shape is not None
        self.batch, self.tokens = expression(shape[0]), expression(shape[1])
        self.count = hint(shape[1])
        self.inside = set(boundary.nodes)
        sizes = [hint(size) for node in boundary.nodes for size in shape_of(node) or ()]
        #: The number of tokens everything is tried on: a prime no other size can be mistaken for.
        self.other = int(sympy.nextprime(max([self.count, *sizes])))
        self.masks = {site.mask for site in boundary.sites if site.mask is not None}
        self.calls = {site.node: site for site in boundary.sites}
        self.values: dict[Node, Value] = {}
        self.outside: dict[Node, Value] = {}
        self.followed = Followed()

    def run(self) -> Followed:
        with torch.no_grad():
            self.values[self.boundary.hidden] = self._scaled(self.boundary.hidden, (None, Span(), None))
            for node in self.boundary.nodes:
                if node.op in ("call_function", "call_method"):
                    self._visit(node)
        self._find_exits()
        return self.followed

    def _visit(self, node: Node) -> None:
        if not any(self._value(source).tracked for source in node.all_input_nodes):
            return
        if is_call(node, *_POSITIONAL):
            self._check_untouched(node)
        if writes(node) and not (node.args and self._is_tracked(node.args[0])):
            raise Lost(f"{layer_of(node)} writes tokens to a tensor that lives outside ({node.name})")
        if is_call(node, *_VIEWS) and self._is_view(node):
            self._view(node)
        elif is_call(node, "expand"):
            self._expand(node)
        elif is_call(node, "getitem") and self._is_tracked(node.args[0]) and value_of(node.args[0]) is not None:
            self._index(node)
        else:
            self._operate(node)

    # ---- views and slices: sizes written into the graph

    def _is_view(self, node: Node) -> bool:
        """Whether it only rearranges dimensions, as opposed to `view(dtype)`."""
        source, value = value_of(node.args[0]), value_of(node)
        return source is not None and value is not None and self._is_tracked(node.args[0])

    def _view(self, node: Node) -> None:
        source = node.args[0]
        assert isinstance(source, Node)
        before, after = shape_of(source), shape_of(node)
        assert before is not None and after is not None
        spans = regrouped(self._value(source).spans, expressions(before), expressions(after), self.tokens)
        if spans is None:
            raise Lost(self._unfollowed(node))
        if is_call(node, "view_as", "reshape_as"):
            self._check_fits(node, spans)
        elif is_call(node, "unflatten"):
            dim = argument(node, 1, "dim") % len(before)
            sizes = argument(node, 2, "sizes")
            changed = self._sizes(node, list(sizes), spans[dim : dim + len(sizes)])
            self.followed.arguments[node] = ((source, dim, changed), {})
        elif not is_call(node, "flatten"):
            given = node.args[1:] or tuple(node.kwargs.values())
            nested = len(given) == 1 and isinstance(given[0], tuple | list)
            sizes = list(given[0]) if nested else list(given)  # type: ignore[arg-type]
            changed = self._sizes(node, sizes, spans)
            self.followed.arguments[node] = ((source, changed) if nested else (source, *changed), {})
        self.values[node] = self._scaled(node, spans)

    def _expand(self, node: Node) -> None:
        source = node.args[0]
        if not isinstance(source, Node) or not self._is_tracked(source):
            raise Lost(self._unfollowed(node))
        given = node.args[1:] or tuple(node.kwargs.values())
        nested = len(given) == 1 and isinstance(given[0], tuple | list)
        sizes = list(given[0]) if nested else list(given)  # type: ignore[arg-type]
        old = self._value(source).spans
        spans: Spans = (*(None,) * (len(sizes) - len(old)), *old)
        changed = self._sizes(node, sizes, spans)
        self.followed.arguments[node] = ((source, changed) if nested else (source, *changed), {})
        self.values[node] = self._scaled(node, spans)

    def _sizes(self, node: Node, sizes: list[Any], spans: Spans) -> tuple[Any, ...]:
        if len(sizes) != len(spans):
            raise Lost(self._unfollowed(node))
        return tuple(
            size if span is None or (isinstance(size, int) and size == -1) else self._marker(node, span)
            for size, span in zip(sizes, spans, strict=True)
        )

    def _marker(self, node: Node, span: Span) -> Tokens:
        factor = span.before * span.after
        batched = not factor.is_Integer
        rest = factor / self.batch if batched else factor
        if not rest.is_Integer:
            raise Lost(self._unfollowed(node))
        return Tokens(int(rest), batched)

    def _index(self, node: Node) -> None:
        """`x[...]`: all tokens or none of their dimension may be chosen; a slice up to T takes all there are."""
        source, keys = node.args
        assert isinstance(source, Node)
        spans = self._value(source).spans
        listed = keys if isinstance(keys, tuple) else (keys,)
        if any(isinstance(key, Node) and value_of(key) is not None for key in tree_leaves(listed)):
            raise Lost(self._unfollowed(node))
        taken = sum(key is not None and key is not Ellipsis for key in listed)
        changed: list[Any] = []
        dim = 0
        for key in listed:
            if key is Ellipsis:
                dim += len(spans) - taken
            elif key is not None:
                span = spans[dim] if dim < len(spans) else None
                if span is not None:
                    if not self._takes_all(key):
                        raise Lost(f"{layer_of(node)} takes some of the tokens by number ({node.name})")
                    key = slice(None)
                dim += 1
            changed.append(key)
        arguments = (source, tuple(changed) if isinstance(keys, tuple) else changed[0])
        self.followed.arguments[node] = (arguments, {})
        self._operate(node)

    def _takes_all(self, key: Any) -> bool:
        if not isinstance(key, slice) or key.step not in (None, 1) or key.start not in (None, 0):
            return False
        if key.stop is None:
            return True
        stop = key.stop.meta.get("example_value") if isinstance(key.stop, Node) else key.stop
        return isinstance(stop, int | torch.SymInt) and expression(stop) == self.tokens

    def _check_untouched(self, node: Node) -> None:
        """Raise unless an operation that picks rows picks them in another dimension than that of the tokens."""
        source = node.args[0] if node.args else None
        position = {"split": 2, "chunk": 2, "tensor_split": 2, "topk": 2}.get(_name(node), 1)
        dim = argument(node, position, "dim", -1 if is_call(node, "topk", "sort", "argsort") else 0)
        known = isinstance(source, Node) and self._is_tracked(source) and isinstance(dim, int)
        if not known or is_call(node, "setitem", "take", "masked_scatter", "masked_scatter_"):
            raise Lost(f"{layer_of(node)} takes some of the tokens by number ({node.name})")
        assert isinstance(source, Node)
        spans = self._value(source).spans
        if spans[dim] is not None:
            raise Lost(f"{layer_of(node)} takes some of the tokens by number ({node.name})")

    # ---- any other operation: tried on the other number of tokens

    def _operate(self, node: Node) -> None:
        site = self.calls.get(node)
        alone = site is not None and site.mask is None and not site.is_causal and self._is_tracked(site.key)
        if site is not None and alone and self.batch != 1:
            # Filler stands behind the real tokens; without a causal mask they would be attended to.
            if site.kind != "sdpa":
                raise Lost(f"{layer_of(node)} attends without a mask")
            self.followed.arguments[node] = _with_mask(node, GatheredMask(None))
        value = self._attempt(node, {})
        if value is None:
            for choice in self._choices(node):
                value = self._attempt(node, choice)
                if value is not None:
                    self._choose(node, choice)
                    break
        if value is None:
            raise Lost(self._unfollowed(node))
        self.values[node] = value

    def _attempt(self, node: Node, choice: dict[Node, Any]) -> Value | None:
        """The operation on the other number of tokens, with some operands replaced; None where it does not fit."""
        args, kwargs = self.followed.arguments.get(node, (node.args, node.kwargs))

        def fake(item: Any) -> Any:
            if isinstance(item, Node):
                return self._fake(choice[item]) if item in choice else self._value(item).fake
            if isinstance(item, torch.device):
                return _META
            return self._fake(item) if isinstance(item, Gathered | GatheredMask | Tokens) else item

        given, named = map_aggregate(args, fake), map_aggregate(kwargs, fake)
        try:
            if node.op == "call_method":
                made = getattr(given[0], str(node.target))(*given[1:], **named)  # type: ignore[index]
            else:
                made = node.target(*given, **named)  # type: ignore[operator, misc]
        except _FAILURES:
            return None
        return self._matched(node, made)

    def _fake(self, marker: Any) -> Any:
        batch = _hint_of(self.batch, self.boundary.hidden, 0)
        match marker:
            case Tokens(factor, batched):
                return factor * self.other * (batch if batched else 1)
            case GatheredMask(None):
                return torch.empty((batch, 1, 1, self.other), dtype=torch.bool, device=_META)
            case GatheredMask(node):
                value = value_of(node)
                assert value is not None
                heads, queries = (1, self.other) if value.dim() == 2 else (hint(value.shape[1]), self.other)
                if value.dim() == 4 and same_size(value.shape[2], 1):
                    queries = 1
                return torch.empty((batch, heads, queries, self.other), dtype=value.dtype, device=_META)
            case Gathered(node, dims, rank):
                value = value_of(node)
                assert value is not None
                sizes = [1] * (rank - value.dim()) + [hint(size) for size in value.shape]
                sizes[0] = batch
                for dim in dims:
                    sizes[dim + rank - value.dim()] = self.other
                return torch.empty(sizes, dtype=value.dtype, device=_META)
        raise AssertionError(marker)

    def _matched(self, node: Node, made: Any) -> Value | None:
        """What an attempt made, if it differs from what was traced in the number of tokens alone."""
        traced = node.meta.get("example_value")
        if isinstance(traced, list | tuple) and isinstance(made, list | tuple):
            return Value(made, (Span(),)) if len(made) == len(traced) else None
        if not isinstance(traced, torch.Tensor) or not isinstance(made, torch.Tensor):
            return Value(made) if not isinstance(traced, torch.Tensor) else None
        if made.dim() != traced.dim():
            return None
        spans: list[Span | None] = []
        for before, after in zip(traced.shape, made.shape, strict=True):
            if hint(before) == after:
                spans.append(None)
            elif hint(before) * self.other == after * self.count:
                span = self._span_of(node, expression(before))
                if span is None:
                    return None
                spans.append(span)
            else:
                return None
        return Value(made, tuple(spans))

    def _span_of(self, node: Node, size: sympy.Expr) -> Span | None:
        if size == self.tokens:
            return Span()
        spans = {
            span
            for source in node.all_input_nodes
            for span in self._value(source).spans
            if span is not None and span.before * self.tokens * span.after == size
        }
        return spans.pop() if len(spans) == 1 else None

    def _choices(self, node: Node) -> Iterator[dict[Node, Any]]:
        """Ways to make operands from outside fit, those that gather least first."""
        tracked = [source for source in node.all_input_nodes if self._value(source).tracked]
        rank = max(len(self._value(source).spans) for source in tracked)
        options: list[list[tuple[Node, Any] | None]] = []
        for source in node.all_input_nodes:
            value = value_of(source)
            if source in tracked or value is None:
                continue
            if source in self.masks:
                options.append([None, (source, GatheredMask(source))])
                continue
            dims = [dim for dim, size in enumerate(value.shape) if expression(size) == self.tokens]
            wide = max(rank, value.dim())
            ways: list[tuple[Node, Any] | None] = [None]
            for number in range(1, len(dims) + 1):
                for some in itertools.combinations(dims, number):
                    if self._has_batch(value, wide) and some[0] + wide - value.dim() > 0:
                        ways.append((source, Gathered(source, some, wide)))
            if len(ways) > 1:
                options.append(ways)
        found = [[pair for pair in way if pair is not None] for way in itertools.product(*options)]
        for pairs in sorted(found, key=lambda pairs: sum(_dims(marker) for _, marker in pairs)):
            if pairs:
                yield dict(pairs)

    def _has_batch(self, value: torch.Tensor, rank: int) -> bool:
        """Whether the first dimension, once there are `rank`, is that of the samples."""
        return value.dim() < rank or expression(value.shape[0]) in (1, self.batch)

    def _choose(self, node: Node, choice: dict[Node, Any]) -> None:
        left = {source: marker for source, marker in choice.items() if not self._lift(source, marker)}
        if not left:
            return
        args, kwargs = self.followed.arguments.get(node, (node.args, node.kwargs))

        def place(item: Any) -> Any:
            return left.get(item, item) if isinstance(item, Node) else item

        self.followed.arguments[node] = (map_aggregate(args, place), map_aggregate(kwargs, place))

    def _lift(self, node: Node, marker: Any) -> bool:
        """Gather in front of an added axis or a cast that stands inside the layers; whether that could be done.

        One gather then serves all layers, and what follows it looks as it did.
        """
        if not isinstance(marker, Gathered) or node not in self.inside or marker.rank != len(shape_of(node) or ()):
            return False
        if any(user not in self.inside or user in self.values for user in node.users):
            return False
        axis = inserted_axis(node)
        source = axis[0] if axis is not None else cast_source(node)
        value = value_of(source)
        if source is None or value is None or self._value(source).tracked:
            return False
        dims, place = marker.dims, None if axis is None else axis[1] % marker.rank
        if place is not None:
            if place == 0 or place in dims:
                return False
            dims = tuple(dim - (dim > place) for dim in dims)
        below = Gathered(source, dims, value.dim())
        if not self._lift(source, below):
            self.followed.arguments[node] = ((below, *node.args[1:]), node.kwargs)
        spans = tuple(Span() if dim in marker.dims else None for dim in range(marker.rank))
        self.values[node] = Value(self._fake(marker), spans)
        return True

    # ---- values

    def _value(self, node: Node) -> Value:
        """A node's value on the other number of tokens; what does not depend on the hidden states is as traced."""
        if node in self.values:
            return self.values[node]
        if node not in self.outside:
            self.outside[node] = Value(map_aggregate(node.meta.get("example_value"), self._untouched))
        return self.outside[node]

    @staticmethod
    def _untouched(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return torch.empty([hint(size) for size in item.shape], dtype=item.dtype, device=_META)
        if isinstance(item, torch.SymInt | torch.SymFloat | torch.SymBool):
            return item.node.hint
        return item

    def _scaled(self, node: Node, spans: Spans) -> Value:
        value = value_of(node)
        assert value is not None
        sizes = [
            hint(size) // self.count * self.other if span is not None else hint(size)
            for size, span in zip(value.shape, spans, strict=True)
        ]
        return Value(torch.empty(sizes, dtype=value.dtype, device=_META), spans)

    def _is_tracked(self, item: Any) -> bool:
        return isinstance(item, Node) and self._value(item).tracked

    def _check_fits(self, node: Node, spans: Spans) -> None:
        other = node.args[1]
        if not isinstance(other, Node) or self._value(other).spans != spans:
            raise Lost(self._unfollowed(node))

    def _unfollowed(self, node: Node) -> str:
        return f"{layer_of(node)}: the tokens cannot be followed through {_name(node)} ({node.name})"

    # ---- what leaves the layers

    def _find_exits(self) -> None:
        cached = {node for site in self.boundary.sites for node in (site.key, site.value)}
        hidden = expressions(shape_of(self.boundary.hidden) or ())
        for node, value in self.values.items():
            if node is self.boundary.hidden or not value.tracked:
                continue
            readers = [user for user in node.users if user not in self.inside]
            if node in cached:
                readers = [user for user in readers if user.op != "output"]
            if not readers:
                continue
            if value.spans != (None, Span(), None) or expressions(shape_of(node) or ()) != hidden:
                raise Lost(f"{layer_of(node)}: {node.name} is read behind the decoder layers ({readers[0].name})")
            self.followed.exits[node] = readers


def _hint_of(expression: sympy.Expr, node: Node, dim: int) -> int:
    shape = shape_of(node)
    assert shape is not None
    return hint(shape[dim])


def _dims(marker: Any) -> int:
    return len(marker.dims) if isinstance(marker, Gathered) else 1


def _name(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))


def _with_mask(node: Node, mask: Any) -> tuple[Any, Any]:
    """Arguments of `scaled_dot_product_attention` with a mask where there is none."""
    if len(node.args) > 3:
        return (*node.args[:3], mask, *node.args[4:]), node.kwargs
    return node.args, {**node.kwargs, "attn_mask": mask}
