"""Attention over segments of several blocks and in few bits, against the float64 reference."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.parts import E4M3, E5M2, RowForm, block_of, kind, tensors_of

from ..inputs import ATTENTION_FLOOR, Shapes, assert_close, attention_arguments, cuts, map_blocks, row_forms, shapes
from .interpreted import attend
from .test_attend import QUICKLY, check, taken


def small(shape: Shapes) -> Shapes:
    """The interpreter's time goes by programs."""
    return dataclasses.replace(
        shape, batch=min(shape.batch, 2), heads=min(shape.heads, 2), queries=min(shape.queries, 3)
    )


def fits(shape: Shapes) -> bool:
    """Whether there are no more blocks than the kernels take."""
    return taken(attention_arguments(shape))


@given(shape=shapes().map(small), keys=cuts(), values=cuts(), shared=st.booleans())
@settings(QUICKLY, max_examples=10)
def test_low_rank_blocks_match_the_reference(shape, keys, values, shared):
    shape = dataclasses.replace(shape, key_cuts=keys, value_cuts=values, shared=shared)
    if not fits(shape):
        shape = dataclasses.replace(shape, segments=shape.segments[:1])
    assert fits(shape)
    check(shape)


@st.composite
def plain_row_forms(draw: st.DrawFn) -> RowForm:
    """Forms of rows without outliers and residual."""
    return dataclasses.replace(draw(row_forms()), outliers=False, rank=0)


@given(
    shape=shapes().map(small),
    tokens=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    forms=st.tuples(plain_row_forms(), plain_row_forms()),
    keys=cuts(),
)
@settings(QUICKLY, max_examples=10)
def test_coded_rows_match_the_reference(shape, tokens, forms, keys):
    """As many of keys as of values, or more, or fewer."""
    shape = dataclasses.replace(shape, segments=shape.segments[:1], key_cuts=keys)
    rows = [((count, form),) for count, form in zip(tokens, forms, strict=True)]
    shape = dataclasses.replace(shape, key_rows=rows[0], value_rows=rows[1])
    assert fits(shape)
    check(shape)


@given(shape=shapes().map(small), keys=cuts(), values=cuts(), partial=st.booleans(), axes=st.integers(0, 3))
@settings(QUICKLY, max_examples=10)
def test_keys_before_rotary_embedding_are_rotated(shape, keys, values, partial, axes):
    shape = dataclasses.replace(shape, segments=shape.segments[:1], key_cuts=keys, value_cuts=values, axes=axes)
    shape = dataclasses.replace(shape, rotary=shape.key_dim // 2 // 8 * 8 if partial else shape.key_dim)
    assert fits(shape)
    check(shape)


FORMATS = [(8, 8, False), (4, 0, False), (0, 2, False), (E4M3, E5M2, False), (4, 2, True), (2, E4M3, True)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("rotary", [0, 16])
@pytest.mark.parametrize("number", range(6))
def test_formats(number, rotary):
    how, dtype = FORMATS[number], DTYPES[(number + rotary) % 3]
    shape = Shapes(dtype=dtype, key_cuts=((1.0, how), (0.5, 4)), value_cuts=((1.0, how), (0.3, how)), group=3, batch=2)
    check(dataclasses.replace(shape, rotary=rotary))


@pytest.mark.parametrize(("rank", "dim"), [(1, 24), (20, 80), (140, 128)])
def test_ranks_and_head_dims(rank, dim):
    cuts = ((1.0, (4, 4, True)),)
    check(Shapes(segments=(150,), key_rank=rank, value_rank=rank, key_dim=dim, key_cuts=cuts, value_cuts=cuts))


@pytest.mark.parametrize(("keys", "values"), [(150, 70), (40, 90), (90, 0)])
def test_many_splits(keys, values):
    forms = RowForm(2, channel=True, zero=True), RowForm(2, group=8, zero=True)
    check(
        Shapes(
            group=4,
            segments=(140, 90),
            key_rows=((keys, forms[0]),),
            value_rows=((values, forms[1]),),
            key_cuts=((1.0, 4),),
            value_cuts=((1.0, 8), (0.5, 2)),
            kept=30,
            appended=40,
            ragged=True,
            mask="bool",
        )
    )


def test_many_queries():
    rows = ((20, RowForm(4, group=4, zero=True)),)
    shape = Shapes(heads=1, queries=70, group=2, segments=(30,), mask="additive", key_rows=rows, value_rows=rows)
    check(dataclasses.replace(shape, key_cuts=((1.0, 4),), value_cuts=((1.0, 4), (0.5, 0))))


@pytest.mark.parametrize("rotary", [0, 16])
def test_no_memory_is_read_before_it_is_written(rotary):
    rows = [] if rotary else [((count, RowForm(4, group=8)),) for count in (20, 9)]
    formats = ((1.0, (4, 2, True)), (0.5, (0, 8, False)), (0.3, (2, 2, True)))
    shape = Shapes(segments=(40,), key_cuts=formats, value_cuts=formats, key_rank=9, value_rank=20, rotary=rotary)
    if rows:
        shape = dataclasses.replace(shape, key_rows=rows[0], value_rows=rows[1])
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        check(shape)
    finally:
        torch.use_deterministic_algorithms(False)


def test_rows_before_a_low_rank_segment():
    """Slots are those of the segments in order, whatever each is."""
    arguments = attention_arguments(Shapes(segments=(9,), key_cuts=((1.0, 4),), value_cuts=((1.0, 4),), mask="bool"))
    rows = attention_arguments(
        Shapes(segments=(), key_rows=((7, RowForm(4, group=8)),), value_rows=((7, RowForm(2, channel=True)),), kept=0)
    )
    index = torch.randperm(19)[None]
    for side in ("keys", "values"):
        segments = rows[side].segments + arguments[side].segments
        arguments[side] = dataclasses.replace(arguments[side], segments=segments, index=index)
    arguments["mask"] = torch.rand(1, 1, 1, 21) < 0.7
    assert taken(arguments)
    expected, expected_weights = reference.attention_weights(**arguments)
    out, weights = attend.attention(**arguments, weights=True)
    assert_close(out, expected, floor=ATTENTION_FLOOR)
    assert_close(weights, expected_weights, torch.float32)


def test_nothing_beyond_what_a_block_covers_is_read():
    """Spare tail rows of keys and values, each behind its own length."""
    rows = [((count, RowForm(4, group=8)),) for count in (20, 9)]
    shape = Shapes(key_rows=rows[0], value_rows=rows[1])
    arguments = attention_arguments(shape)
    out, _ = attend.attention(**arguments)
    assert arguments["values"].length == arguments["keys"].length + 11
    for side in ("keys", "values"):
        arguments[side].tail[arguments[side].length :] = torch.nan
    assert torch.equal(out, attend.attention(**arguments)[0])


@pytest.mark.parametrize("side", ["keys", "values"])
def test_strided_codes(side):
    """Every tensor of every block as a view of one with its first two dims exchanged."""
    rows = ((20, RowForm(4, channel=True, zero=True, norm=True)),)
    shape = Shapes(batch=2, key_rows=rows, value_rows=rows, key_cuts=((1.0, 4),), value_cuts=((1.0, 4),))

    def strided(block):
        turned = {name: each.transpose(0, 1).contiguous().transpose(0, 1) for name, each in tensors_of(block).items()}
        return block_of(kind(block), turned)

    check(shape, **{side: map_blocks(attention_arguments(shape)[side], strided)})
