"""Packed parts as tensors and a layout, and back."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from attnpack_fx.kernels.flat import flatten, unflatten, unflatten_pair
from attnpack_fx.kernels.parts import Block, PackedParts, Segment, block_of, kind, tensors_of

from .inputs import attention_arguments, decompress_arguments, stored_shapes


def named(parts: PackedParts[Tensor]) -> list[object]:
    """Every tensor by its identity, and all else that is fixed about packed parts."""
    blocks = [(kind(block), *map(id, tensors_of(block).values())) for block in parts.blocks]
    angles = None if parts.angles is None else [*map(id, vars(parts.angles).values())]
    others = id(parts.tail), id(parts.index), id(parts.slot), parts.length, parts.ragged
    return [[len(segment.blocks) for segment in parts.segments], blocks, angles, others]


@given(shape=stored_shapes())
@settings(max_examples=80, deadline=None)
def test_nothing_is_lost(shape):
    given = attention_arguments(shape)
    keys, values = given["keys"], given["values"]
    tensors, layouts = flatten(keys, values)
    assert len({*map(id, tensors)}) == len(tensors)
    assert list(map(named, unflatten_pair(tensors, *layouts, keys.length))) == [named(keys), named(values)]
    whole = decompress_arguments(shape)["parts"]
    tensors, (layout,) = flatten(whole)
    assert named(unflatten(tensors, layout, whole.length)) == named(whole)


@given(shape=stored_shapes())
@settings(max_examples=40, deadline=None)
def test_a_block_is_its_kind_and_its_tensors(shape):
    for block in attention_arguments(shape)["keys"].blocks:
        made = block_of(kind(block), tensors_of(block))
        assert type(made) is type(block) and kind(made) == kind(block)
        assert all(map(torch.equal, tensors_of(made).values(), tensors_of(block).values()))


@pytest.mark.parametrize("together", [False, True])
def test_what_keys_and_values_share_is_named_once(together):
    """As coefficients of keys and values of several layers may be."""
    tail, index = torch.randn(3, 1, 2, 8), torch.arange(6)[None]
    key = Block(torch.randn(1, 6, 4), torch.randn(1, 2, 4, 8))
    value = replace(key, basis=torch.randn(1, 2, 4, 8))
    if not together:
        value = replace(value, coefficient=value.coefficient.clone())
    parts = [PackedParts((Segment((block,)),), tail, 3, index) for block in (key, value)]
    tensors, _ = flatten(*parts)
    assert len(tensors) == (5 if together else 6)
