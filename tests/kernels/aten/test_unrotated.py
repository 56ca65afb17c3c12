"""Every form of the scores of un-rotated keys, against keys rebuilt and rotated in float64."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten import unrotated
from attnpack_fx.kernels.parts import Angles
from attnpack_fx.kernels.rotary import per_slot
from attnpack_fx.kernels.rotary_axes import tabulate

from ..inputs import SEEDS, relative_error
from ..multimodal import LAYOUTS, Media, cos_and_sin

FORMS = {"queries": unrotated._turned_queries, "keys": unrotated._turned_keys, "tables": unrotated._tables}
#: Largest relative error; bf16: the result is rounded once, by up to 2^-8.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Shape:
    seed: int = 0
    batch: int = 1
    heads: int = 2
    rows: int = 1
    dim: int = 16
    turning: int = 16
    interleaved: bool = False
    #: Tokens and rank of the blocks of every segment.
    segments: tuple[tuple[tuple[int, int], ...], ...] = (((20, 4),),)
    shared_basis: bool = False
    shared_angles: bool = False
    positions: int = 0  # rows of the tables; 0: 1-D
    axes: int = 2
    dtype: torch.dtype = torch.float32


def problem(shape: Shape) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]], Angles[Tensor], int]:
    random = torch.Generator().manual_seed(shape.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(shape.dtype)

    q = normal(shape.batch * shape.heads, shape.rows, shape.dim)
    bases = shape.heads * (1 if shape.shared_basis else shape.batch)
    keys = [
        (number, normal(shape.batch, tokens, rank), normal(bases, rank, shape.dim))
        for number, blocks in enumerate(shape.segments)
        for tokens, rank in blocks
    ]
    slots = sum(blocks[0][0] for blocks in shape.segments)
    samples = 1 if shape.shared_angles else shape.batch
    angles = torch.rand((samples, shape.positions or slots, shape.turning // 2), generator=random) * 6.28
    owner, axes = None, None
    if shape.positions:
        axes = torch.randint(shape.positions, (samples, shape.axes, slots), generator=random)
        # Row p belongs to axis p % A.
        axes = axes - axes % shape.axes + torch.arange(shape.axes)[None, :, None]
        owner = torch.randint(shape.axes, (shape.turning // 2,), generator=random)
    cos, sin = angles.cos(), angles.sin()
    if owner is not None:
        elsewhere = torch.arange(shape.positions)[:, None] % shape.axes != owner
        cos, sin = cos.masked_fill(elsewhere, 0), sin.masked_fill(elsewhere, 0)
    return q, keys, Angles(cos, sin, axes, shape.interleaved), shape.batch


def expected(q: Tensor, keys: list[tuple[int, Tensor, Tensor]], rotary: Angles[Tensor], batch: int) -> Tensor:
    heads, first, out = q.shape[0] // batch, 0, []
    for number in dict.fromkeys(number for number, _, _ in keys):
        blocks = [(c.double(), b.double().unflatten(0, (-1, heads))) for n, c, b in keys if n == number]
        key = blocks[0][0][:, None] @ blocks[0][1]
        for c, b in blocks[1:]:
            key[:, :, : c.shape[1]] += c[:, None] @ b
        end = first + key.shape[2]
        cos, sin = per_slot(dataclasses.replace(rotary, cos=rotary.cos.double(), sin=rotary.sin.double()), first, end)
        key = reference.rotate(key, cos, sin, rotary.interleaved)
        out.append((q.double().view(batch, heads, *q.shape[1:]) @ key.mT).flatten(1, 2))
        first = end
    return torch.cat(out, -1)


def check(
    given: tuple[Tensor, list[tuple[int, Tensor, Tensor]], Angles[Tensor], int],
    form: str | None = None,
    slack: float = 3.0,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if form is not None:
            patch.setattr(unrotated, "_form", lambda *_: FORMS[form])
        actual = unrotated.scores(*given)
    assert actual.dtype == given[0].dtype
    error = relative_error(actual, expected(*given), floor=1.0)
    limit = TOLERANCE[actual.dtype] * (slack if actual.dtype == torch.float32 else 1)
    assert error <= limit, f"{form}: {error:.2e}"


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    segments = []
    for _ in range(draw(st.integers(1, 2))):
        tokens = draw(st.integers(1, 50))
        further = draw(st.lists(st.integers(1, tokens), max_size=2))
        segments.append(tuple((n, draw(st.integers(1, 20))) for n in [tokens, *sorted(further, reverse=True)]))
    dim = draw(st.sampled_from([16, 24, 64]))
    return Shape(
        seed=draw(SEEDS),
        batch=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 4)),
        rows=draw(st.integers(1, 9)),
        dim=dim,
        turning=draw(st.sampled_from([0, 2, dim // 2, dim])),
        interleaved=draw(st.booleans()),
        segments=tuple(segments),
        shared_basis=draw(st.booleans()),
        shared_angles=draw(st.booleans()),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
    )


@given(shape=shapes(), tile=st.sampled_from([1, 4096, unrotated.TILE_BYTES]))
@settings(max_examples=60, deadline=None)
def test_every_form_for_a_row_per_slot(shape, tile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unrotated, "TILE_BYTES", tile)
        for form in ("queries", "keys", None):
            check(problem(shape), form)


@given(shape=shapes(), positions=st.sampled_from([4, 7, 12]), axes=st.integers(1, 3), tile=st.sampled_from([1, 4096]))
@settings(max_examples=60, deadline=None)
def test_every_form_for_tables(shape, positions, axes, tile):
    shape = dataclasses.replace(shape, positions=positions - positions % axes, axes=axes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unrotated, "TILE_BYTES", tile)
        for form in (*FORMS, None):
            check(problem(shape), form)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("samples", [[[Media("image", (1, 24, 20))], [Media("video", (4, 10, 12))]]])
def test_the_layouts_of_real_models(layout, dtype, samples):
    cos, sin = cos_and_sin(layout, samples, dtype)
    found = tabulate(cos, sin)
    assert found is not None
    shape = Shape(batch=2, heads=2, rows=2, dim=128, turning=128, segments=(((cos.shape[1], 16),),), dtype=dtype)
    q, keys, _, batch = problem(shape)
    tables = Angles(*found, False)
    for form in FORMS:
        check((q, keys, tables, batch), form, slack=1)
    rows = Angles(cos, sin, None, False)
    split, whole = unrotated.scores(q, keys, tables, batch), unrotated.scores(q, keys, rows, batch)
    assert relative_error(split, whole.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("form", "rows", "rank", "positions"),
    [("queries", 1, 16, 0), ("keys", 64, 16, 0), ("keys", 16, 64, 0), ("tables", 1, 16, 8), ("tables", 4, 64, 8)],
)
def test_the_form_follows_from_the_shape(form, rows, rank, positions):
    shape = Shape(heads=8, rows=rows, dim=128, turning=128, segments=(((640, rank),),), positions=positions)
    q, keys, rotary, batch = problem(shape)
    chosen = unrotated._form(q.view(batch, 8, rows, 128), [keys[0][1:]], rotary)
    assert chosen is FORMS[form]
