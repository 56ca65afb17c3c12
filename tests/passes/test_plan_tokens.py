"""What layers share although only some tokens reach them."""

import pytest

import attnpack_fx
from attnpack_fx import FastV, cache_bytes
from tests.acceptance.families import FAMILIES

pytestmark = pytest.mark.usefixtures("without_inductor")


def test_layers_with_the_same_tokens_left_out_share_cosines_and_sines():
    family = FAMILIES["llava-mha"]
    model = attnpack_fx.compile(family.build(), vision_rank=8, passes=(FastV(1),), strict=True)
    out = model.generate(**family.inputs(0), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    whole, *fewer = (layer.keys.held.angles.tensors for layer in out.past_key_values.layers)
    once = cache_bytes(list(whole))
    assert [cache_bytes(list(each)) for each in fewer] == [once // 2, once // 2]
    assert cache_bytes([whole, *fewer]) == once + once // 2
