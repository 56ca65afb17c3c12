"""Attention over segments of several blocks and in few bits, against the float64 reference."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from ..inputs import Shapes, attention_arguments, cuts, shapes
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
