"""Stored tokens that no decode step reads at present, kept for when attention turns to them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Resting:
    """What one key or value tensor holds besides what is read, whole tokens.

    coefficients: of every low-rank block, `[B, n_s, r]` with n_s resting tokens of its segment.
    tail: dense rows `[n, B, H, D]`.
    index: int64 `[B, N]`, logical positions: of every segment's resting tokens in turn, then of the tail's; -1 filler.
    counts: n_s of every low-rank segment, then n.
    axes: int64 `[B, A, n_s of all]`, the rows of packed tokens in tables of angles; importance: of keys, fp32 `[B, N]`.
    turns: cos and sin `[B, n, E / 2]` of the tail, where those of tail rows are kept.
    started: how many logical tokens the prompt had.
    """

    coefficients: tuple[Tensor, ...]
    tail: Tensor
    index: Tensor
    counts: tuple[int, ...]
    axes: Tensor | None
    importance: Tensor | None
    started: int
    turns: tuple[Tensor, Tensor] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that takes memory."""
        more = (each for each in (self.axes, self.importance) if each is not None)
        return [*self.coefficients, self.tail, self.index, *more, *(self.turns or ())]

    def select(self, rows: Tensor) -> "Resting":
        """The samples `rows` (int64 `[B']`) of the batch, copied."""
        return Resting(
            tuple(each.index_select(0, rows) for each in self.coefficients),
            self.tail.index_select(1, rows),
            self.index.index_select(0, rows),
            self.counts,
            None if self.axes is None else self.axes.index_select(0, rows),
            None if self.importance is None else self.importance.index_select(0, rows),
            self.started,
            self._turned(lambda each: each.index_select(0, rows)),
        )

    def map(self, function: Callable[[Tensor], Tensor], to: torch.device | None = None) -> "Resting":
        """Apply a shape-preserving `function` that copies to every number; `to`: where to move the rest."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor if to is None else tensor.to(to)

        return Resting(
            # Codes are no numbers.
            tuple(moved(each) if each.dtype == torch.uint8 else function(each) for each in self.coefficients),
            function(self.tail),
            moved(self.index),
            self.counts,
            None if self.axes is None else moved(self.axes),
            None if self.importance is None else moved(self.importance),
            self.started,
            self._turned(moved),
        )

    def crop(self, tokens: int) -> "Resting":
        """Without those at logical positions from `tokens` on."""
        return replace(self, index=self.index.masked_fill(self.index >= tokens, -1))

    def _turned(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        return None if self.turns is None else (function(self.turns[0]), function(self.turns[1]))
