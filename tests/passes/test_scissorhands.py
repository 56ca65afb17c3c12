import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.passes.method import Observation
from attnpack_fx.passes.scissorhands import Scissorhands

from .stored_tokens import BUDGETS, TARGETS, TOKENS, drawn, generated, mask, most_seen, most_stored, share, slots


def expected(rule, tokens):
    """From the paper: a full cache drops the tokens with the lowest counts, of those that are not recent."""
    limit = rule.budget
    if not isinstance(limit, int):
        limit = max(1, rule.recent, share(limit, most_seen(tokens, rule.target)))
    if most_stored(tokens, rule.target) <= limit:
        return None
    recent = min(rule.recent, limit)
    count = limit if tokens.prefill else max(limit + 1 - share(rule.drop, limit), recent)
    kept = []
    for row in range(len(tokens.real)):
        mine, others = slots(tokens, row, rule.target)
        droppable = mine[: max(0, len(mine) - recent)]
        droppable.sort(key=lambda slot: (float(tokens.score[row, slot]), int(tokens.position[row, slot])))
        dropped = set(droppable[: max(0, len(mine) - count)])
        kept.append(others + [slot for slot in mine if slot not in dropped])
    return mask(tokens, kept)


@settings(deadline=None, max_examples=150)
@given(
    tokens=TOKENS,
    budget=BUDGETS,
    recent=st.integers(0, 12),
    drop=st.sampled_from([0.01, 0.25, 0.5, 1.0]),
    target=TARGETS,
)
def test_who_stays(tokens, budget, recent, drop, target):
    if isinstance(budget, int):
        budget = max(budget, recent, 1)
    rule = Scissorhands(budget, recent=recent, drop=drop, target=target)
    actual, wanted = rule.keep(tokens), expected(rule, tokens)
    assert actual is None if wanted is None else torch.equal(actual, wanted)


def test_a_full_cache_loses_half_and_fills_again():
    counts = torch.rand((120, 120), generator=torch.Generator().manual_seed(0)).tril()
    history = generated(Scissorhands(40), (counts > 0.5).float(), 60)
    held = [tokens.position.shape[1] for tokens in history]
    # 40 of the prompt; the 41st token makes 20 leave.
    assert held == ([40] + [*range(21, 41)] * 3)[: len(held)]
    for tokens in history:
        assert set(range(tokens.seen - 10, tokens.seen)) <= set(tokens.position[0].tolist())


def test_half_of_llava_stays_with_the_published_defaults():
    rule = Scissorhands()
    assert (rule.budget, rule.window, rule.recent, rule.drop) == (0.5, 400, 10, 0.5)
    assert rule.keep(drawn(0, 1, 626, 0, 0, False, True)).sum() == 313


def test_it_asks_for_pivotal_counts_within_its_window():
    assert Scissorhands().observes == Observation("pivotal", window=400)
    assert Scissorhands(window=100).observes == Observation("pivotal", window=100)


@settings(deadline=None, max_examples=20)
@given(tokens=TOKENS, target=TARGETS)
def test_the_whole_budget_keeps_everything(tokens, target):
    assert Scissorhands(1.0, target=target).keep(tokens) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": -0.5}, r"Scissorhands\(budget=-0.5\): expected a share"),
        ({"window": 0}, r"Scissorhands\(window=0\): expected a whole number of at least 1"),
        ({"recent": -1}, r"Scissorhands\(recent=-1\): expected a whole number of at least 0"),
        ({"drop": 0}, r"Scissorhands\(drop=0\): expected a number in \(0, 1\]"),
        ({"budget": 8}, r"Scissorhands\(budget=8, recent=10\): expected .*; raise budget or lower recent"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Scissorhands(**fields)
