"""Follow the token dimension through decoder layers, and find what must change where there are fewer tokens.

Every operation behind the boundary is tried on shapes with another number of tokens (`token_trial.py`). A dimension
that changes with it holds tokens. Sizes written into the graph are rewritten where a view's prefix products say that a
size is the number of tokens, so that another size of the same value is left alone. What comes from outside and does not
fit is gathered in the dimensions that make it fit. What cannot be followed so is a reason to leave the whole graph as
it is.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from attnpack_fx.passes.in_place import written
from attnpack_fx.passes.layer_boundary import Boundary
from attnpack_fx.passes.patterns import argument, cast_source, inserted_axis, is_call, layer_of, value_of
from attnpack_fx.passes.state import GraphState, shape_of
from attnpack_fx.passes.token_spans import (
    Gathered,
    GatheredMask,
    Lost,
    Span,
    Spans,
    Tokens,
    expression,
    expressions,
    regrouped,
)
from attnpack_fx.passes.token_trial import Trial, Value


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


class _Follower:
    def __init__(self, state: GraphState, boundary: Boundary) -> None:
        self.state, self.boundary = state, boundary
        self.trial = Trial(boundary)
        self.inside = set(boundary.nodes)
        self.masks = {site.mask for site in boundary.sites if site.mask is not None}
        self.calls = {site.node: site for site in boundary.sites}
        self.followed = Followed()

    def run(self) -> Followed:
        with torch.no_grad():
            for node in self.boundary.nodes:
                if node.op in ("call_function", "call_method"):
                    self._visit(node)
        self._find_exits()
        return self.followed

    def _visit(self, node: Node) -> None:
        if not any(self.trial.value(source).tracked for source in node.all_input_nodes):
            return
        if is_call(node, *_POSITIONAL):
            self._check_untouched(node)
        if not all(map(self.trial.tracked, written(node))):
            raise Lost(f"{layer_of(node)} writes tokens to a tensor that lives outside ({node.name})")
        if is_call(node, *_VIEWS) and self._is_view(node):
            self._view(node)
        elif is_call(node, "expand"):
            self._expand(node)
        elif is_call(node, "getitem") and self.trial.tracked(node.args[0]) and value_of(node.args[0]) is not None:
            self._index(node)
        else:
            self._operate(node)

    # ---- views and slices: sizes written into the graph

    def _is_view(self, node: Node) -> bool:
        """Whether it only rearranges dimensions, as opposed to `view(dtype)`."""
        source, value = value_of(node.args[0]), value_of(node)
        return source is not None and value is not None and self.trial.tracked(node.args[0])

    def _view(self, node: Node) -> None:
        source = node.args[0]
        assert isinstance(source, Node)
        before, after = shape_of(source), shape_of(node)
        assert before is not None and after is not None
        spans = regrouped(self.trial.value(source).spans, expressions(before), expressions(after), self.trial.tokens)
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
        self.trial.values[node] = self.trial.scaled(node, spans)

    def _expand(self, node: Node) -> None:
        source = node.args[0]
        if not isinstance(source, Node) or not self.trial.tracked(source):
            raise Lost(self._unfollowed(node))
        given = node.args[1:] or tuple(node.kwargs.values())
        nested = len(given) == 1 and isinstance(given[0], tuple | list)
        sizes = list(given[0]) if nested else list(given)  # type: ignore[arg-type]
        old = self.trial.value(source).spans
        spans: Spans = (*(None,) * (len(sizes) - len(old)), *old)
        changed = self._sizes(node, sizes, spans)
        self.followed.arguments[node] = ((source, changed) if nested else (source, *changed), {})
        self.trial.values[node] = self.trial.scaled(node, spans)

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
        rest = factor / self.trial.batch if batched else factor
        if not rest.is_Integer:
            raise Lost(self._unfollowed(node))
        return Tokens(int(rest), batched)

    def _index(self, node: Node) -> None:
        """`x[...]`: all tokens or none of their dimension may be chosen; a slice up to T takes all there are."""
        source, keys = node.args
        assert isinstance(source, Node)
        spans = self.trial.value(source).spans
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
        return isinstance(stop, int | torch.SymInt) and expression(stop) == self.trial.tokens

    def _check_untouched(self, node: Node) -> None:
        """Raise unless an operation that picks rows picks them in another dimension than that of the tokens."""
        source = node.args[0] if node.args else None
        position = {"split": 2, "chunk": 2, "tensor_split": 2, "topk": 2}.get(_name(node), 1)
        dim = argument(node, position, "dim", -1 if is_call(node, "topk", "sort", "argsort") else 0)
        known = isinstance(source, Node) and self.trial.tracked(source) and isinstance(dim, int)
        if not known or is_call(node, "setitem", "take", "masked_scatter", "masked_scatter_"):
            raise Lost(f"{layer_of(node)} takes some of the tokens by number ({node.name})")
        assert isinstance(source, Node)
        spans = self.trial.value(source).spans
        if spans[dim] is not None:
            raise Lost(f"{layer_of(node)} takes some of the tokens by number ({node.name})")

    # ---- any other operation: tried on the other number of tokens

    def _operate(self, node: Node) -> None:
        site = self.calls.get(node)
        alone = site is not None and site.mask is None and not site.is_causal and self.trial.tracked(site.key)
        if site is not None and alone and self.trial.batch != 1:
            # Filler stands behind the real tokens; without a causal mask they would be attended to.
            if site.kind != "sdpa":
                raise Lost(f"{layer_of(node)} attends without a mask")
            self.followed.arguments[node] = _with_mask(node, GatheredMask(None))
        args, kwargs = self.followed.arguments.get(node, (node.args, node.kwargs))
        value = self.trial.attempt(node, args, kwargs, {})
        if value is None:
            for choice in self._choices(node):
                value = self.trial.attempt(node, args, kwargs, choice)
                if value is not None:
                    self._choose(node, choice)
                    break
        if value is None:
            raise Lost(self._unfollowed(node))
        self.trial.values[node] = value

    def _choices(self, node: Node) -> Iterator[dict[Node, Any]]:
        """Ways to make operands from outside fit, those that gather least first."""
        tracked = [source for source in node.all_input_nodes if self.trial.value(source).tracked]
        rank = max(len(self.trial.value(source).spans) for source in tracked)
        options: list[list[tuple[Node, Any] | None]] = []
        for source in node.all_input_nodes:
            value = value_of(source)
            if source in tracked or value is None:
                continue
            if source in self.masks:
                options.append([None, (source, GatheredMask(source))])
                continue
            dims = [dim for dim, size in enumerate(value.shape) if expression(size) == self.trial.tokens]
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
        return value.dim() < rank or expression(value.shape[0]) in (1, self.trial.batch)

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
        if any(user not in self.inside or user in self.trial.values for user in node.users):
            return False
        axis = inserted_axis(node)
        source = axis[0] if axis is not None else cast_source(node)
        value = value_of(source)
        if source is None or value is None or self.trial.value(source).tracked:
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
        self.trial.values[node] = Value(self.trial.fake(marker), spans)
        return True

    def _check_fits(self, node: Node, spans: Spans) -> None:
        other = node.args[1]
        if not isinstance(other, Node) or self.trial.value(other).spans != spans:
            raise Lost(self._unfollowed(node))

    def _unfollowed(self, node: Node) -> str:
        return f"{layer_of(node)}: the tokens cannot be followed through {_name(node)} ({node.name})"

    # ---- what leaves the layers

    def _find_exits(self) -> None:
        cached = {node for site in self.boundary.sites for node in (site.key, site.value)}
        hidden = expressions(shape_of(self.boundary.hidden) or ())
        for node, value in self.trial.values.items():
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


def _dims(marker: Any) -> int:
    return len(marker.dims) if isinstance(marker, Gathered) else 1


def _name(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))


def _with_mask(node: Node, mask: Any) -> tuple[Any, Any]:
    """Arguments of `scaled_dot_product_attention` with a mask where there is none."""
    if len(node.args) > 3:
        return (*node.args[:3], mask, *node.args[4:]), node.kwargs
    return node.args, {**node.kwargs, "attn_mask": mask}
