"""Generators of packed problems, and how close an implementation must come to the reference.

Hypothesis draws the shapes; the numbers come from a seeded generator. Keys, values and queries have unit scale, so that
scores do too, as in a model.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx.kernels.aten.quantize import quantize
from attnpack_fx.kernels.flat import flatten
from attnpack_fx.kernels.parts import E4M3, E5M2, Angles, Block, PackedParts, RowForm, Rows, Segment

#: Largest relative root-mean-square error against the float64 reference on the same (rounded) inputs.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 2.5e-2}

DTYPES = st.sampled_from(list(TOLERANCE))
SEEDS = st.integers(0, 2**16)


#: RMS of attention outputs below which errors count as absolute: values of unit scale may cancel in the weighted sum.
ATTENTION_FLOOR = 0.2


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """`|actual - expected| / |expected|` in Frobenius norm, the RMS of the divisor at least `floor`; shapes must
    agree.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    least = max(1e-12, floor * expected.numel() ** 0.5)
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp(min=least))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, floor: float = 0.0) -> None:
    limit = TOLERANCE[dtype or actual.dtype]
    error = relative_error(actual, expected, floor)
    assert error <= limit, f"relative error {error:.2e} over {limit:.1e}"


#: Formats of coefficient and basis of a block, and whether fields have zero points.
Formats = tuple[int, int, bool]
#: Blocks of a segment: the share of its tokens that each covers, the first all, and how it is stored: an int stands for
#: symmetric coefficients and basis of so many bits.
Cuts = tuple[tuple[float, int | Formats], ...]
#: Segments of rows: how many tokens each has, and in which form they are.
Coded = tuple[tuple[int, RowForm], ...]


@dataclass(frozen=True)
class Shapes:
    """Everything that decides the shapes of an attention problem over packed parts.

    key_cuts, value_cuts: of every segment; its columns are split among them as evenly as may be. shared: whether
    samples share the bases; owned: 0, or how many bases (as they are, no bits) samples choose from. axes: 0, or how
    many rotary axes: cos and sin are then sums of rows of tables. key_rows, value_rows: segments of rows behind the
    low-rank ones. sinks: "none", "one" of all samples, or one of "each".
    """

    seed: int = 0
    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 2
    group: int = 1
    queries: int = 1
    key_dim: int = 16
    value_dim: int = 16
    segments: tuple[int, ...] = (12,)
    key_rank: int = 4
    value_rank: int = 4
    kept: int = 3
    appended: int = 2
    padding: int = 0
    ragged: bool = False
    mask: str = "none"
    mask_shape: tuple[bool, bool, bool, bool] = (True, False, True, True)
    rotary: int = 0
    interleaved: bool = False
    key_cuts: Cuts = ((1.0, 0),)
    value_cuts: Cuts = ((1.0, 0),)
    shared: bool = False
    owned: int = 0
    axes: int = 0
    key_rows: Coded = ()
    value_rows: Coded = ()
    cap: float = 0.0
    sinks: str = "none"

    @property
    def key_slots(self) -> int:
        """Packed slots of the keys."""
        return sum(self.segments) + sum(tokens for tokens, _ in self.key_rows)

    @property
    def value_slots(self) -> int:
        return sum(self.segments) + sum(tokens for tokens, _ in self.value_rows)


@st.composite
def shapes(draw: st.DrawFn, **fixed: Any) -> Shapes:
    """A `Shapes` of plain segments (one block each, as it is) and keys as they are attended, with some fields fixed."""
    dims = st.sampled_from([16, 24, 64, 128, 256])
    drawn = Shapes(
        seed=draw(SEEDS),
        dtype=draw(DTYPES),
        batch=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 4)),
        group=draw(st.sampled_from([1, 2, 4])),
        queries=draw(st.integers(1, 9)),
        key_dim=draw(dims),
        value_dim=draw(dims),
        segments=tuple(draw(st.lists(st.integers(0, 40), max_size=2))),
        key_rank=draw(st.integers(1, 20)),
        value_rank=draw(st.integers(1, 20)),
        kept=draw(st.integers(0, 9)),
        appended=draw(st.integers(0, 9)),
        padding=draw(st.integers(0, 5)),
        ragged=draw(st.booleans()),
        mask=draw(st.sampled_from(["none", "bool", "additive"])),
        mask_shape=draw(st.tuples(*[st.booleans()] * 4)),
        cap=draw(st.sampled_from([0.0, 0.0, 1.5])),
        sinks=draw(st.sampled_from(["none", "none", "one", "each"])),
    )
    return dataclasses.replace(drawn, **fixed)


