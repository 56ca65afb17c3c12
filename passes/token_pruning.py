"""Fewer tokens flow through later decoder layers: what a method is shown, and what it answers.

A method only chooses: which rows the layers from `layer` on see, and what these hold. Everything else, following the
tokens through those layers, is done once for all methods (`prune_tokens.py`).
"""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.fx import Graph, Node

from attnpack_fx.kernels import ops_prune  # noqa: F401  (registers torch.ops.attnpack)
from attnpack_fx.passes.fields import is_count, is_share
from attnpack_fx.passes.method import Method, Stage


@dataclass(frozen=True)
class Prompt:
    """The prompt where the layer before the boundary ends, as graph nodes; padding included.

    hidden: `[B, T, C]`, what enters the layer; query `[B, Hq, T, D]`, key `[B, H, T, D]`: as the attention of the layer
        before reads them.
    mask: of that attention, `[T, T]` or `[B or 1, Hq or 1, T, T]`, bool or added to the scores; None: causal.
    scale: its softmax scale. vision: bool `[B, T]`.
    """

    graph: Graph
    hidden: Node
    query: Node
    key: Node
    mask: Node | None
    scale: float
    vision: Node

    def call(self, operation: Any, *arguments: Any) -> Node:
        """One more operation, at this place of the graph."""
        return self.graph.call_function(operation.default, arguments)

    def items(self, made: Node, count: int) -> list[Node]:
        """The `count` results of an operation that returns several."""
        return [self.graph.call_function(operator.getitem, (made, item)) for item in range(count)]


class Pruning(NamedTuple):
    """rows: int64 `[B, T']`, positions of the rows that stay, ascending, filled up with -1; hidden: `[B, T', C]`."""

    rows: Node
    hidden: Node


@dataclass(frozen=True)
class TokenPruning(Method):
    """A rule that leaves out vision tokens from a decoder layer on, at prefill.

    Text and system tokens always stay, and so does the prompt's last token.

    layer: the first decoder layer, from 0, that sees fewer tokens; at least 1.

    Raises ValueError for a field of a wrong type or value.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.TOKENS})

    layer: int = 2

    def __post_init__(self) -> None:
        checked_count(self, "layer", self.layer, "2 as in FastV; layer 0 has no attention before it")

    def prune(self, prompt: Prompt) -> Pruning:
        """Write the choice into the graph. All real text tokens must be among rows, and no padding."""
        raise NotImplementedError


def keep(prompt: Prompt, scores: Node, share: float) -> Pruning:
    """Keep the vision tokens of highest score as they are, `round(share N)` of a sample's N."""
    prune = torch.ops.attnpack
    rows = prompt.call(prune.kept_rows, scores, prompt.vision, prompt.mask, share)
    return Pruning(rows, prompt.call(prune.gather_tokens, prompt.hidden, rows, 1))


def checked_count(method: Method, name: str, value: Any, example: str, least: int = 1) -> None:
    """Raise ValueError unless `value` is an int of at least `least`."""
    if not is_count(value, least):
        raise ValueError(f"{method.name}.{name}: got {value!r}, expected an int of at least {least}; e.g. {example}")


def checked_share(method: Method, name: str, value: Any, example: str) -> None:
    """Raise ValueError unless `value` is a number from 0 to 1."""
    if not is_share(value):
        raise ValueError(f"{method.name}.{name}: got {value!r}, expected a number from 0 to 1; e.g. {example}")
