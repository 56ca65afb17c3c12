from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.passes.random_eviction import RandomEviction

from .stored_tokens import BUDGETS, SEEDS, TARGETS, TOKENS, drawn, mask, most_seen, most_stored, share, slots

WORD = 1 << 64


def scattered(x):
    """splitmix64's finaliser, in unbounded integers."""
    x = (x + 0x9E3779B97F4A7C15) % WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def lot(seed, layer, row, position):
    number = seed
    for part in (layer, row, position):
        number = scattered((number + scattered(part % WORD)) % WORD)
    return (number if number < WORD // 2 else number - WORD) >> 40


def expected(rule, tokens):
    limit = rule.budget
    if not isinstance(limit, int):
        limit = max(1, rule.recent, share(limit, most_seen(tokens, rule.target)))
    if most_stored(tokens, rule.target) <= limit:
        return None
    count = limit if tokens.prefill else max(limit + 1 - min(rule.every, 1 + limit // 8), rule.recent)
    kept = []
    for row in range(len(tokens.real)):
        mine, others = slots(tokens, row, rule.target)
        position = tokens.position[row]
        older, newest = mine[: max(0, len(mine) - rule.recent)], mine[max(0, len(mine) - rule.recent) :]
        older.sort(key=lambda slot: (lot(rule.seed, tokens.layer, row, int(position[slot])), int(position[slot])))
        kept.append(others + newest + older[max(0, len(older) - (count - rule.recent)) :])
    return mask(tokens, kept)


@settings(deadline=None, max_examples=100)
@given(tokens=TOKENS, budget=BUDGETS, seed=SEEDS, every=st.integers(1, 20), recent=st.integers(0, 12), target=TARGETS)
def test_who_stays(tokens, budget, seed, every, recent, target):
    if isinstance(budget, int):
        budget = max(budget, recent)
    rule = RandomEviction(budget, seed, every, recent, target=target)
    actual, wanted = rule.keep(tokens), expected(rule, tokens)
    assert actual is None if wanted is None else torch.equal(actual, wanted)


def kept_positions(rule, tokens):
    kept = rule.keep(tokens)
    return [sorted(tokens.position[row, kept[row]].tolist()) for row in range(len(kept))]


def test_the_same_call_keeps_the_same_tokens_wherever_they_are_stored():
    tokens = drawn(0, 2, 200, 0, 0, False, True)
    order = torch.randperm(200)
    moved = replace(tokens, position=tokens.position[:, order], score=None)
    assert kept_positions(RandomEviction(0.5), tokens) == kept_positions(RandomEviction(0.5), moved)


def test_seed_layer_and_row_each_make_another_choice():
    tokens = drawn(0, 2, 200, 0, 0, False, True)
    first = kept_positions(RandomEviction(0.5), tokens)
    choices = [
        *first,
        *kept_positions(RandomEviction(0.5, seed=1), tokens),
        *kept_positions(RandomEviction(0.5), replace(tokens, layer=4)),
        *kept_positions(RandomEviction(0.5), replace(tokens, layer=None)),
    ]
    for number, one in enumerate(choices):
        assert one[-10:] == list(range(190, 200))
        for other in choices[:number]:
            # Two independent choices of 90 among 190 share 43 +- 3.5, and the ten newest.
            assert 30 < len(set(one) & set(other)) < 70


def test_every_position_is_as_likely_to_stay():
    tokens, times = drawn(0, 1, 100, 0, 0, False, True), torch.zeros(100)
    for seed in range(400):
        times[kept_positions(RandomEviction(0.25, seed, recent=0), tokens)[0]] += 1
    # Binomial of 400 at 1 / 4: 100 +- 8.7.
    assert times.sum() == 400 * 25 and times.min() > 60 and times.max() < 140
    assert 4 < times.std() < 14


@settings(deadline=None, max_examples=20)
@given(tokens=TOKENS, target=TARGETS)
def test_the_whole_budget_keeps_everything(tokens, target):
    assert RandomEviction(1.0, target=target).keep(tokens) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0.0}, r"RandomEviction\(budget=0.0\): expected a share"),
        ({"budget": 40, "seed": -1}, r"RandomEviction\(seed=-1\): expected a whole number of at least 0"),
        ({"budget": 40, "every": 0.5}, r"RandomEviction\(every=0.5\): expected a whole number of at least 1"),
        ({"budget": 8}, r"RandomEviction\(budget=8, recent=10\): expected .*; raise budget or lower recent"),
        ({"budget": 0.5, "recent": -1}, r"RandomEviction\(recent=-1\): expected a whole number of at least 0"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        RandomEviction(**fields)
