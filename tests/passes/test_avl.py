from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.passes.avl import AVL
from attnpack_fx.passes.method import Observation, Stage

from .stored_tokens import TOKENS, drawn, mask, share, slots

SHARES = st.sampled_from([(0.5, 0.4), (0.5, 0.5), (0.75, 0.3), (1.0, 0.4), (1.0, 1.0), (0.1, 0.05)])


def highest(tokens, row, chosen, count):
    """Slots with the highest scores, the newer of equal ones."""
    position = tokens.position[row]
    ranked = sorted(chosen, key=lambda slot: (float(tokens.score[row, slot]), int(position[slot])), reverse=True)
    return ranked[:count]


def expected_text(rule, tokens, images):
    """How many text tokens stay, from the rule's formula; None for all."""
    if rule.text_rate is None:
        return None
    seen = max(int(tokens.real[row]) - images[row] for row in range(len(images)))
    limit = max(rule.text_least, share(1 - rule.text_rate, seen))
    if max(len(slots(tokens, row, "text")[0]) for row in range(len(images))) <= limit:
        return None
    return limit if tokens.prefill else limit + 1 - min(rule.text_every, 1 + limit // 8)


def expected(rule, tokens, images):
    count, kept = expected_text(rule, tokens, images), []
    for row in range(len(images)):
        text, vision = slots(tokens, row, "text")
        if tokens.prefill:
            vision = highest(tokens, row, vision, share(rule.kept, len(vision)))
        if count is not None:
            hitters = min(share(rule.text_heavy, count), count - 1)
            older, newest = text[: max(0, len(text) - count + hitters)], text[max(0, len(text) - count + hitters) :]
            text = newest + highest(tokens, row, older, hitters)
        kept.append(text + vision)
    return mask(tokens, kept)


def known(tokens, more):
    """As if `more` vision tokens of each row had been evicted, and the cache knew."""
    stored = torch.tensor([len(slots(tokens, row, "vision")[0]) for row in range(len(tokens.real))])
    return replace(tokens, real=tokens.real + more, vision_seen=stored + more)


@settings(deadline=None, max_examples=150)
@given(
    tokens=TOKENS,
    shares=SHARES,
    rate=st.sampled_from([None, 0.0, 0.4, 0.9]),
    least=st.integers(1, 12),
    heavy=st.sampled_from([0.0, 0.5, 1.0]),
    every=st.integers(1, 20),
    evicted=st.integers(0, 9),
)
def test_who_stays(tokens, shares, rate, least, heavy, every, evicted):
    rule = AVL(*shares, 3, rate, least, heavy, every)
    tokens = known(tokens, 0 if tokens.prefill else evicted)
    actual = rule.keep(tokens)
    wanted = expected(rule, tokens, tokens.vision_seen.tolist())
    assert torch.equal(tokens.position >= 0 if actual is None else actual, wanted)


@settings(deadline=None, max_examples=100)
@given(tokens=TOKENS, shares=SHARES, evicted=st.integers(0, 9))
def test_what_steps_read(tokens, shares, evicted):
    tokens, wanted = known(tokens, evicted), []
    for row, count in enumerate(tokens.vision_seen.tolist()):
        text, vision = slots(tokens, row, "text")
        wanted.append(text + highest(tokens, row, vision, share(shares[1], count)))
    assert torch.equal(AVL(*shares).core_of(tokens), mask(tokens, wanted))


@settings(deadline=None, max_examples=60)
@given(tokens=TOKENS, shares=SHARES, rate=st.sampled_from([None, 0.4]))
def test_the_core_is_part_of_what_stays_and_of_the_same_count(tokens, shares, rate):
    """Also where nobody tells the cache how many vision tokens there were."""
    tokens = replace(tokens, prefill=True)
    rule = AVL(*shares, text_rate=rate, text_least=1)
    kept = rule.keep(tokens)
    kept = tokens.position >= 0 if kept is None else kept
    left = replace(tokens, position=torch.where(kept, tokens.position, -1))
    core = rule.core_of(left)
    assert not (core & ~kept).any()
    for row in range(len(tokens.real)):
        vision = len(slots(tokens, row, "vision")[0])
        count = sum(bool(core[row, slot]) for slot in slots(left, row, "vision")[0])
        assert share(rule.core, vision) <= count <= share(rule.core, vision) + 1 / rule.kept
        if rule.core == rule.kept:
            assert torch.equal(core[row], kept[row])


@pytest.mark.parametrize(("core", "read"), [(0.4, 231), (0.3, 173)])
def test_published_numbers_on_llava(core, read):
    """576 vision tokens among 50 of text: 288 stay; the code's default reads 40 % of 576, its script 30 %."""
    tokens = drawn(0, 1, 626, 0, 0, False, True)
    tokens = replace(tokens, vision=(tokens.position >= 35) & (tokens.position < 611))
    rule = AVL(core=core)
    kept = rule.keep(tokens)
    assert kept.sum() == 288 + 50
    left = replace(tokens, position=torch.where(kept, tokens.position, -1))
    assert rule.core_of(left).sum() == read + 50
    assert AVL(text_rate=0.4).keep(tokens).sum() == 288 + 30


def test_vision_leaves_at_prefill_alone_and_text_whenever_it_is_too_much():
    tokens = drawn(0, 1, 200, 0, 0, False, False)
    tokens = replace(tokens, vision=tokens.position < 60, vision_seen=torch.tensor([60]))
    assert AVL().keep(tokens) is None
    kept = AVL(text_rate=0.5).keep(tokens)
    # Half of 140, less what leaves at once.
    assert kept[tokens.vision].all() and kept[~tokens.vision].sum() == 70 - 9 + 1


def test_a_sample_keeps_its_share_whatever_stands_beside_it():
    tokens = drawn(3, 3, 60, 8, 2, True, True)
    together = AVL().keep(tokens)
    for row in range(3):
        parts = {name: getattr(tokens, name)[row : row + 1] for name in ("position", "score", "vision", "real")}
        assert torch.equal(AVL().keep(replace(tokens, **parts))[0], together[row])


def test_text_grows_into_its_budget():
    text = 40
    tokens = replace(drawn(0, 1, text, 0, 0, False, True), vision=None)
    rule, held = AVL(text_rate=0.4, text_every=1), []
    for step in range(60):
        kept = rule.keep(tokens)
        position = tokens.position if kept is None else tokens.position[kept][None]
        score = tokens.score if kept is None else tokens.score[kept][None]
        held.append(position.shape[1])
        seen = text + step + 1
        tokens = replace(
            tokens,
            position=torch.cat([position, torch.tensor([[seen - 1]])], 1),
            score=torch.cat([score, torch.zeros(1, 1)], 1),
            seen=seen,
            real=torch.tensor([seen]),
            prefill=False,
        )
    assert held == [share(0.6, text + step) for step in range(60)]


def test_which_steps_read_everything():
    assert [step for step in range(1, 13) if AVL().rereads(step)] == [3, 6, 9, 12]
    assert all(AVL(every=1).rereads(step) for step in range(1, 5))
    assert not any(AVL(every=None).rereads(step) for step in range(1, 100))


def test_shares_of_one_store_and_read_everything():
    tokens = drawn(0, 2, 40, 3, 2, True, True)
    assert AVL(1.0, 1.0).keep(tokens) is None
    assert torch.equal(AVL(1.0, 1.0).core_of(tokens), tokens.position >= 0)


def test_without_vision_tokens_everything_is_read():
    tokens = drawn(0, 2, 40, 3, 2, False, True)
    assert AVL().keep(tokens) is None
    assert torch.equal(AVL().core_of(tokens), tokens.position >= 0)


def test_what_it_is():
    assert AVL.stages == {Stage.EVICT, Stage.SELECT}
    assert AVL.observes == Observation("last", text="sum")
    assert AVL().heads == "together"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kept": 0}, r"AVL\(kept=0\): expected a number in \(0, 1\]"),
        ({"core": 1.5}, r"AVL\(core=1.5\): expected a number in \(0, 1\]"),
        ({"core": 0.6}, r"AVL\(kept=0.5, core=0.6\): expected core to be at most kept, .*; lower core to 0.5"),
        ({"every": 0}, r"AVL\(every=0\): expected a whole number of at least 1"),
        ({"text_rate": 1.1}, r"AVL\(text_rate=1.1\): expected a number in \[0, 1\]"),
        ({"text_least": 0}, r"AVL\(text_least=0\)"),
        ({"text_heavy": -1}, r"AVL\(text_heavy=-1\)"),
        ({"text_every": 0}, r"AVL\(text_every=0\)"),
        ({"heads": "apart"}, r"AVL\(heads='apart'\): expected 'together', .*; leave heads out"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        AVL(**fields)
