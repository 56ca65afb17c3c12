"""From the factors of a truncated SVD to what is stored: the rank the data asks for, blocks of columns, their bits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnpack_fx.angles import SharedAngles
from attnpack_fx.held import Held, Loss
from attnpack_fx.kernels.aten.quantize import quantize
from attnpack_fx.kernels.balance import lengths
from attnpack_fx.kernels.parts import Block, Segment
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.state import Modality
from attnpack_fx.passes.storage import Columns, both
from attnpack_fx.placement import Placement
from attnpack_fx.tail import TailBuffer


@dataclass(frozen=True)
class Factored:
    """Tokens of one modality as operators factor them.

    coefficient `[B, N, R]`, basis `[B, H, R, D]`, or with owner int64 `[B]` bases `[G, H, R, D]`; given: the model's
    basis `[1, H, R', D]`, which then stands before these. columns: what is kept, and in how many bits.
    index: int64 `[B, N]`, which logical positions they are.
    """

    coefficient: Tensor
    basis: Tensor
    columns: Columns
    index: Tensor
    owner: Tensor | None = None
    given: Tensor | None = None


def assemble(
    factored: Mapping[Modality, Factored],
    rows: Tensor,
    placement: Placement,
    *,
    squares: Tensor | None = None,
    angles: Callable[[int], SharedAngles | None] = lambda _: None,
    heads: int = 0,
    room: int | None = None,
) -> PackedTensor:
    """Keys, or values, of one layer from what operators made of them at prefill.

    factored: by modality, in slot order; what has no tokens is left out. rows: dense tokens `[m, B, H, D]`.
    squares: `[B, T]` of every token, where errors are to be known; angles: of so many packed slots, for keys before
    rotary embedding; heads: as in `Held`; room: as in `TailBuffer`.
    """
    segments, losses = {}, []
    for name, each in factored.items():
        if each.coefficient.shape[1]:
            total = None if squares is None else squares_of(squares, each.index)
            basis = _after(each.given, each.basis)
            segments[name], loss = store(each.coefficient, basis, each.columns, total, each.owner)
            losses += [] if loss is None else [(name, loss)]
    turned = angles(sum(segment.factors[0].coefficient.shape[1] for segment in segments.values()))
    held = Held(tuple(segments.values()), tuple(segments), placement, turned, losses=tuple(losses))
    if heads:
        held, rows = held.apart(heads), rows.flatten(1, 2)[:, :, None]
    return PackedTensor(held, TailBuffer(rows, room).lease(rows.shape[0]))


def store(
    coefficient: Tensor,
    basis: Tensor,
    columns: Columns,
    squares: Tensor | None = None,
    owner: Tensor | None = None,
) -> tuple[Segment[Tensor], Loss | None]:
    """One segment, and how far it is from the tokens where the sum of their squares `[B]` is given.

    coefficient: `[B, N, R]`; basis: `[B, H, R, D]`, or `[G, H, R, D]` with owner `[B]`; fewer columns than `columns`
        asks for are fine.
    """
    kept = coefficient.shape[2]
    if columns.energy is not None:
        assert squares is not None
        kept = _rank_of(_long(coefficient, basis, owner), columns.energy, squares)
    if owner is not None and (basis.shape[0] == 1 or torch.equal(owner, torch.arange(len(owner), device=owner.device))):
        owner = None  # one basis for all, or one for each in order
    blocks: list[Block[Tensor]] = []
    start = 0
    for count, bits in columns.blocks:
        assert count != "full", "resolved before it reaches the graph"
        end = min(start + count, kept)
        if end > start or not blocks:
            blocks.append(_block(coefficient, basis, owner, start, end, both(bits), columns.asymmetric))
        start = end
    loss = None
    if squares is not None:
        squares = squares.double()
        held = _long(coefficient[:, :, :kept], basis, owner).square().sum((1, 2))
        loss = Loss(squares, (squares - held).clamp(min=0).sqrt())
    return Segment(tuple(blocks)), loss


def _after(given: Tensor | None, bases: Tensor) -> Tensor:
    """The model's basis `[1, H, R', D]`, cut to R columns, then those of samples that have their own `[G, H, R, D]`.

    Where none has, that is no copy: requests share the model's.
    """
    if given is None:
        return bases
    common = given[:, :, : bases.shape[2]]
    return torch.cat([common, bases]) if bases.shape[0] else common


def squares_of(tokens: Tensor, index: Tensor) -> Tensor:
    """The sum over a segment, float64 `[B]`, of what each token has: tokens `[B, T]`, index `[B, N]` with filler -1."""
    chosen = tokens.double().gather(1, index.clamp(min=0))
    return chosen.masked_fill_(index < 0, 0).sum(1)


def _long(coefficient: Tensor, basis: Tensor, owner: Tensor | None) -> Tensor:
    """Coefficients in float64, as they are of a basis whose rows have length 1."""
    wide = coefficient.double()
    if coefficient.dtype != torch.float16:
        return wide
    of_bases = lengths(basis)[:, None, None]
    return wide * (of_bases if owner is None else of_bases.index_select(0, owner))


def _rank_of(coefficient: Tensor, energy: float, squares: Tensor) -> int:
    """The smallest rank that keeps that share of the squared Frobenius norm of every sample, at least 1."""
    held = coefficient.square().sum(1).cumsum(1)
    enough = held >= energy * squares.double()[:, None]
    # Samples that never get there keep all columns.
    short = (~enough).sum(1).clamp(max=coefficient.shape[2] - 1)
    return int(short.max()) + 1 if short.numel() else coefficient.shape[2]


def _block(
    coefficient: Tensor,
    basis: Tensor,
    owner: Tensor | None,
    start: int,
    end: int,
    formats: tuple[int, int],
    asymmetric: bool,
) -> Block[Tensor]:
    whole = start == 0 and end == coefficient.shape[2]
    if not whole:
        # Copies: a view would keep the columns that are not stored.
        coefficient, basis = coefficient[:, :, start:end].clone(), basis[:, :, start:end].clone()
    if formats == (0, 0):
        return Block(coefficient, basis, owner=owner)
    if owner is None:
        codes, basis_codes, scale = quantize(coefficient, basis, *formats, asymmetric)
        return Block(codes, basis_codes, scale, formats[0], None, formats[1], asymmetric)
    codes, _, scale = quantize(coefficient, basis[:1], *formats, asymmetric)
    _, basis_codes, of_bases = quantize(basis.new_zeros(basis.shape[0], 0, end - start), basis, *formats, asymmetric)
    scale = scale.clone()
    scale[:, 1::2] = of_bases[owner, 1::2]  # of the basis, and its zero points
    return Block(codes, basis_codes, scale, formats[0], owner, formats[1], asymmetric)
