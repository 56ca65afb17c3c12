import pytest
import torch
from hypothesis import given, settings

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten.decompress import decompress
from attnpack_fx.kernels.parts import kind

from ..inputs import Shapes, assert_close, decompress_arguments, shapes, stored_shapes


def check(shape: Shapes) -> None:
    arguments = decompress_arguments(shape)
    out, expected = decompress(**arguments), reference.decompress(**arguments)
    assert out.dtype == shape.dtype and out.is_contiguous()
    assert_close(out, expected)
    slot = arguments["parts"].slot
    assert out[:, :, : slot.shape[1]].transpose(1, 2)[slot < 0].eq(0).all()


@given(shape=shapes(mask="none"))
@settings(max_examples=60, deadline=None)
def test_decompress_matches_the_reference(shape):
    check(shape)


@given(shape=stored_shapes(mask="none"))
@settings(max_examples=120, deadline=None)
def test_every_way_to_store_matches_the_reference(shape):
    check(shape)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_mean_levels_times_scales(bits):
    parts = decompress_arguments(Shapes(segments=(12,), kept=0, appended=0, key_cuts=((1.0, bits),)))["parts"]
    (block,) = parts.blocks
    codes, basis, scale = block.coefficient, block.basis, block.scale
    assert codes.dtype == basis.dtype == torch.uint8 and kind(block) == bits | bits << 8
    coefficient, rows = reference.decoded(codes, 4, bits), reference.decoded(basis, 16, bits)
    expected = (coefficient * scale[:, :1]) @ (rows * scale[:, 1, None, :, None])[0]
    assert_close(decompress(parts)[0].gather(1, parts.index[0, None, :, None].expand(2, -1, 16)), expected)
