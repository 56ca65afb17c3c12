"""What rules of eviction share."""

from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.passes.avl import AVL
from attnpack_fx.passes.eviction import amount, best, several, staying, subject_of
from attnpack_fx.passes.fields import share_of
from attnpack_fx.passes.h2o import H2O
from attnpack_fx.passes.method import conflict, conflicts
from attnpack_fx.passes.minicache import MiniCache
from attnpack_fx.passes.random_eviction import RandomEviction
from attnpack_fx.passes.scissorhands import Scissorhands
from attnpack_fx.passes.streaming_llm import StreamingLLM

from .stored_tokens import TARGETS, TOKENS, drawn, share, slots


@settings(deadline=None, max_examples=60)
@given(tokens=TOKENS, target=TARGETS, count=st.integers(0, 12), scored=st.booleans(), each=st.booleans())
def test_the_best(tokens, target, count, scored, each):
    among = subject_of(tokens, target)
    counts = [count + each * row for row in range(len(tokens.real))]
    wanted = torch.tensor(counts)[:, None] if each else count
    kept = best(tokens.score if scored else None, tokens.position, among, wanted)
    for row, most in enumerate(counts):
        mine = slots(tokens, row, target)[0]
        ranked = sorted(
            mine, key=lambda slot: (float(tokens.score[row, slot]) * scored, int(tokens.position[row, slot]))
        )
        assert kept[row].nonzero()[:, 0].tolist() == sorted(ranked[max(0, len(ranked) - most) :])


@given(part=st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.9, 1.0]), count=st.integers(0, 100_000))
def test_shares_are_rounded_up_exactly(part, count):
    assert share_of(part, count) == share(part, count)


def test_budgets_in_tokens():
    assert [amount(0.1, seen) for seen in (0, 9, 10, 11)] == [1, 1, 1, 2]
    assert amount(7, 3) == 7
    assert [several(16, limit) for limit in (1, 7, 8, 64, 1000)] == [1, 1, 2, 9, 16]
    assert several(1, 1000) == 1


def test_small_caches_are_left_alone_without_a_look_at_their_tokens():
    tokens = drawn(0, 2, 20, 0, 0, False, False)
    on_no_device = subject_of(tokens, "all").to("meta")
    assert staying(tokens, on_no_device, lambda seen: 20, lambda limit: 1) is None


def test_an_evicted_token_counts_as_seen():
    tokens = drawn(0, 1, 40, 0, 0, True, False)
    text = subject_of(tokens, "text")
    asked = []

    def limit(seen):
        asked.append(seen)
        return 0

    staying(tokens, text, limit, lambda number: 1)
    assert asked == [0, 40 - int(subject_of(tokens, "vision").sum())]
    staying(tokens, text, limit, lambda number: 1, torch.tensor([17]))
    assert asked[-1] == 17


EVICTING = (H2O(), Scissorhands(), StreamingLLM(), RandomEviction(0.5), AVL())


@pytest.mark.parametrize("first", EVICTING, ids=lambda rule: rule.name)
@pytest.mark.parametrize("second", EVICTING, ids=lambda rule: rule.name)
def test_two_rules_of_eviction_do_not_stand_together(first, second):
    reason = conflict(first, second)
    assert reason is not None
    assert ("stands twice" in reason) == (first == second)


@pytest.mark.parametrize("rule", EVICTING, ids=lambda rule: rule.name)
def test_eviction_and_merging_refuse_each_other(rule):
    for pair in ([rule, MiniCache()], [MiniCache(), rule]):
        assert "none in common to merge" in conflicts(pair)


@pytest.mark.parametrize("rule", [*EVICTING, MiniCache()], ids=lambda rule: rule.name)
def test_methods_are_values(rule):
    again = type(rule)(**asdict(rule))
    assert rule == again and hash(rule) == hash(again) and rule.observes == again.observes
