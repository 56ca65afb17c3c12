"""Operations tried on another number of tokens than they were traced with: meta tensors, nothing is computed."""

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from attnpack_fx.passes.layer_boundary import Boundary
from attnpack_fx.passes.patterns import value_of
from attnpack_fx.passes.state import same_size, shape_of
from attnpack_fx.passes.token_spans import Gathered, GatheredMask, Span, Spans, Tokens, expression, hint

_META = torch.device("meta")
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Value:
    """A node's value on the other number of tokens; spans: of each dimension, None for one without tokens."""

    fake: Any
    spans: Spans = ()

    @property
    def tracked(self) -> bool:
        return any(self.spans)


class Trial:
    """The values of nodes on the other number of tokens.

    batch, tokens: sizes as traced. values: of nodes that depend on the hidden states, as they become known.
    """

    def __init__(self, boundary: Boundary) -> None:
        shape = shape_of(boundary.hidden)
        assert shape is not None
        self.batch, self.tokens = expression(shape[0]), expression(shape[1])
        self.samples, self.count = hint(shape[0]), hint(shape[1])
        sizes = [hint(size) for node in boundary.nodes for size in shape_of(node) or ()]
        #: A prime no other size can be mistaken for.
        self.other = int(sympy.nextprime(max([self.count, *sizes])))
        self.values: dict[Node, Value] = {}
        self.outside: dict[Node, Value] = {}
        self.values[boundary.hidden] = self.scaled(boundary.hidden, (None, Span(), None))

    def tracked(self, item: Any) -> bool:
        """Whether an argument is a node that holds tokens."""
        return isinstance(item, Node) and self.value(item).tracked

    def attempt(self, node: Node, args: Any, kwargs: Any, choice: dict[Node, Any]) -> Value | None:
        """An operation on the other number of tokens, some operands replaced by markers; None where it does not fit."""

        def fake(item: Any) -> Any:
            if isinstance(item, Node):
                return self.fake(choice[item]) if item in choice else self.value(item).fake
            if isinstance(item, torch.device):
                return _META
            return self.fake(item) if isinstance(item, Gathered | GatheredMask | Tokens) else item

        given, named = map_aggregate(args, fake), map_aggregate(kwargs, fake)
        try:
            if node.op == "call_method":
                made = getattr(given[0], str(node.target))(*given[1:], **named)
            else:
                made = node.target(*given, **named)  # type: ignore[operator]
        except _FAILURES:
            return None
        return self._matched(node, made)

    def fake(self, marker: Any) -> Any:
        """What stands for a marker."""
        batch = self.samples
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
            for span in self.value(source).spans
            if span is not None and span.before * self.tokens * span.after == size
        }
        return spans.pop() if len(spans) == 1 else None

    def value(self, node: Node) -> Value:
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

    def scaled(self, node: Node, spans: Spans) -> Value:
        """A node's value with its tokens in these spans."""
        value = value_of(node)
        assert value is not None
        sizes = [
            hint(size) // self.count * self.other if span is not None else hint(size)
            for size, span in zip(value.shape, spans, strict=True)
        ]
        return Value(torch.empty(sizes, dtype=value.dtype, device=_META), spans)
