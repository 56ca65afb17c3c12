"""Attention over segments of several blocks and in few bits, against the float64 reference."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels.parts import RowForm

from ..inputs import Shapes, attention_arguments, cuts, row_forms, shapes
from .interpreted import attend
from .test_attend import QUICKLY, check


def fits(shape: Shapes) -> bool:
    """Whether there are no more blocks than the kernels take."""
    return attend.takes(**attention_arguments(shape))


@given(shape=shapes(), keys=cuts(), values=cuts(), shared=st.booleans())
@settings(QUICKLY, max_examples=40)
def test_matches_the_reference(shape, keys, values, shared):
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
    shape=shapes(),
    tokens=st.integers(0, 80),
    forms=st.tuples(plain_row_forms(), plain_row_forms()),
    keys=cuts(),
    values=cuts(),
)
@settings(QUICKLY, max_examples=40)
def test_coded_rows_match_the_reference(shape, tokens, forms, keys, values):
    shape = dataclasses.replace(shape, segments=shape.segments[:1], key_cuts=keys, value_cuts=values)
    shape = dataclasses.replace(shape, key_rows=((tokens, forms[0]),), value_rows=((tokens, forms[1]),))
    assert fits(shape)
    check(shape)