@st.composite
def formats_of_blocks(draw: st.DrawFn) -> Formats:
    bits, basis_bits = (draw(st.sampled_from([0, 8, 4, 2, E4M3, E5M2])) for _ in range(2))
    return bits, basis_bits, draw(st.booleans()) and bool({bits, basis_bits} & {8, 4, 2})


@st.composite
def cuts(draw: st.DrawFn) -> Cuts:
    further = draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), max_size=2))
    stored = st.one_of(st.sampled_from([0, 0, 8, 4, 2]), formats_of_blocks())
    return tuple((share, draw(stored)) for share in [1.0, *sorted(further, reverse=True)])


@st.composite
def row_forms(draw: st.DrawFn) -> RowForm:
    """Forms of rows whose head dim is a multiple of 8."""
    bits = draw(st.sampled_from([8, 4, 2, 4, 2, E4M3, E5M2, 0]))
    channel = draw(st.booleans())
    scaled = channel or bool(bits) or draw(st.booleans())
    return RowForm(
        bits,
        channel=channel,
        group=0 if channel or not scaled else draw(st.sampled_from([4, 8, 32, 64, 256])),
        zero=scaled and draw(st.booleans()),
        codebook=bits in (8, 4, 2) and draw(st.booleans()),
        outliers=draw(st.sampled_from([False, False, True])),
        rank=draw(st.sampled_from([0, 0, 1, 3])),
        norm=draw(st.booleans()),
    )


#: Segments of rows of up to 80 tokens.
coded_rows = st.lists(st.tuples(st.integers(0, 80), row_forms()), max_size=2).map(tuple)


