"""Attention over segments of several blocks and in few bits, against the float64 reference."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ..inputs import Cuts, Shapes, cuts, shapes
from .test_attend import QUICKLY, check

FORMATS = [8, 4, 2]


@given(shape=shapes(), keys=cuts(), values=cuts(), shared=st.booleans())
@settings(QUICKLY, max_examples=60)
def test_matches_the_reference(shape, keys, values, shared):
    check(dataclasses.replace(shape, key_cuts=keys, value_cuts=values, shared=shared))
