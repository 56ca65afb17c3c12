"""Layers that share what they hold: what a method is asked, and what it answers.

Dense keys of two adjacent layers, and so their values, become one direction for both and a length for each; a few
tokens stay as they are in both. Older tokens are merged; the newest stay dense until more have come.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnpack_fx.passes.method import Method, Stage


@dataclass(frozen=True)
class Merged:
    """Tokens of two layers as one: a row of the lower layer is about `lower_norm * direction`, so in the upper.

    direction: `[B, n, H, D]`, unit rows in the dtype of the tokens; zero where both layers hold zero, as in filler.
    lower_norm, upper_norm: fp32 `[B, n, H]`, exact.
    retained: bool `[B, n]`: tokens that both layers keep as they are, in all heads, so that both keep the same ones.
    """

    direction: Tensor
    lower_norm: Tensor
    upper_norm: Tensor
    retained: Tensor


@dataclass(frozen=True)
class Merging(Method):
    """A rule for which layers share, and what they share."""

    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.MERGE})

    def pairs(self, count: int) -> list[tuple[int, int]]:
        """Of `count` decoder layers those that share, `(lower, upper)`, no layer twice."""
        raise NotImplementedError

    def due(self, rows: int, prefill: bool) -> int:
        """How many of the oldest of `rows` dense tokens are to be merged now."""
        raise NotImplementedError

    def merge(self, lower: Tensor, upper: Tensor) -> Merged:
        """Merge the keys, or the values, of tokens of two layers: `[B, n, H, D]` each, filler rows zero."""
        raise NotImplementedError
