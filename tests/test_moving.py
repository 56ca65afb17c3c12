"""Stored tokens that move: what stays means what it meant, whatever else is done to the cache."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx import KIVI, KVQuant, cache_bytes
from attnpack_fx.coding import code
from attnpack_fx.moving import choose, chosen_positions
from tests.layer_inputs import mirrored, saved
from tests.stored_inputs import Way

CODINGS = {"none": None, "kivi": KIVI(8, group=2, residual=4), "kvquant": KVQuant(8, residual=4)}
KINDS = st.sampled_from(
    [
        {"way": {}},
        {"way": {"packed_text": True, "bits": 8}},
        {"way": {"angles": "rows", "packed_text": True}},
        {"way": {"angles": "tables", "vision": 36, "rank": 16}},
        {"way": {"angles": "rows", "interleaved": True}, "factors": False, "angles": True},
        {"way": {}, "factors": False},
        {"way": {}, "factors": False, "apart": True},
        {"way": {"angles": "rows"}, "factors": False, "apart": True, "angles": True},
    ]
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("evict"), st.sampled_from([0.3, 0.6, 0.9])),
        st.tuples(st.just("append"), st.integers(1, 5)),
        st.tuples(st.just("code"), st.none()),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
        st.tuples(st.just("crop"), st.integers(1, 4)),
        st.tuples(st.just("copy"), st.sampled_from(["clone", "to", "save", "deepcopy", "detach"])),
    ),
    min_size=1,
    max_size=6,
)


COPIES = {
    "clone": torch.clone,
    "to": lambda each: each.to(torch.float64).to(torch.float32),
    "save": saved,
    "deepcopy": copy.deepcopy,
    "detach": torch.detach,
}


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, steps=STEPS, coding=st.sampled_from(list(CODINGS)), padding=st.integers(0, 2))
def test_whatever_is_done_tokens_mean_what_they_meant(kind, steps, coding, padding):
    way = Way(padding=padding, **kind["way"])
    mirror = mirrored(way, **{name: each for name, each in kind.items() if name != "way"})
    history, method = [], CODINGS[coding]
    if method is not None:
        code(mirror.layer, method)
    mirror.reread()
    mirror.check()
    for name, argument in steps:
        history.append(replace(mirror, layer=copy.copy(mirror.layer)))
        match name:
            case "evict":
                mirror.evict(argument)
            case "append":
                mirror.append(argument)
            case "code":
                if method is not None:
                    mirror.layer = replace(mirror.layer, prefill=False)
                    code(mirror.layer, method)
                    mirror.reread()
            case "select":
                mirror.select(torch.tensor([row % mirror.key.shape[0] for row in argument]))
                if len(argument) != way.batch and way.angles != "none":
                    break  # angles of what is appended are those of the prompt's samples
            case "crop":
                mirror.crop(max(1, mirror.tokens - argument))
            case "copy":
                mirror.map(COPIES[argument])
        mirror.check()
    for earlier in history:
        earlier.check()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("method", [None, KIVI(4, group=8, residual=8)], ids=["dense", "coded"])
def test_bytes_fall_by_what_left(apart, method):
    mirror = mirrored(Way(vision=49, text=51, batch=1), factors=False, apart=apart)
    if method is not None:
        code(mirror.layer, method)
    before = cache_bytes((mirror.layer.key, mirror.layer.value))
    mirror.evict(0.25)
    after = cache_bytes((mirror.layer.key, mirror.layer.value))
    assert mirror.kept.float().mean() < 0.4
    # Groups of tokens keep their scale, and a tail has room to grow.
    assert after < 0.75 * before


def test_the_choice_is_in_order_with_filler_at_the_ends_of_parts():
    mirror = mirrored(Way(padding=2, packed_text=False))
    layer = mirror.layer
    keep = torch.zeros_like(layer.key.positions, dtype=torch.bool)
    keep[0, [1, 4]], keep[1, [0, 1, 2, 10]] = True, True
    choice = choose(layer.key, layer.value, keep)
    assert choice.order.tolist() == [[1, 4, -1, -1], [0, 1, 2, 10]]
    assert choice.ends == {0: 0, 9: 3, layer.key.slots: 4}
    assert choice.between(9, layer.key.slots).tolist() == [[-1], [1]]
    positions = layer.key.positions
    expected = [[positions[0, 1], positions[0, 4], -1, -1], [positions[1, each] for each in (0, 1, 2, 10)]]
    assert chosen_positions(layer.key, choice).tolist() == expected
