import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.passes.streaming_llm import StreamingLLM

from .stored_tokens import BUDGETS, TARGETS, TOKENS, drawn, generated, mask, most_seen, most_stored, share, slots


def expected(rule, tokens):
    seen = most_seen(tokens, rule.target)
    limit = rule.sinks + (rule.recent if isinstance(rule.recent, int) else max(1, share(rule.recent, seen)))
    if most_stored(tokens, rule.target) <= limit:
        return None
    count = limit if tokens.prefill else limit + 1 - min(rule.every, 1 + limit // 8, limit - rule.sinks)
    kept = []
    for row in range(len(tokens.real)):
        mine, others = slots(tokens, row, rule.target)
        kept.append(others + mine[: rule.sinks] + mine[rule.sinks :][-(count - rule.sinks) :])
    return mask(tokens, kept)


@settings(deadline=None, max_examples=150)
@given(tokens=TOKENS, sinks=st.integers(0, 8), recent=BUDGETS, every=st.integers(1, 20), target=TARGETS)
def test_who_stays(tokens, sinks, recent, every, target):
    rule = StreamingLLM(sinks, recent, every, target=target)
    actual, wanted = rule.keep(tokens), expected(rule, tokens)
    assert actual is None if wanted is None else torch.equal(actual, wanted)


@pytest.mark.parametrize("prompt", [3, 20, 60])
def test_one_at_a_time_is_the_published_cache(prompt):
    history = generated(StreamingLLM(4, 12, 1), torch.ones(80, 80), prompt)
    for tokens in history:
        everything = list(range(tokens.seen))
        wanted = everything if tokens.seen <= 16 else everything[:4] + everything[-12:]
        assert sorted(tokens.position[0].tolist()) == wanted


def test_sinks_outlive_any_number_of_steps():
    history = generated(StreamingLLM(4, 40), torch.ones(300, 300), 100)
    assert all({0, 1, 2, 3, tokens.seen - 1} <= set(tokens.position[0].tolist()) for tokens in history)
    assert [tokens.position.shape[1] for tokens in history[:8]] == [44, 39, 40, 41, 42, 43, 44, 39]


def test_sinks_are_the_first_tokens_after_padding():
    tokens = drawn(1, 2, 30, 5, 2, False, True)
    kept = StreamingLLM(2, 3).keep(tokens)
    for row, first in ((0, 5), (1, 4)):
        assert sorted(tokens.position[row, kept[row]].tolist()) == [first, first + 1, 27, 28, 29]


@settings(deadline=None, max_examples=20)
@given(tokens=TOKENS, target=TARGETS)
def test_a_window_as_long_as_the_cache_keeps_everything(tokens, target):
    assert StreamingLLM(target=target).keep(tokens) is None
    assert StreamingLLM(recent=1.0, target=target).keep(tokens) is None


def test_published_sizes():
    assert StreamingLLM().keep(drawn(0, 1, 1000, 0, 0, False, True)).sum() == 4 + 512
    assert StreamingLLM(recent=0.25).keep(drawn(0, 1, 1000, 0, 0, False, True)).sum() == 4 + 250
    assert StreamingLLM().observes is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sinks": -1}, r"StreamingLLM\(sinks=-1\): expected a whole number of at least 0"),
        ({"recent": 0}, r"StreamingLLM\(recent=0\): expected a share"),
        ({"every": 0}, r"StreamingLLM\(every=0\): expected a whole number of at least 1"),
        ({"target": "sinks"}, r"StreamingLLM\(target='sinks'\): expected one of"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        StreamingLLM(**fields)
