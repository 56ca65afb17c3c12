"""Eviction in the cache: what rules are shown, and that what they let go is gone."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx import H2O, PackPolicy, StreamingLLM, cache_bytes, pack
from attnpack_fx.evicting import evict, tokens
from attnpack_fx.passes.eviction import Eviction, Tokens
from attnpack_fx.placement import Placement
from tests.layer_inputs import Mirror, mirrored
from tests.packing_inputs import dense_pair
from tests.stored_inputs import Way


@dataclass(frozen=True)
class Above(Eviction):
    """Keeps tokens with a score above a limit."""

    limit: float = 0.5

    def keep(self, tokens: Tokens) -> Tensor | None:
        assert tokens.score is not None
        return tokens.score > self.limit


@pytest.mark.parametrize("apart", [False, True])
def test_what_rules_are_shown(apart):
    mirror = mirrored(Way(padding=2), factors=not apart, apart=apart)
    mirror.append(1)
    shown = tokens(mirror.layer)
    many = 2 if apart else 1
    assert shown.seen == mirror.tokens == 17 and not shown.prefill and shown.layer == 1
    assert shown.real.tolist() == [15] * many + [17] * many
    assert shown.vision_seen.tolist() == [9] * 2 * many
    there = shown.position >= 0
    assert torch.equal(shown.vision, mirror.vision[shown.position.clamp(min=0)] & there)
    assert torch.equal(shown.score[there], mirror.score.gather(1, shown.position.clamp(min=0))[there])
    # Evicted tokens have been seen all the same.
    mirror.evict(0.4)
    after = tokens(mirror.layer)
    assert torch.equal(after.real, shown.real) and torch.equal(after.vision_seen, shown.vision_seen)
    assert after.position.shape[1] < shown.position.shape[1]


@settings(max_examples=20, deadline=None)
@given(limits=st.lists(st.floats(0, 0.9), min_size=1, max_size=3), padding=st.integers(0, 2), apart=st.booleans())
def test_what_is_let_go_is_gone(limits, padding, apart):
    mirror = mirrored(Way(padding=padding), factors=not apart, apart=apart)
    mirror.reread()
    for limit in limits:
        evict(mirror.layer, Above(limit))
        mirror.kept &= mirror.score > limit
        mirror.check()
        assert mirror.layer.slots == _widest(mirror)
        mirror.append(2)
        mirror.check()


def _widest(mirror: Mirror) -> int:
    """Samples that keep fewer have filler in every part."""
    first = mirror.layer.key.held.packed
    there = mirror.layer.key.positions >= 0
    return int(there[:, :first].sum(1).max()) + int(there[:, first:].sum(1).max())


def test_where_all_stays_nothing_is_copied():
    mirror = mirrored(Way(padding=1))
    key, value = mirror.layer.key, mirror.layer.value
    evict(mirror.layer, Above(-1))
    evict(mirror.layer, H2O(1.0))
    assert mirror.layer.key is key and mirror.layer.value is value


def test_every_token_of_a_sample_may_go():
    mirror = mirrored(Way(padding=1), factors=False)
    mirror.score[1] = 0
    mirror.remember()
    evict(mirror.layer, Above(0.2))
    mirror.kept &= mirror.score > 0.2
    mirror.check()
    mirror.append(1)
    mirror.check()


@pytest.mark.parametrize("apart", [False, True])
def test_a_budget_over_many_steps(apart):
    """The newest and the heaviest of what there is, as a list of tokens would keep them."""
    mirror = mirrored(Way(padding=1, vision=25), factors=not apart, apart=apart)
    mirror.reread()
    rule, budget = H2O(12, heavy=0.5, every=3), 12
    for step in range(20):
        if step:
            mirror.append(1)
        evict(mirror.layer, rule)
        for sample, row in enumerate(mirror.kept):
            there = row.nonzero()[:, 0].tolist()
            if len(there) > budget:
                count = budget if not step else budget - 2 + 1  # an eighth of the budget and one leave at once
                newest = there[-(count - -(-count // 2)) :]
                rest = sorted(set(there) - set(newest), key=lambda p: (mirror.score[sample, p], p))
                row[:] = False
                row[newest + rest[len(rest) - -(-count // 2) :]] = True
        mirror.check()
        assert mirror.kept.sum(1).max() <= budget
    before = cache_bytes((mirror.layer.key, mirror.layer.value))
    for _ in range(20):
        mirror.append(1)
        evict(mirror.layer, rule)
    assert cache_bytes((mirror.layer.key, mirror.layer.value)) < 1.3 * before


def test_a_cache_packed_without_eviction_in_mind():
    """What was padding is found from what is stored, before anything leaves."""
    key, value = dense_pair(tokens=20)
    real = torch.ones((2, 20), dtype=torch.bool)
    real[0, :4] = False
    packed = pack(key, value, PackPolicy(vision_rank=None, text_rank=4), real=real)
    assert packed[0].placement.absent is None
    mirror = mirrored(Way())
    layer = replace(mirror.layer, key=packed[0], value=packed[1], prefill=True)
    assert tokens(layer).real.tolist() == [16, 20]
    evict(layer, StreamingLLM(sinks=2, recent=0.5))
    assert layer.key.positions.shape[1] == 12
    assert tokens(layer).real.tolist() == [16, 20]


def test_a_pruned_prompt_counts_what_it_saw():
    placed = Placement.from_plan(
        [torch.tensor([[0, 3, 4]])],
        torch.tensor([[0, -1, -1, 1, 2]]),
        torch.tensor([[True, False, False, True, True]]),
        moves=True,
    )
    assert placed.missing.tolist() == [2] and not placed.ragged
    moved = placed.moved(torch.tensor([[4]]))
    assert moved.missing.tolist() == [2] and moved.is_vision(torch.tensor([[4, 1, -1]])).tolist() == [
        [True, False, False]
    ]
    assert moved.slot.tolist() == [[-1, -1, -1, -1, 0]]
