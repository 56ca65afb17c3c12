"""What a packed tensor holds besides its tail: segments, where their tokens are, and what reading them takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnpack_fx.angles import SharedAngles
from attnpack_fx.kernels.parts import OWNED, Angles, AnglesForm, Block, Form, Segment, formats, kind
from attnpack_fx.placement import Placement


@dataclass(frozen=True, eq=False)
class Loss:
    """How far a segment may be from the tokens packed into it, in Frobenius norm.

    squares: `[B]` float64, the sum of squares of those tokens; bound: `[B]` float64, the norms of what each truncation
    dropped, added up: by the triangle inequality no less than the error (rounding of the stored factors apart).
    """

    squares: Tensor
    bound: Tensor

    @property
    def relative(self) -> float:
        """The worst sample's bound over the norm of its tokens."""
        norms = self.squares.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        return float((self.bound / norms).max()) if self.bound.numel() else 0.0

    def map(self, function: Callable[[Tensor], Tensor]) -> "Loss":
        return Loss(function(self.squares), function(self.bound))


@dataclass(frozen=True, eq=False)
class Held:
    """The packed part of a key or value tensor; immutable, shared by every handle with the same packed part.

    segments, modalities: low-rank parts in slot order, and `"vision"` or `"text"` for each.
    placement: where each placed token is stored; angles: of keys stored before rotary embedding.
    reserve: of every block of the first segment, the coefficients of the tokens that it does not cover, kept for when
        attention turns to them; empty when nothing is in reserve.
    losses: what is known about the error of each modality's segment; closed: whether it takes no more folds.
    """

    segments: tuple[Segment[Tensor], ...]
    modalities: tuple[str, ...]
    placement: Placement
    angles: SharedAngles | None = None
    reserve: tuple[Tensor, ...] = ()
    losses: tuple[tuple[str, Loss], ...] = ()
    closed: bool = False

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Slots of each segment."""
        return tuple(segment.blocks[0].coefficient.shape[1] for segment in self.segments)

    @cached_property
    def packed(self) -> int:
        """Slots in segments."""
        return sum(self.counts)

    @cached_property
    def kept(self) -> int:
        """How many tail rows hold placed tokens."""
        return self.placement.index.shape[1] - self.packed

    @property
    def blocks(self) -> list[Block[Tensor]]:
        return [block for segment in self.segments for block in segment.blocks]

    @cached_property
    def forms(self) -> tuple[Form, Form]:
        """What compiled graphs are made for: without and with an importance."""
        angles = None
        if self.angles is not None:
            held = self.angles.packed
            axes, own_axes = (0, False) if held.axes is None else (held.axes.shape[1], held.axes.shape[0] > 1)
            own_rows, width = held.cos.shape[0] > 1, held.cos.shape[2]
            angles = AnglesForm(width, axes, own_rows, own_axes, held.interleaved, held.cos.dtype)
        plain = Form(
            self.modalities,
            tuple(tuple(map(kind, segment.blocks)) for segment in self.segments),
            tuple(tuple(is_shared(block) for block in segment.blocks) for segment in self.segments),
            self.placement.ragged,
            angles,
        )
        return plain, replace(plain, weighed=True)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """What varies: slots, placed tokens, tokens and rank of every block, rows of angles. `fake_parts` reads it."""
        blocks = [size for block in self.blocks for size in _sizes(block)]
        rows = [] if self.angles is None else [self.angles.packed.cos.shape[1]]
        return self.placement.index.shape[1], self.placement.slot.shape[1], *blocks, *rows

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """The tensors a compiled graph takes, by name."""
        found = {"index": self.placement.index, "slot": self.placement.slot}
        for number, block in enumerate(self.blocks):
            found[f"coefficient_{number}"], found[f"basis_{number}"] = block.coefficient, block.basis
            if block.scale is not None:
                found[f"scale_{number}"] = block.scale
            if block.owner is not None:
                found[f"owner_{number}"] = block.owner
        if self.angles is not None:
            held = self.angles.packed
            found |= {"cos": held.cos, "sin": held.sin} | ({} if held.axes is None else {"axes": held.axes})
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that takes memory."""
        angles = [] if self.angles is None else self.angles.tensors
        losses = [each for _, loss in self.losses for each in (loss.squares, loss.bound)]
        return [*self.named.values(), *angles, *self.reserve, *losses]

    def select(self, rows: Tensor) -> "Held":
        """The samples `rows` (int64 `[B']`) of the batch, copied; what samples share they go on sharing."""
        shared = self.forms[0].shared

        def chosen(block: Block[Tensor], alike: bool) -> Block[Tensor]:
            owner = None if block.owner is None else block.owner.index_select(0, rows)
            basis = block.basis if alike or owner is not None else block.basis.index_select(0, rows)
            scale = None if block.scale is None else block.scale.index_select(0, rows)
            return Block(block.coefficient.index_select(0, rows), basis, scale, block.bits, owner)

        segments = tuple(
            Segment(tuple(map(chosen, segment.blocks, alike)))
            for segment, alike in zip(self.segments, shared, strict=True)
        )
        return replace(
            self,
            segments=segments,
            placement=self.placement.select(rows),
            angles=None if self.angles is None else self.angles.select(rows),
            reserve=tuple(each.index_select(0, rows) for each in self.reserve),
            losses=tuple((name, loss.map(lambda each: each.index_select(0, rows))) for name, loss in self.losses),
        )

    def map(self, function: Callable[[Tensor], Tensor], to: torch.device | None = None) -> "Held":
        """Apply a shape-preserving `function` that copies to every floating factor; `to`: where to move the rest."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor if to is None else tensor.to(to)

        def applied(block: Block[Tensor]) -> Block[Tensor]:
            owner = None if block.owner is None else moved(block.owner)
            if block.bits:
                assert block.scale is not None
                codes, basis, scale = (moved(part).clone() for part in (block.coefficient, block.basis, block.scale))
                return Block(codes, basis, scale, block.bits, owner)
            return Block(function(block.coefficient), function(block.basis), owner=owner)

        return replace(
            self,
            segments=tuple(Segment(tuple(map(applied, segment.blocks))) for segment in self.segments),
            placement=self.placement if to is None else self.placement.to(to),
            angles=self.angles if to is None or self.angles is None else self.angles.to(to),
            reserve=tuple(moved(each) if each.dtype == torch.uint8 else function(each) for each in self.reserve),
            losses=tuple((name, loss.map(moved)) for name, loss in self.losses),
        )

    def join(self, others: Sequence["Held"]) -> "Held | None":
        """The samples of self, then those of the others, where they have the same segments; else None.

        Only for segments of one block each, as it is and not shared, with nothing in reserve.
        """
        every = [self, *others]
        plain = ((0,),) * len(self.segments), ((False,),) * len(self.segments)
        turned = [None if held.angles is None else held.angles.packed.interleaved for held in every]
        for held in every:
            form = held.forms[0]
            if held.modalities != self.modalities or (form.kinds, form.shared) != plain or held.reserve:
                return None
        if len(set(turned)) > 1:
            return None
        counts = [held.counts for held in every]
        segments = tuple(
            Segment((Block(stacked([b.coefficient for b in alike]), stacked([b.basis for b in alike])),))
            for alike in zip(*(held.blocks for held in every), strict=True)
        )
        angles = None
        if self.angles is not None:
            batches = [held.placement.index.shape[0] for held in every]
            angles = self.angles.join([held.angles for held in others if held.angles is not None], batches, counts)
        placement = self.placement.join([held.placement for held in others], counts)
        losses = _joined([dict(held.losses) for held in every])
        closed = any(held.closed for held in every)
        return Held(segments, self.modalities, placement, angles, losses=losses, closed=closed)

    def state(self) -> dict[str, Any]:
        """Everything, in plain containers and tensors; `from_state` is the inverse."""
        angles = self.angles
        return {
            "segments": [
                [(block.coefficient, block.basis, block.scale, block.bits, block.owner) for block in segment.blocks]
                for segment in self.segments
            ],
            "modalities": list(self.modalities),
            "placement": (self.placement.index, self.placement.slot, self.placement.ragged),
            "angles": None if angles is None else angles.state(),
            "reserve": list(self.reserve),
            "losses": [(name, loss.squares, loss.bound) for name, loss in self.losses],
            "closed": self.closed,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Held":
        return cls(
            tuple(Segment(tuple(Block(*block) for block in blocks)) for blocks in state["segments"]),
            tuple(state["modalities"]),
            Placement(*state["placement"]),
            None if state["angles"] is None else SharedAngles.from_state(state["angles"]),
            tuple(state["reserve"]),
            tuple((name, Loss(squares, bound)) for name, squares, bound in state["losses"]),
            state["closed"],
        )


def _joined(losses: Sequence[dict[str, Loss]]) -> tuple[tuple[str, Loss], ...]:
    """Those that are known of all samples."""
    names = [name for name in losses[0] if all(name in each for each in losses)]
    alike = {name: [each[name] for each in losses] for name in names}
    return tuple(
        (name, Loss(torch.cat([each.squares for each in of]), torch.cat([each.bound for each in of])))
        for name, of in alike.items()
    )


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors in one batch, those smaller in other dims filled up by zeros."""
    widest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    out, start = parts[0].new_zeros((sum(part.shape[0] for part in parts), *widest)), 0
    for part in parts:
        out[(slice(start, start + part.shape[0]), *map(slice, part.shape[1:]))] = part
        start += part.shape[0]
    return out