@st.composite
def stored_shapes(draw: st.DrawFn, **fixed: Any) -> Shapes:
    """A `Shapes` of every way to store segments: several blocks, bits, shared bases, keys before rotary embedding."""
    plain = draw(shapes(**fixed))
    drawn = dataclasses.replace(
        plain,
        key_cuts=draw(cuts()),
        value_cuts=draw(cuts()),
        shared=draw(st.booleans()),
        owned=draw(st.sampled_from([0, 0, 1, 2, 4])),
        rotary=draw(st.sampled_from([0, plain.key_dim // 2, plain.key_dim])),
        interleaved=draw(st.booleans()),
        axes=draw(st.integers(0, 3)),
        key_rows=draw(coded_rows),
        value_rows=draw(coded_rows),
    )
    return dataclasses.replace(drawn, **fixed)


def attention_arguments(shape: Shapes) -> dict[str, Any]:
    """Arguments of the implementations of `ops.attention`, by name; `operands` makes the operator's of them.

    Prompt positions are spread over slots at random, as after packing two modalities.
    """
    random = torch.Generator().manual_seed(shape.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(shape.dtype)

    def factors(rank: int, dim: int) -> list[tuple[Tensor, Tensor]]:
        ranks = [min(rank, n, shape.heads * dim) for n in shape.segments]
        coefficients = [normal(shape.batch, n, r) for n, r in zip(shape.segments, ranks, strict=True)]
        samples = shape.owned or (1 if shape.shared else shape.batch)
        bases = [(normal(samples, shape.heads, r, dim) / max(r, 1) ** 0.5).to(shape.dtype) for r in ranks]
        return list(zip(coefficients, bases, strict=True))

    most = max(shape.key_slots, shape.value_slots)
    slots, length = most + shape.kept, most - shape.key_slots + shape.kept + shape.appended
    value_length = most - shape.value_slots + shape.kept + shape.appended
    prompt = slots + shape.padding
    index = torch.stack([torch.randperm(prompt, generator=random)[:slots] for _ in range(shape.batch)])
    if shape.ragged:
        index[torch.rand(index.shape, generator=random) < 0.3] = -1
    tokens = prompt + shape.appended
    key_factors = factors(shape.key_rank, shape.key_dim)
    value_factors = factors(shape.value_rank, shape.value_dim)
    spare = int(torch.randint(4, (), generator=random))
    angles = _angles(shape, random)
    sides = (
        (key_factors, shape.key_cuts, shape.key_rows, shape.key_dim),
        (value_factors, shape.value_cuts, shape.value_rows, shape.value_dim),
    )
    coded = [
        [Segment((make_rows(form, shape, count, dim, random),)) for count, form in rows] for _, _, rows, dim in sides
    ]
    drawn = torch.randint(max(shape.owned, 1), (shape.batch,), generator=random)
    owner = drawn if shape.owned else None
    keys, values = (
        (*(Segment(tuple(_blocks(*each, cuts, owner))) for each in factors), *rows)
        for (factors, cuts, _, _), rows in zip(sides, coded, strict=True)
    )
    query = normal(shape.batch, shape.heads * shape.group, shape.queries, shape.key_dim)
    key_tail = normal(length + spare, shape.batch, shape.heads, shape.key_dim)
    value_tail = normal(value_length + spare, shape.batch, shape.heads, shape.value_dim)
    return {
        "query": query,
        "keys": PackedParts(keys, key_tail, length, index, None, angles, shape.ragged),
        "values": PackedParts(values, value_tail, value_length, index, None, None, shape.ragged),
        "mask": _mask(shape, tokens, random),
        "scale": shape.key_dim**-0.5,
        "cap": shape.cap,
        "sinks": _sinks(shape),
    }


def operands(given: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of `ops.attention`, in order, from those of its implementations."""
    query, keys, values, *others = given.values()
    tensors, layouts = flatten(keys, values)
    return query, tensors, *layouts, keys.length, *others


def map_blocks(parts: PackedParts[Tensor], function: Callable[[Any], Any]) -> PackedParts[Tensor]:
    """The same parts with other blocks."""
    segments = tuple(Segment(tuple(map(function, segment.blocks))) for segment in parts.segments)
    return dataclasses.replace(parts, segments=segments)


def _sinks(shape: Shapes) -> Tensor | None:
    """Of all samples, or of each."""
    if shape.sinks == "none":
        return None
    random = torch.Generator().manual_seed(shape.seed + 1)
    return torch.randn(shape.batch if shape.sinks == "each" else 1, shape.heads * shape.group, generator=random).to(
        shape.dtype
    )


def decompress_arguments(shape: Shapes) -> dict[str, PackedParts[Tensor]]:
    """Arguments of the implementations of `ops.decompress`: the keys of `attention_arguments`."""
    keys = attention_arguments(shape)["keys"]
    slot = torch.full((shape.batch, keys.index.shape[1] + shape.padding), -1)
    for sample, row in enumerate(keys.index.tolist()):
        for number, position in enumerate(row):
            if position >= 0:
                slot[sample, position] = number
    return {"parts": dataclasses.replace(keys, slot=slot)}


def _blocks(coefficient: Tensor, basis: Tensor, cuts: Cuts, owner: Tensor | None) -> Iterator[Block[Tensor]]:
    """The blocks of a low-rank segment; owned bases stay as they are."""
    ends = [-(-coefficient.shape[2] * number // len(cuts)) for number in range(len(cuts) + 1)]
    for (share, how), start, end in zip(cuts, ends, ends[1:], strict=False):
        if start and start == end:
            continue
        covered = round(share * coefficient.shape[1])
        columns = coefficient[:, :covered, start:end].contiguous(), basis[:, :, start:end].contiguous()
        bits, basis_bits, asymmetric = (how, how, False) if isinstance(how, int) else how
        if owner is not None:
            basis_bits, asymmetric = 0, asymmetric and bits in (8, 4, 2)
        if bits or basis_bits:
            *codes, scale = quantize(*columns, bits, basis_bits, asymmetric)
            yield Block(*codes, scale, bits, owner, basis_bits, asymmetric)
        else:
            yield Block(*columns, owner=owner)


def make_rows(form: RowForm, shape: Shapes, tokens: int, dim: int, random: torch.Generator) -> Rows[Tensor]:
    """Rows `[B, tokens, H, dim]` of this form, numbers of about unit scale; groups and parts as they might be."""
    size = shape.batch, tokens, shape.heads

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(shape.dtype)

    def uniform(*size: int) -> Tensor:
        return (torch.rand(size, generator=random) + 0.5).to(shape.dtype)

    if not form.bits:
        codes, typical = normal(*size, dim), 1.0
    elif form.bits in (E4M3, E5M2):
        # Codes from 0 to 63 and from 128 to 191 are numbers of less than 2.
        codes = torch.randint(64, (*size, dim), generator=random) + 128 * torch.randint(
            2, (*size, dim), generator=random
        )
        codes, typical = codes.to(torch.uint8), 1.0
    else:
        codes = torch.randint(256, (*size, -(-dim * form.bits // 8)), generator=random).to(torch.uint8)
        typical = 1.0 if form.codebook else 2.0**form.bits / 2
    groups = 1 + int(torch.randint(4, (), generator=random))
    shared = (shape.batch, groups, shape.heads, dim)
    scaled = shared if form.channel else (*size, -(-dim // form.group) if form.group else 0)
    found: dict[str, Tensor] = {"scale": uniform(*scaled) / typical}
    if form.zero:
        found["zero"] = -found["scale"] * typical
    if form.channel:
        group_of = torch.randint(groups, (shape.batch, tokens), generator=random)
        # Neighbours in one group, as before any token was evicted, or not.
        found["group_of"] = (group_of.sort(1).values if torch.rand((), generator=random) < 0.7 else group_of).int()
    if form.codebook:
        books = [(2**form.bits,), (1, 2**form.bits), (shape.heads, 2**form.bits)]
        found["codebook"] = torch.randn(books[shape.seed % 3], generator=random).sort(-1).values
    if form.outliers:
        count, numbers = 5, tokens * shape.heads * dim
        places = torch.full((shape.batch, count), -1)
        for row in places:
            there = int(torch.randint(count + 1, (), generator=random)) if numbers else 0
            row[count - there :] = torch.randperm(numbers, generator=random)[:there].sort().values
        found |= {"places": places.int(), "outliers": 5 * normal(shape.batch, count)}
    if form.rank:
        found["left"] = normal(*size, form.rank) / 4
        found["right"] = normal(shape.batch, groups, shape.heads, form.rank, dim)
        found["part_of"] = torch.randint(groups, (shape.batch, tokens), generator=random).int()
    if form.norm:
        found["norm"] = uniform(*size)
    return Rows(form, codes, **found)


def _angles(shape: Shapes, random: torch.Generator) -> Angles[Tensor] | None:
    """Of the packed slots."""
    slots, axes = shape.key_slots, None
    if shape.axes:
        # A few positions along each axis; tables of every axis fill all pairs, as a sum does not care.
        axes = torch.randint(4 * shape.axes, (shape.batch, shape.axes, slots), generator=random)
    rows = 4 * shape.axes if shape.axes else slots
    angles = torch.rand((shape.batch, rows, shape.rotary // 2), generator=random) * 6.28
    if not shape.rotary:
        return None
    share = max(shape.axes, 1) ** 0.5
    return Angles(angles.cos() / share, angles.sin() / share, axes, shape.interleaved)


def _mask(shape: Shapes, tokens: int, random: torch.Generator) -> Tensor | None:
    if shape.mask == "none":
        return None
    full = (shape.batch, shape.heads * shape.group, shape.queries, tokens)
    size = [extent if kept else 1 for extent, kept in zip(full, shape.mask_shape, strict=True)]
    allowed = torch.rand(size, generator=random) < 0.7
    if shape.mask == "bool":
        return allowed
    return torch.randn(size, generator=random).masked_fill(~allowed, float("-inf")).to(shape.dtype)
