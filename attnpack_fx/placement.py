"""Which logical token each stored slot holds: one small object shared by the keys and values of every layer packed
alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as _pad

from attnpack_fx.containers import container, map_tensors, tensors_in
from attnpack_fx.kernels.aten.plan import slots
from attnpack_fx.shared import Memo, copies, version_of


@container
@dataclass(eq=False)
class Placement:
    """Slots of the prompt tokens of a packed cache (`kernels/parts.py`).

    index: int64 `[B, N]`, logical position of each prompt slot, -1 for filler.
    tokens: how many logical prompt positions there are; `slot` says where each is stored, from `index`.
    ragged: whether `index` holds filler.
    vision: bool `[B, P]`, which logical positions had vision tokens stored, where anything asks; later ones are none.
    absent: int64 `[B]`, how many prompt positions never had a slot, as padding has none, where anything asks.

    Layers share one placement. Operations that derive a new one remember the last result, so that reordering or moving
    a cache layer by layer keeps it shared.
    """

    index: Tensor
    tokens: int
    ragged: bool
    vision: Tensor | None = None
    absent: Tensor | None = None
    _memo: Memo = field(default_factory=Memo, init=False, repr=False)

    @classmethod
    def from_plan(
        cls,
        indices: list[Tensor],
        slot: Tensor,
        vision: Tensor | None = None,
        *,
        moves: bool = False,
        window: bool = False,
    ) -> "Placement":
        """From the index of each segment and of the dense prompt tokens, in slot order.

        moves: whether tokens may leave or change places later, and leave filler where samples differ. window: whether
        the oldest will leave one by one, each leaving filler at first.
        """
        index = torch.cat(indices, dim=1) if len(indices) > 1 else indices[0]
        differ = window or (moves and index.shape[0] > 1)
        absent = (slot < 0).sum(1) if moves else None
        if window:  # what a later mask shows of them cannot be told by its first columns
            absent = index.new_zeros(index.shape[0])
        return cls(index, slot.shape[1], differ or _has_filler(index), vision, absent)

    @property
    def slot(self) -> Tensor:
        """Slot of each logical prompt position, int64 `[B, P]`, -1 for padding and what was evicted.

        Found when asked for, which attention never does: it would take as much memory as `index`, and go on doing so
        for tokens that are gone.
        """
        return slots(self.index, self.tokens)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that takes memory."""
        return tensors_in(self)

    @property
    def vision_slots(self) -> Tensor:
        """Which slots hold vision tokens, bool `[B, N]`; none where no modality is kept."""

        def derive() -> Tensor:
            found = self.is_vision(self.index)
            return torch.zeros_like(self.index, dtype=torch.bool) if found is None else found

        return self._memo.derive("vision slots", (), derive)

    @property
    def least_missing(self) -> int:
        """`missing` of the sample with the fewest."""
        return self._memo.derive("least missing", (), lambda: int(self.missing.min()) if len(self.index) else 0)

    @property
    def most_missing(self) -> int:
        """`missing` of the sample with the most."""
        return self._memo.derive("most missing", (), lambda: int(self.missing.max()) if len(self.index) else 0)

    @property
    def missing(self) -> Tensor:
        """`absent`; where nothing asked for it and no token has left yet, those that have no slot."""
        return self.tokens - (self.index >= 0).sum(1) if self.absent is None else self.absent

    def _missing_as_many(self, made: "Placement") -> "Placement":
        """`made`, of which is known what `most_missing` reads from the device, as of this one."""
        made._memo.derive("most missing", (), lambda: self.most_missing)
        return made

    def is_vision(self, position: Tensor) -> Tensor | None:
        """Bool, of logical positions int64 `[B, n]` (-1: not); None where no modality is kept."""
        if self.vision is None:
            return None
        known = self.vision.shape[1]
        if not known:
            return torch.zeros_like(position, dtype=torch.bool)
        inside = (position >= 0) & (position < known)
        return self.vision.gather(1, position.clamp(0, known - 1)) & inside

    def derived(self, name: str, arguments: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What layers placed alike derive for themselves, and share as they share this."""
        return self._memo.derive(name, arguments, make)

    def apart(self, heads: int) -> "Placement":
        """With every sample repeated for each of its heads."""

        def derive() -> Placement:
            return self._map(lambda each: each.repeat_interleave(heads, 0))

        return self._memo.derive("apart", (heads,), derive)

    def select(self, rows: Tensor) -> "Placement":
        """The samples `rows` (int64 `[B']`) of the batch."""

        def derive() -> Placement:
            return self._map(lambda each: copies.of(each, rows, lambda: each.index_select(0, rows)))

        return self._memo.derive("select", (rows, version_of(rows)), derive)

    def crop(self, tokens: int) -> "Placement":
        """Only the first `tokens` logical prompt positions; their slots keep their numbers."""

        def derive() -> Placement:
            index = self.index.masked_fill(self.index >= tokens, -1)
            ragged = self.ragged or _has_filler(index)
            vision = None if self.vision is None else self.vision[:, :tokens].clone()
            return Placement(index, min(tokens, self.tokens), ragged, vision, self.absent)

        return self._memo.derive("crop", (tokens,), derive)

    def extend(self, count: int) -> "Placement":
        """With slots for the first `count` tokens appended so far, which follow the placed ones."""

        def derive() -> Placement:
            end = self.tokens + count
            positions = torch.arange(self.tokens, end, device=self.index.device).expand(self.index.shape[0], -1)
            index = torch.cat([self.index, positions], 1)
            return self._missing_as_many(Placement(index, end, self.ragged, self.vision, self.absent))

        return self._memo.derive("extend", (count,), derive)

    def newest(self, tokens: int) -> "Placement":
        """Only the last `tokens` logical positions, counted anew from 0; slots of the others are filler."""

        def derive() -> Placement:
            gone = self.tokens - tokens
            index = (self.index - gone).clamp(min=-1)
            vision = None if self.vision is None else self.vision[:, gone:].clone()
            return Placement(index, tokens, True, vision, self.absent)

        return self._memo.derive("newest", (tokens,), derive)

    def reorder(self, order: Tensor) -> "Placement":
        """With the first slots in another order, int64 `[B, n]`; for one layer, so not remembered."""
        index = torch.cat([self.index.gather(1, order), self.index[:, order.shape[1] :]], 1)
        return self._missing_as_many(Placement(index, self.tokens, self.ragged, self.vision, self.absent))

    def moved(self, index: Tensor) -> "Placement":
        """With other tokens in other slots, int64 `[B, n]`; for one layer, so not remembered."""
        ragged = self.ragged or _has_filler(index)
        return self._missing_as_many(Placement(index, self.tokens, ragged, self.vision, self.missing))

    def join(self, others: Sequence["Placement"], counts: Sequence[Sequence[int]]) -> "Placement":
        """The samples of self, then those of the others, whose prompts are as long.

        counts: how many slots each segment has, of self first. Every segment, and the dense prompt tokens behind them,
        get as many slots as the widest has; what others lack is filler.
        """

        def derive() -> Placement:
            parts = []
            for placement, sizes in zip([self, *others], counts, strict=True):
                dense = placement.index.shape[1] - sum(sizes)
                parts.append(placement.index.split([*sizes, dense], dim=1))
            columns = []
            for alike in zip(*parts, strict=True):
                widest = max(part.shape[1] for part in alike)
                columns.append(torch.cat([_pad(part, (0, widest - part.shape[1]), value=-1) for part in alike]))
            index = torch.cat(columns, dim=1)
            every, vision, absent = (self, *others), None, None
            if any(each.vision is not None for each in every):
                none = (each.index.new_zeros((each.index.shape[0], 0), dtype=torch.bool) for each in every)
                flags = [other if each.vision is None else each.vision for each, other in zip(every, none, strict=True)]
                widest = max(each.shape[1] for each in flags)
                vision = torch.cat([_pad(each, (0, widest - each.shape[1])) for each in flags])
            if any(each.absent is not None for each in every):
                absent = torch.cat([each.missing for each in every])
            ragged = self.ragged or _has_filler(index)
            return Placement(index, self.tokens, ragged, vision, absent)

        return self._memo.derive("join", (*others, *map(tuple, counts)), derive)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Placement":
        if self.index.device == device:
            return self

        def derive() -> Placement:
            return self._map(lambda each: copies.of(each, device, lambda: each.to(device, non_blocking=non_blocking)))

        return self._memo.derive("to", (device,), derive)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Placement":
        return map_tensors(lambda _, each: function(each), self)

    def same_as(self, other: "Placement") -> bool:
        """Whether both place every token alike (compares contents only when the objects differ, and once)."""
        if self is other:
            return True
        if (
            self.tokens != other.tokens
            or self.index.shape != other.index.shape
            or self.index.device != other.index.device
        ):
            return False
        return self._memo.derive("same as", (other,), lambda: torch.equal(self.index, other.index))


def _has_filler(index: Tensor) -> bool:
    return index.shape[1] > 0 and bool((index < 0).any())
