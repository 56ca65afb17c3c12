"""Rotary embedding of keys that are stored before it: one small object shared by the keys of every layer.

Fidelity is why it exists: rotation spreads a key over dims of every frequency and costs about a factor of four in rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad as _pad

from attnpack_fx.containers import container, map_tensors, tensors_in
from attnpack_fx.kernels.parts import Angles
from attnpack_fx.kernels.rotary import per_slot
from attnpack_fx.kernels.rotary_axes import tabulate
from attnpack_fx.shared import Memo, copies, version_of


@container
@dataclass(eq=False)
class SharedAngles:
    """cos and sin of a packed cache's tokens.

    packed: of the slots in segments.
    tail: `(cos, sin)` pieces `[B or 1, k, E / 2]` of the tail's rows in order, where they may be folded; else None.
    """

    packed: Angles[Tensor]
    tail: tuple[tuple[Tensor, Tensor], ...] | None = None
    _memo: Memo = field(default_factory=Memo, init=False, repr=False)

    @classmethod
    def of_prompt(
        cls, cos: Tensor, sin: Tensor, index: Tensor, packed: int, interleaved: bool, keep_tail: bool
    ) -> "SharedAngles":
        """From those of the prompt, `[B or 1, P, E / 2]`, and where tokens went: `packed` slots of `index`, or tail."""
        if cos.shape[0] == 1 and bool((index == index[:1]).all()):
            index = index[:1]
        rows = _one_for_all(*(_rows(each, index) for each in (cos, sin)))
        # Copies: of one sample, a slice is contiguous, and would keep the rows of the tail alive.
        held = rows[0][:, :packed].clone(), rows[1][:, :packed].clone()
        table = tabulate(*held) if cos.element_size() <= 4 else None
        angles = Angles(*held, None, interleaved) if table is None else Angles(*table, interleaved)
        tail = ((rows[0][:, packed:].clone(), rows[1][:, packed:].clone()),) if keep_tail else None
        return cls(angles, tail)

    @property
    def tensors(self) -> list[Tensor]:
        return tensors_in(self)

    def appended(self, cos: Tensor, sin: Tensor, heads: int = 0) -> "SharedAngles":
        """With new rows in the tail; what the first layer asks for, the others of the call share.

        heads: as in `Held`, of which cos and sin know nothing.
        """
        if self.tail is None:
            return self
        tail = self.tail

        def derive() -> SharedAngles:
            apart = heads and cos.shape[0] > 1
            # Copies, for they may be half of what the graph gave.
            new = (each.repeat_interleave(heads, 0) if apart else each.clone() for each in (cos, sin))
            return SharedAngles(self.packed, (*tail, tuple(new)))  # type: ignore[arg-type]

        return self._memo.derive("appended", (cos, sin, heads), derive)

    def untracked(self) -> "SharedAngles":
        """Without those of the tail, which then has rows of unknown angles: it takes no folds."""
        if self.tail is None:
            return self
        return self._memo.derive("untracked", (), lambda: SharedAngles(self.packed))

    def cropped(self, length: int) -> "SharedAngles":
        """With the first `length` rows of the tail."""
        if self.tail is None:
            return self

        def derive() -> SharedAngles:
            cos, sin = self.tail_rows()
            return SharedAngles(self.packed, ((cos[:, :length].clone(), sin[:, :length].clone()),))

        return self._memo.derive("cropped", (length,), derive)

    def tail_rows(self) -> tuple[Tensor, Tensor]:
        """cos and sin `[B or 1, length, E / 2]` of the tail."""
        assert self.tail is not None
        batch = max(piece[0].shape[0] for piece in self.tail)
        cos, sin = (
            torch.cat([each.expand(batch, -1, -1) for each in pieces], 1) for pieces in zip(*self.tail, strict=True)
        )
        return cos, sin

    def folded(self, count: int) -> "SharedAngles":
        """With the first `count` tail rows behind the packed slots."""

        def derive() -> SharedAngles:
            cos, sin = self.tail_rows()
            new = cos[:, :count], sin[:, :count]
            # Samples with angles of their own keep them, so that nothing need be compared, which reads from the device.
            packed = _extended(self.packed, *(new if self.packed.cos.shape[0] > 1 else _one_for_all(*new)))
            return SharedAngles(packed, ((cos[:, count:].clone(), sin[:, count:].clone()),))

        return self._memo.derive("folded", (count,), derive)

    def dropped(self, count: int) -> "SharedAngles":
        """Without the first `count` tail rows, which are packed as they are."""
        if self.tail is None or not count:
            return self

        def derive() -> SharedAngles:
            cos, sin = self.tail_rows()
            return SharedAngles(self.packed, ((cos[:, count:].clone(), sin[:, count:].clone()),))

        return self._memo.derive("dropped", (count,), derive)

    def taken(self, packed: Tensor, tail: Tensor) -> "SharedAngles":
        """Of some of the first `slots` packed slots, and some tail rows, int64 `[B, n]` each, -1 for filler."""

        def derive() -> SharedAngles:
            made = self.reordered(packed.clamp(min=0))
            if self.tail is None:
                return made
            rows = (_rows(each.expand(tail.shape[0], -1, -1), tail) for each in self.tail_rows())
            return SharedAngles(made.packed, (tuple(rows),))  # type: ignore[arg-type]

        return self._memo.derive("taken", (packed, tail), derive)

    def apart(self, heads: int) -> "SharedAngles":
        """Of every sample's heads; one sample stands for all."""
        return self._memo.derive(
            "apart",
            (heads,),
            lambda: self._map(lambda each: each if each.shape[0] == 1 else each.repeat_interleave(heads, 0)),
        )

    def woken(
        self,
        axes: Tensor | None,
        counts: Sequence[int],
        more: Sequence[int],
        turns: tuple[Tensor, Tensor] | None = None,
    ) -> "SharedAngles":
        """Of packed slots with resting ones behind those of each segment, and of more tail rows.

        axes: of the resting ones, in turn; counts, more: slots, and resting ones, of each of the first segments; turns:
        cos and sin `[B, n, E / 2]`.
        """
        own = self.packed.axes
        assert own is not None and axes is not None
        rest = own.shape[2] - sum(counts)
        pairs = zip(own.split([*counts, rest], 2), axes.split([*more[: len(counts)], 0], 2), strict=True)
        joined = torch.cat([each for pair in pairs for each in pair], 2)
        angles = Angles(self.packed.cos, self.packed.sin, joined, self.packed.interleaved)
        tail = None if self.tail is None or turns is None else (*self.tail, turns)
        return SharedAngles(angles, tail)

    @property
    def slots(self) -> int:
        """How many packed slots have angles: the first ones; others are not rotated."""
        return self.packed.cos.shape[1] if self.packed.axes is None else self.packed.axes.shape[2]

    def reordered(self, order: Tensor) -> "SharedAngles":
        """Of packed slots in another order, int64 `[B, N]`; for one layer, which takes rows of the tables all share."""
        angles, batch = self.packed, order.shape[0]
        axes = order[:, None]
        if angles.axes is not None:
            known = angles.axes.expand(batch, -1, -1)
            axes = known.gather(2, axes.expand(-1, known.shape[1], -1))
        return SharedAngles(Angles(angles.cos, angles.sin, axes, angles.interleaved), self.tail)

    def by_number(self) -> "SharedAngles":
        """With a row number for every packed slot, of which some may be taken later and the form stay as it is."""
        if self.packed.axes is not None:
            return self
        order = torch.arange(self.slots, device=self.packed.cos.device)[None]
        return self._memo.derive("by number", (), lambda: self.reordered(order))

    def select(self, rows: Tensor) -> "SharedAngles":
        """The samples `rows` (int64 `[B']`) of the batch."""
        return self._memo.derive(
            "select", (rows, version_of(rows)), lambda: self._map(lambda each: _chosen(each, rows))
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "SharedAngles":
        if self.packed.cos.device == device:
            return self

        def derive() -> SharedAngles:
            return self._map(lambda each: copies.of(each, device, lambda: each.to(device, non_blocking=non_blocking)))

        return self._memo.derive("to", (device,), derive)

    def join(
        self, others: Sequence["SharedAngles"], batches: Sequence[int], counts: Sequence[Sequence[int]]
    ) -> "SharedAngles":
        """The samples of self, then those of the others.

        batches, counts: how many samples, and slots of each segment, of self first.
        """

        def derive() -> SharedAngles:
            every = [self, *others]
            joined = []
            for number in (0, 1):
                parts = []
                for angles, batch, sizes in zip(every, batches, counts, strict=True):
                    rows = per_slot(angles.packed, 0, sum(sizes))[number]
                    parts.append(rows.expand(batch, -1, -1).split(list(sizes), 1))
                joined.append(torch.cat([_stack(alike) for alike in zip(*parts, strict=True)], 1))
            return SharedAngles(Angles(joined[0], joined[1], None, self.packed.interleaved))

        return self._memo.derive("join", (*others, *map(tuple, counts)), derive)

    def same_as(self, other: "SharedAngles") -> bool:
        """Whether both turn every slot alike; compares contents."""
        if self is other:
            return True
        forms = [(each.packed.interleaved, each.packed.axes is None, each.tail is None) for each in (self, other)]
        pairs = zip(self.tensors, other.tensors, strict=True) if len(self.tensors) == len(other.tensors) else None
        return forms[0] == forms[1] and pairs is not None and all(_equal(*pair) for pair in pairs)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "SharedAngles":
        return map_tensors(lambda _, each: function(each), self)


def _equal(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)


def _one_for_all(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of one sample, where all have the same: positions of multimodal prompts are given by sample, alike or not."""
    if cos.shape[0] > 1 and all(bool((each == each[:1]).all()) for each in (cos, sin)):
        return cos[:1], sin[:1]
    return cos, sin


def _rows(each: Tensor, index: Tensor) -> Tensor:
    """Rows `index` `[B, n]` (-1: any) of each `[B or 1, P, E / 2]`."""
    sample = torch.arange(index.shape[0], device=each.device)[:, None]
    return each.expand(index.shape[0], -1, -1)[sample, index.clamp(min=0)]


def _chosen(each: Tensor, rows: Tensor) -> Tensor:
    return each if each.shape[0] == 1 else copies.of(each, rows, lambda: each.index_select(0, rows))


def _stack(alike: Sequence[Tensor]) -> Tensor:
    widest = max(part.shape[1] for part in alike)
    return torch.cat([_pad(part, (0, 0, 0, widest - part.shape[1])) for part in alike])


def _extended(angles: Angles[Tensor], cos: Tensor, sin: Tensor) -> Angles[Tensor]:
    """With a row for every new slot, `[B or 1, k, E / 2]`."""
    batch = max(cos.shape[0], angles.cos.shape[0])
    old, count = angles.cos.shape[1], cos.shape[1]
    every = [each.expand(batch, -1, -1) for each in (angles.cos, cos, angles.sin, sin)]
    if angles.axes is None:
        return Angles(torch.cat(every[:2], 1), torch.cat(every[2:], 1), None, angles.interleaved)
    # A new slot takes its whole angle from a row of its own, and nothing from the other axes: the last, zero row.
    zero = every[0].new_zeros((batch, 1, cos.shape[2]))
    axes = angles.axes
    own = torch.arange(old, old + count, device=axes.device)
    new = axes.new_full((*axes.shape[:2], count), old + count)
    new[:, 0] = own
    tables = torch.cat([*every[:2], zero], 1), torch.cat([*every[2:], zero], 1)
    return Angles(*tables, torch.cat([axes, new], 2), angles.interleaved)
