from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.passes.h2o import H2O

from .stored_tokens import BUDGETS, SEEDS, TARGETS, TOKENS, drawn, generated, mask, most_seen, most_stored, share, slots


def expected(rule, tokens):
    """From the paper: of the budget the newest take the one part, of the others those with the largest sums stay."""
    seen = most_seen(tokens, rule.target)
    limit = rule.budget if isinstance(rule.budget, int) else max(1, share(rule.budget, seen))
    if most_stored(tokens, rule.target) <= limit:
        return None
    count = limit if tokens.prefill else limit - min(rule.every, 1 + limit // 8) + 1
    hitters, kept = min(share(rule.heavy, count), count - 1), []
    for row in range(len(tokens.real)):
        mine, others = slots(tokens, row, rule.target)
        older, newest = mine[: len(mine) - (count - hitters)], mine[max(0, len(mine) - (count - hitters)) :]
        older.sort(key=lambda slot: (float(tokens.score[row, slot]), int(tokens.position[row, slot])))
        kept.append(others + newest + older[max(0, len(older) - hitters) :])
    return mask(tokens, kept)


@settings(deadline=None, max_examples=150)
@given(
    tokens=TOKENS,
    budget=BUDGETS,
    heavy=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]),
    target=TARGETS,
    every=st.integers(1, 20),
)
def test_who_stays(tokens, budget, heavy, target, every):
    rule = H2O(budget, heavy, every, target=target)
    actual, wanted = rule.keep(tokens), expected(rule, tokens)
    assert actual is None if wanted is None else torch.equal(actual, wanted)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, prompt=st.integers(1, 20), heavy=st.sampled_from([0.25, 0.5]), budget=st.integers(2, 12))
def test_one_at_a_time_is_the_published_loop(seed, prompt, heavy, budget):
    weights = torch.rand((40, 40), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tril()
    hitters = share(heavy, budget)
    recent = budget - hitters
    held, sums = [], torch.zeros(40, dtype=torch.float64)
    for tokens, step in zip(generated(H2O(budget, heavy, 1), weights, prompt), range(prompt, 41), strict=True):
        for query in range(prompt) if step == prompt else [step - 1]:
            held += [query]
            sums += weights[query] if step == prompt else weights[query] * torch.isin(torch.arange(40), tensor(held))
        if len(held) > budget:
            older = sorted(held[: len(held) - recent], key=lambda token: float(sums[token]))[-hitters:]
            held = sorted(older) + held[len(held) - recent :]
        assert sorted(tokens.position[0].tolist()) == held


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.int64)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, prompt=st.integers(1, 60), budget=BUDGETS, every=st.integers(1, 20))
def test_the_budget_is_never_exceeded_and_seldom_evicted_to(seed, prompt, budget, every):
    weights = torch.rand((90, 90), generator=torch.Generator().manual_seed(seed)).tril()
    rule = H2O(budget, every=every)
    history = generated(rule, weights, prompt)
    held = [tokens.position.shape[1] for tokens in history]
    limits = [rule.limit(tokens.seen) for tokens in history]
    assert held[0] == min(limits[0], prompt)
    assert all(count <= limit for count, limit in zip(held, limits, strict=True))
    assert all(tokens.seen - 1 in tokens.position for tokens in history if rule.limit(tokens.seen) > 1)
    if isinstance(budget, int):
        evictions = sum(now <= before for before, now in pairwise(held))
        assert evictions <= 1 + (90 - prompt) / min(every, 1 + budget // 8)


@pytest.mark.parametrize(
    ("rule", "seen", "newest", "heavy"),
    [
        (H2O(), 1000, 100, 100),  # the paper's 20 %
        (H2O(0.5), 626, 156, 157),  # AttentionPack's baseline on LLaVA-1.5
        (H2O(2048), 4096, 1024, 1024),  # the authors' summarisation script
        (H2O(0.1, 0.25), 1000, 75, 25),  # as A-VL splits it
    ],
)
def test_published_budgets(rule, seen, newest, heavy):
    tokens = drawn(0, 1, seen, 0, 0, False, True)
    tokens.score[:] = -tokens.position
    kept = sorted(tokens.position[rule.keep(tokens)].tolist())
    assert kept == [*range(heavy), *range(seen - newest, seen)]


def test_a_short_sample_beside_a_long_one_keeps_as_many():
    tokens = drawn(0, 2, 40, 0, 0, False, True)
    tokens.position[0, tokens.position[0] < 25] = -1
    tokens.real[0] = 15
    assert H2O(0.5).keep(tokens).sum(1).tolist() == [15, 20]
    assert H2O(0.2).keep(tokens).sum(1).tolist() == [8, 8]


@settings(deadline=None, max_examples=20)
@given(tokens=TOKENS, target=TARGETS)
def test_the_whole_budget_keeps_everything(tokens, target):
    assert H2O(1.0, target=target).keep(tokens) is None
    assert H2O(40, target=target).keep(tokens) is None


def test_without_vision_tokens_nothing_is_theirs():
    tokens = drawn(0, 2, 30, 0, 0, False, True)
    assert H2O(0.2, target="vision").keep(tokens) is None
    assert torch.equal(H2O(0.2, target="text").keep(tokens), H2O(0.2).keep(tokens))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, r"H2O\(budget=0\): expected a share .* or a number .*; for example budget=0.2"),
        ({"budget": 1.5}, r"H2O\(budget=1.5\)"),
        ({"budget": True}, r"H2O\(budget=True\)"),
        ({"budget": "half"}, r"H2O\(budget='half'\)"),
        ({"heavy": 2}, r"H2O\(heavy=2\): expected a number in \[0, 1\]; for example heavy=0.5"),
        ({"every": 0}, r"H2O\(every=0\): expected a whole number of at least 1"),
        ({"target": "image"}, r"H2O\(target='image'\): expected one of 'all', 'vision', 'text'"),
        ({"heads": "both"}, r"H2O\(heads='both'\): expected one of 'auto', 'apart', 'together'"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        H2O(**fields)
