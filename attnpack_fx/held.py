"""What a packed tensor holds besides its tail: segments, where their tokens are, and what reading them takes."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnpack_fx.angles import SharedAngles
from attnpack_fx.containers import container, map_tensors, tensors_in
from attnpack_fx.kernels.parts import (
    ASYMMETRIC,
    OWNED,
    ROWS,
    Angles,
    AnglesForm,
    Block,
    Form,
    RowForm,
    Rows,
    Segment,
    code_bytes,
    formats,
    kind,
    rank_of,
    row_extras,
    tensors_of,
    tokens_of,
)
from attnpack_fx.placement import Placement
from attnpack_fx.resting import Resting
from attnpack_fx.shared import copies

#: What a segment of `Rows` is called among the modalities: it holds tokens of any.
ROW_SEGMENT = "rows"


@container
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


@container
@dataclass(frozen=True, eq=False)
class Held:
    """The packed part of a key or value tensor; immutable, shared by every handle with the same packed part.

    segments, modalities: in slot order, low-rank ones first; `"vision"` or `"text"`, or `ROW_SEGMENT`, for each.
    placement: where each placed token is stored; angles: of keys stored before rotary embedding.
    reserve: of every block of the first segment, the coefficients of the tokens that it does not cover, kept for when
        attention turns to them; empty when nothing is in reserve.
    losses: what is known about the error of each modality's segment; closed: whether it takes no more folds.
    heads: 0, or the number of KV heads, each of which keeps tokens of its own (`Form.heads`).
    resting: what is held besides, and not read at present.
    pinned: how many of the oldest tail rows stay dense whatever else is coded or merged.
    left: of a sliding window, how many tokens have left whose slots are not free yet.
    """

    segments: tuple[Segment[Tensor], ...]
    modalities: tuple[str, ...]
    placement: Placement
    angles: SharedAngles | None = None
    reserve: tuple[Tensor, ...] = ()
    losses: tuple[tuple[str, Loss], ...] = ()
    closed: bool = False
    heads: int = 0
    resting: "Resting | None" = None
    pinned: int = 0
    left: int = 0

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Slots of each segment."""
        return tuple(tokens_of(segment.blocks[0]) for segment in self.segments)

    @cached_property
    def packed(self) -> int:
        """Slots in segments."""
        return sum(self.counts)

    @cached_property
    def kept(self) -> int:
        """How many tail rows hold placed tokens."""
        return self.placement.index.shape[1] - self.packed

    @property
    def blocks(self) -> list[Block[Tensor] | Rows[Tensor]]:
        return [block for segment in self.segments for block in segment.blocks]

    @property
    def factors(self) -> list[Block[Tensor]]:
        """The low-rank blocks."""
        return [block for block in self.blocks if isinstance(block, Block)]

    @cached_property
    def forms(self) -> tuple[Form, Form]:
        """What compiled graphs are made for: without and with an importance."""
        angles = None
        if self.angles is not None:
            held = self.angles.packed
            axes, own_axes = (0, False) if held.axes is None else (held.axes.shape[1], held.axes.shape[0] > 1)
            own_rows, pairs = held.cos.shape[0] > 1, held.cos.shape[2]
            angles = AnglesForm(pairs, axes, own_rows, own_axes, held.interleaved, held.cos.dtype)
        plain = Form(
            self.modalities,
            tuple(tuple(map(kind, segment.blocks)) for segment in self.segments),
            tuple(tuple(is_shared(block) for block in segment.blocks) for segment in self.segments),
            self.placement.ragged,
            angles,
            tuple(_spec(block) for block in self.blocks if isinstance(block, Rows)),
            self.heads,
        )
        return plain, replace(plain, weighed=True)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """What varies: slots, placed tokens, tokens and rank of blocks, rows and slots of angles; see `fake_parts`."""
        blocks = [size for block in self.blocks for size in _sizes(block)]
        rows = []
        if self.angles is not None:
            rows.append(self.angles.packed.cos.shape[1])
            rows += [] if self.angles.packed.axes is None else [self.angles.slots]
        return self.placement.index.shape[1], self.placement.tokens, *blocks, *rows

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """The tensors a compiled graph takes, by name, but for `slot`, which is found when it is asked for."""
        found = {"index": self.placement.index}
        for number, block in enumerate(self.blocks):
            found |= {f"{name}_{number}": tensor for name, tensor in tensors_of(block).items()}
        if self.angles is not None:
            held = self.angles.packed
            found |= {"cos": held.cos, "sin": held.sin} | ({} if held.axes is None else {"axes": held.axes})
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that takes memory."""
        return tensors_in(self)

    def select(self, rows: Tensor) -> "Held":
        """The samples `rows` (int64 `[B']`) of the batch, copied; what samples or layers share they go on sharing."""

        def chosen(name: str, part: Tensor) -> Tensor:
            return copies.of(part, rows, lambda: part.index_select(0, rows))

        def of_block(block: Block[Tensor] | Rows[Tensor]) -> Block[Tensor] | Rows[Tensor]:
            own_basis = isinstance(block, Block) and block.owner is None and not is_shared(block)
            kept = ("codebook",) if own_basis else ("codebook", "basis")
            return map_tensors(lambda name, part: part if name in kept else chosen(name, part), block)

        return replace(
            self,
            segments=self._mapped(of_block),
            placement=self.placement.select(rows),
            angles=None if self.angles is None else self.angles.select(rows),
            reserve=map_tensors(chosen, self.reserve),
            losses=map_tensors(chosen, self.losses),
            resting=None if self.resting is None else self.resting.select(rows),
        )

    def map(
        self, function: Callable[[Tensor], Tensor], to: torch.device | None = None, name: Hashable = None
    ) -> "Held":
        """Apply a shape-preserving `function` that copies to every floating factor; `to`: where to move the rest.

        name: the same for what does the same; layers then go on sharing what they share. None: the function itself.
        """

        def moved(_: str, tensor: Tensor) -> Tensor:
            return tensor if to is None else tensor.to(to)

        def number(name: str, tensor: Tensor) -> Tensor:
            return function(tensor) if tensor.is_floating_point() else moved(name, tensor)

        def of_block(block: Block[Tensor] | Rows[Tensor]) -> Block[Tensor] | Rows[Tensor]:
            fixed = ("codebook", "scale") if isinstance(block, Block) else ("codebook",)

            def copied(part: str, tensor: Tensor) -> Tensor:
                made = moved if part in fixed else number
                return copies.of(tensor, (name or function, to), lambda: _apart(made(part, tensor), tensor))

            return map_tensors(copied, block)

        return replace(
            self,
            segments=self._mapped(of_block),
            placement=self.placement if to is None else self.placement.to(to),
            angles=self.angles if to is None or self.angles is None else self.angles.to(to),
            reserve=map_tensors(number, self.reserve),
            losses=map_tensors(moved, self.losses),
            resting=None if self.resting is None else self.resting.map(function, to),
        )

    def _mapped(self, function: Callable[[Any], Any]) -> tuple[Segment[Tensor], ...]:
        """Segments with another block for each."""
        return tuple(Segment(tuple(map(function, segment.blocks))) for segment in self.segments)

    def apart(self, heads: int) -> "Held":
        """Of a tensor that holds no segment, with every KV head a sample of its own."""
        angles = None if self.angles is None else self.angles.apart(heads)
        return replace(self, placement=self.placement.apart(heads), angles=angles, heads=heads)

    def join(self, others: Sequence["Held"]) -> "Held | None":
        """The samples of self, then those of the others, where they have the same segments; else None.

        Only for segments of one block each, as it is and not shared, with nothing in reserve.
        """
        every = [self, *others]
        plain = ((0,),) * len(self.segments), ((False,),) * len(self.segments), (), self.heads
        turned = [None if held.angles is None else held.angles.packed.interleaved for held in every]
        for held in every:
            form = held.forms[0]
            if held.modalities != self.modalities or held.reserve or held.resting or held.pinned:
                return None
            if (form.kinds, form.shared, form.rows, form.heads) != plain:
                return None
        if len(set(turned)) > 1:
            return None
        counts = [held.counts for held in every]
        segments = tuple(
            Segment((Block(stacked([b.coefficient for b in alike]), stacked([b.basis for b in alike])),))
            for alike in zip(*(held.factors for held in every), strict=True)
        )
        angles = None
        if self.angles is not None:
            batches = [held.placement.index.shape[0] for held in every]
            angles = self.angles.join([held.angles for held in others if held.angles is not None], batches, counts)
        placement = self.placement.join([held.placement for held in others], counts)
        losses = _joined([dict(held.losses) for held in every])
        closed = any(held.closed for held in every)
        return Held(segments, self.modalities, placement, angles, losses=losses, closed=closed, heads=self.heads)


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


def _apart(made: Tensor, source: Tensor) -> Tensor:
    """What is made of a tensor, as memory of its own."""
    return made.clone() if made is source else made


def is_shared(block: Block[Tensor] | Rows[Tensor]) -> bool:
    """Whether all samples have one basis."""
    if isinstance(block, Rows):
        return False
    return block.owner is None and block.basis.shape[0] != block.coefficient.shape[0]


#: Tensors of `Rows` whose second dim is not the number of tokens, each with a size of its own.
_OTHER_SIZES = ("outliers", "right")


def _sizes(block: Block[Tensor] | Rows[Tensor]) -> list[int]:
    if isinstance(block, Rows):
        varying = [block.scale] if block.form.channel else []
        varying += [block.extras[name] for name in _OTHER_SIZES if name in block.extras]
        return [block.codes.shape[1], *(tensor.shape[1] for tensor in varying)]
    bases = [] if block.owner is None else [block.basis.shape[0]]
    return [block.coefficient.shape[1], rank_of(block), *bases]


def _spec(block: Rows[Tensor]) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
    """Dtypes and fixed dims of a block, by name: all of a codebook, of others those beyond samples and tokens."""
    return tuple(
        (name, tensor.dtype, tuple(tensor.shape) if name == "codebook" else tuple(tensor.shape[2:]))
        for name, tensor in tensors_of(block).items()
    )


def fake_parts(
    form: Form, rows: Tensor, sizes: Sequence[int]
) -> tuple[tuple[Segment[Tensor], ...], Tensor, int, Angles[Tensor] | None]:
    """Segments, index, number of placed tokens, and angles as tensors of these forms and sizes, for tracing.

    rows: a tail `[rows, B, H, D]`; sizes: `Held.sizes`.
    """
    batch = rows.shape[1]
    slots, placed, *varying = sizes
    remaining, specs = iter(varying), iter(form.rows)
    segments = []
    for kinds_of, shared_of in zip(form.kinds, form.shared, strict=True):
        blocks: list[Block[Tensor] | Rows[Tensor]] = []
        for stored, shared in zip(kinds_of, shared_of, strict=True):
            block: Block[Tensor] | Rows[Tensor]
            if stored & ROWS:
                block = _fake_rows(stored, next(specs), rows, remaining)
            else:
                block = _fake_factors(stored, shared, rows, remaining)
            blocks.append(block)
        segments.append(Segment(tuple(blocks)))
    index = rows.new_empty((batch, slots), dtype=torch.int64)
    angles = None
    if form.angles is not None:
        own, size = form.angles, next(remaining)
        shape = batch if own.own_rows else 1, size, own.pairs
        cos, sin = (rows.new_empty(shape, dtype=own.dtype) for _ in range(2))
        axes = None
        if own.axes:
            covered = next(remaining)  # not all slots, where coded rows behind hold keys as they are attended
            axes = rows.new_empty((batch if own.own_axes else 1, own.axes, covered), dtype=torch.int64)
        angles = Angles(cos, sin, axes, own.interleaved)
    return tuple(segments), index, placed, angles


def _fake_factors(stored: int, shared: bool, rows: Tensor, remaining: Iterator[int]) -> Block[Tensor]:
    _, batch, heads, dim = rows.shape
    tokens, rank = next(remaining), next(remaining)
    (bits, basis_bits), samples, owner, scale = formats(stored), 1 if shared else batch, None, None
    asymmetric = bool(stored & ASYMMETRIC)
    if stored & OWNED:
        samples, owner = next(remaining), rows.new_empty((batch,), dtype=torch.int64)
    coefficient = rows.new_empty((batch, tokens, rank))
    basis = rows.new_empty((samples, heads, rank, dim))
    if bits:
        coefficient = rows.new_empty((batch, tokens, code_bytes(rank, bits)), dtype=torch.uint8)
    if basis_bits:
        basis = rows.new_empty((samples, heads, rank, code_bytes(dim, basis_bits)), dtype=torch.uint8)
    if bits or basis_bits:
        scale = rows.new_empty((batch, 4 if asymmetric else 2, rank), dtype=torch.float32)
    return Block(coefficient, basis, scale, bits, owner, basis_bits, asymmetric)


def _fake_rows(stored: int, spec: Any, rows: Tensor, remaining: Iterator[int]) -> Rows[Tensor]:
    form, tokens = RowForm.of(stored), next(remaining)
    sizes = {"scale": next(remaining)} if form.channel else {}
    sizes |= {name: next(remaining) for name in _OTHER_SIZES if name in row_extras(form)}
    if form.channel:
        sizes["zero"] = sizes["scale"]
    if "outliers" in sizes:
        sizes["places"] = sizes["outliers"]

    def made(name: str, dtype: torch.dtype, dims: tuple[int, ...]) -> Tensor:
        shape = dims if name == "codebook" else (rows.shape[1], sizes.get(name, tokens), *dims)
        return rows.new_empty(shape, dtype=dtype)

    return Rows(form, **{name: made(name, dtype, dims) for name, dtype, dims in spec})
