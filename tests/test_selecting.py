"""Selective reading: tokens rest and wake, and nothing is lost on the way."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx import AVL, KIVI, KVQuant, cache_bytes
from attnpack_fx.coding import code
from attnpack_fx.passes.eviction import Tokens
from attnpack_fx.passes.selection import Selection
from attnpack_fx.selecting import select, wake
from tests.layer_inputs import Mirror, mirrored, saved
from tests.stored_inputs import Way


@dataclass(frozen=True)
class Some(Selection):
    """Of the vision tokens those with a score below `share` are read; every so many steps all."""

    share: float = 0.5
    every: int = 3

    def core_of(self, tokens: Tokens) -> Tensor:
        assert tokens.score is not None and tokens.vision is not None
        return (tokens.position >= 0) & (~tokens.vision | (tokens.score < self.share))

    def rereads(self, step: int) -> bool:
        return step % self.every == 0


KINDS = st.sampled_from(
    [
        {"way": {}},
        {"way": {"packed_text": True, "bits": 8}},
        {"way": {"angles": "rows", "packed_text": True}},
        {"way": {"angles": "rows", "interleaved": True}},
        {"way": {"angles": "tables", "vision": 36}},
        {"way": {}, "factors": False},
        {"way": {"angles": "rows"}, "factors": False, "angles": True},
    ]
)
CODINGS = {"none": None, "kivi": KIVI(8, group=2, residual=4), "kvquant": KVQuant(8, residual=4)}
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 3)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("evict"), st.sampled_from([0.7, 0.9])),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        st.tuples(st.just("crop"), st.integers(1, 2)),
        st.tuples(st.just("copy"), st.sampled_from(["clone", "to", "save"])),
    ),
    min_size=2,
    max_size=6,
)
COPIES = {"clone": torch.clone, "to": lambda each: each.to(torch.float64).to(torch.float32), "save": saved}


def everything(mirror: Mirror) -> Mirror:
    """With what rests awake, on the side."""
    layer = replace(mirror.layer)
    resting = layer.key.held.resting
    kept = mirror.kept.clone()
    if resting is not None and resting.index.shape[1]:
        for sample, row in enumerate(resting.index.tolist()):
            kept[sample, [position for position in row if position >= 0]] = True
        wake(layer)
    return replace(mirror, layer=layer, kept=kept)


@settings(max_examples=50, deadline=None)
@given(kind=KINDS, steps=STEPS, coding=st.sampled_from(list(CODINGS)), padding=st.integers(0, 2))
def test_nothing_is_lost(kind, steps, coding, padding):
    mirror = mirrored(Way(padding=padding, **kind["way"]), **{k: v for k, v in kind.items() if k != "way"})
    method, rule = CODINGS[coding], Some()
    mirror.reread()
    whole = mirror.kept.clone()

    def act(mirror: Mirror) -> None:
        select(mirror.layer, rule)
        mirror.follow()
        if method is not None:
            before = everything(mirror)
            code(mirror.layer, method)
            mirror.key, mirror.value = (_known(mirror, before, of) for of in ("key", "value"))

    act(mirror)
    mirror.check()
    for name, argument in steps:
        match name:
            case "append":
                mirror.append(argument)
                whole = torch.cat([whole, whole.new_ones((len(whole), argument))], 1)
                act(mirror)
            case "evict":
                before = mirror.kept
                mirror.evict(argument)
                whole &= mirror.kept | ~before
            case "select":
                rows = torch.tensor(argument)
                mirror.select(rows)
                whole = whole[rows]
            case "crop":
                mirror.crop(max(1, mirror.tokens - argument))
                whole = whole[:, : mirror.tokens]
            case "copy":
                mirror.map(COPIES[argument])
        mirror.check()
        awake = everything(mirror)
        awake.check()
        assert torch.equal(awake.kept, whole)


def _known(mirror: Mirror, before: Mirror, of: str) -> Tensor:
    """Dense numbers of all tokens after coding, which is not exact, of those that were awake before and are now."""
    packed, stored = getattr(everything(mirror).layer, of).dense(), mirror.rows(before.kept)[..., None]
    made = torch.where(stored, packed, getattr(before, of))
    torch.testing.assert_close(made, getattr(before, of), atol=0.1, rtol=0)
    return made


def test_reading_follows_the_rule():
    mirror = mirrored(Way(padding=1, packed_text=True))
    rule, prompt = Some(), mirror.tokens
    low = (mirror.score < 0.5) | ~mirror.vision
    select(mirror.layer, rule)
    real = mirror.kept.clone()
    mirror.kept &= low
    mirror.check()
    assert mirror.layer.key.held.resting.started == prompt
    # Step 3 reads everything, so that it is woken after step 2.
    for step in (1, 2):
        mirror.append(1)
        select(mirror.layer, rule)
        if step == 1:
            mirror.check()
    mirror.kept[:, :prompt] |= real
    mirror.check()
    # Then other tokens are of interest.
    mirror.append(1)
    mirror.score = 1 - mirror.score
    mirror.remember()
    select(mirror.layer, rule)
    mirror.kept &= (mirror.score < 0.5) | ~mirror.vision
    mirror.check()


def test_a_step_reads_less_and_nothing_is_stored_twice():
    mirror = mirrored(Way(vision=64, batch=1), factors=False)
    before = cache_bytes((mirror.layer.key, mirror.layer.value))
    select(mirror.layer, Some(share=0.2))
    layer = mirror.layer
    assert layer.key.slots == int((mirror.score < 0.2)[:, mirror.vision].sum() + (~mirror.vision).sum())
    assert layer.key.slots < 0.5 * mirror.tokens
    # A tail has room for more, and so has that of what is read.
    room = 2 * 18 * 2 * 8 * 4
    assert cache_bytes((layer.key, layer.value)) < before + room


def test_what_woke_is_stored_once():
    mirror = mirrored(Way(vision=640, batch=1), factors=False)
    before = cache_bytes((mirror.layer.key, mirror.layer.value))
    select(mirror.layer, Some(share=0.2))
    wake(mirror.layer)
    # A tail that a step will follow has a quarter of room.
    assert cache_bytes((mirror.layer.key, mirror.layer.value)) < 1.3 * before


def test_where_all_is_read_nothing_is_copied():
    mirror = mirrored(Way())
    mirror.score = mirror.score * 0
    mirror.remember()
    key, value = mirror.layer.key, mirror.layer.value
    select(mirror.layer, Some())
    assert mirror.layer.key is key and mirror.layer.value is value


def test_coded_tokens_are_always_read():
    mirror = mirrored(Way(), factors=False)
    code(mirror.layer, KIVI(8, group=2, residual=2))
    mirror.reread()
    coded = mirror.layer.key.held.packed, mirror.layer.value.held.packed
    assert max(coded) > 2
    select(mirror.layer, Some(share=0))
    mirror.follow()
    mirror.check()
    assert (mirror.layer.key.held.packed, mirror.layer.value.held.packed) == coded
    everything(mirror).check()


@pytest.mark.parametrize("packed", [True, False])
def test_avl_reads_a_core_of_what_it_keeps(packed):
    mirror = mirrored(Way(vision=16, batch=2, padding=2), factors=packed)
    rule = AVL(kept=1.0, core=0.25, every=None)
    select(mirror.layer, rule)
    held = mirror.layer.key
    read = held.placement.is_vision(held.positions).sum(1)
    assert read.tolist() == [4, 4]
    best = mirror.score.masked_fill(~mirror.vision, -1).topk(4).indices.sort().values
    mirror.kept &= ~mirror.vision | torch.zeros_like(mirror.kept).scatter(1, best, True)
    mirror.check()
