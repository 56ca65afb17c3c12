"""Stored tokens that no decode step reads at present, kept for when attention turns to them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnpack_fx.containers import container, map_tensors, tensors_in


@container
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
        return tensors_in(self)

    def select(self, rows: Tensor) -> "Resting":
        """The samples `rows` (int64 `[B']`) of the batch, copied."""
        return map_tensors(lambda name, each: each.index_select(1 if name == "tail" else 0, rows), self)

    def map(self, function: Callable[[Tensor], Tensor], to: torch.device | None = None) -> "Resting":
        """Apply a shape-preserving `function` that copies to every number; `to`: where to move the rest."""

        def copied(name: str, each: Tensor) -> Tensor:
            if name in ("coefficients", "tail") and each.is_floating_point():
                return function(each)
            return each if to is None else each.to(to)

        return map_tensors(copied, self)

    def crop(self, tokens: int) -> "Resting":
        """Without those at logical positions from `tokens` on."""
        return replace(self, index=self.index.masked_fill(self.index >= tokens, -1))
