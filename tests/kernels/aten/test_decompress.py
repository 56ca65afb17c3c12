import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten.decompress import decompress

from ..inputs import assert_close, attention_arguments, shapes


@given(shape=shapes(mask="none"), rotary=st.booleans())
@settings(max_examples=150, deadline=None)
def test_decompress_matches_the_reference(shape, rotary):
    fields = shape.__dict__ | {"rotary": shape.key_dim // 2 if rotary else 0}
    arguments = attention_arguments(type(shape)(**fields))
    index = arguments["index"]
    slot = torch.full((shape.batch, index.shape[1] + shape.padding), -1)
    for sample, row in enumerate(index.tolist()):
        for number, position in enumerate(row):
            if position >= 0:
                slot[sample, position] = number
    parts = [arguments[name] for name in ("key_coefficients", "key_bases", "key_tail", "length")]
    rest = (index, slot, arguments["cos"], arguments["sin"], shape.interleaved, None, [], [], [])
    out, expected = decompress(*parts, *rest), reference.decompress(*parts, *rest)
    assert out.dtype == shape.dtype and out.is_contiguous()
    assert_close(out, expected)
    assert out[:, :, : slot.shape[1]].transpose(1, 2)[slot < 0].eq(0).all()