def is_shared(block: Block[Tensor]) -> bool:
    """Whether all samples have one basis."""
    return block.owner is None and block.basis.shape[0] != block.coefficient.shape[0]


def _sizes(block: Block[Tensor]) -> list[int]:
    bases = [] if block.owner is None else [block.basis.shape[0]]
    return [block.coefficient.shape[1], rank_of(block), *bases]


def rank_of(block: Block[Tensor]) -> int:
    """Columns of a block."""
    return (block.coefficient if block.scale is None else block.scale).shape[2]


def fake_parts(
    form: Form, rows: Tensor, sizes: Sequence[int]
) -> tuple[tuple[Segment[Tensor], ...], Tensor, Tensor, Angles[Tensor] | None]:
    """Segments, index, slot and angles as tensors of these forms and sizes, for tracing.

    rows: a tail `[rows, B, H, D]`; sizes: `Held.sizes`.
    """
    _, batch, heads, dim = rows.shape
    slots, placed, *varying = sizes
    remaining = iter(varying)
    packed = 0
    segments = []
    for kinds_of, shared_of in zip(form.kinds, form.shared, strict=True):
        blocks: list[Block[Tensor]] = []
        for stored, shared in zip(kinds_of, shared_of, strict=True):
            tokens, rank = next(remaining), next(remaining)
            packed += 0 if blocks else tokens
            (bits, basis_bits), samples, owner = formats(stored), 1 if shared else batch, None
            if stored & OWNED:
                samples, owner = next(remaining), rows.new_empty((batch,), dtype=torch.int64)
            if bits:
                codes = rows.new_empty((batch, tokens, -(-rank * bits // 8)), dtype=torch.uint8)
                basis = rows.new_empty((samples, heads, rank, -(-dim * basis_bits // 8)), dtype=torch.uint8)
                scale = rows.new_empty((batch, 2, rank), dtype=torch.float32)
                blocks.append(Block(codes, basis, scale, bits, owner))
            else:
                factors = rows.new_empty((batch, tokens, rank)), rows.new_empty((samples, heads, rank, dim))
                blocks.append(Block(*factors, owner=owner))
        segments.append(Segment(tuple(blocks)))
    index, slot = (rows.new_empty((batch, size), dtype=torch.int64) for size in (slots, placed))
    angles = None
    if form.angles is not None:
        own, size = form.angles, next(remaining)
        shape = batch if own.own_rows else 1, size, own.width
        cos, sin = (rows.new_empty(shape, dtype=own.dtype) for _ in range(2))
        axes = None
        if own.axes:
            axes = rows.new_empty((batch if own.own_axes else 1, own.axes, packed), dtype=torch.int64)
        angles = Angles(cos, sin, axes, own.interleaved)
    return tuple(segments), index, slot, angles
