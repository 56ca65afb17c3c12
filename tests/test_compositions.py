"""Every legal pair of methods, and some triples, on models in turn; `compositions.py` has what must hold of each."""

import pytest

from tests.compositions import MEMBERS, MODELS, Composition, Subject, failures, legal, names, refusal, triples

#: Of legal pairs every so many, and of these so many where they change nothing, too. The benchmark checks all.
PAIRS, EVERY = 2, 8
TRIPLES = 10
#: What only a model with vision tokens shows.
_VISION = ("AVL", "FastV", "ASAP", "RandomPrune", "Pool")


@pytest.fixture(autouse=True)
def _alone(fresh_dynamo):
    """What other tests compiled is not reused."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:attnpack")
@pytest.mark.parametrize("model", MODELS)
def test_compositions_are_finite_repeatable_small_and_exact_where_they_do_nothing(model):
    subject = Subject(model)
    wrong = {}
    for number, members in enumerate(_of(model)):
        found = failures(subject, members, off=number % EVERY == 0)
        if found:
            wrong[names(members)] = found
    assert not wrong


def _of(model: str) -> list[Composition]:
    """Pairs on the cheapest model that shows them; triples on all, few on Qwen's, whose calls are slow to capture."""
    chosen = [pair for pair in legal(2) if sum(map(MEMBERS.index, pair)) % PAIRS == 0]
    seeing = [pair for pair in chosen if any(member.name in _VISION for member in pair)]
    pairs = {"llava-mha": seeing, "llama": [pair for pair in chosen if pair not in seeing]}
    some = triples(TRIPLES)
    return pairs.get(model, []) + {"llava-mha": some[:4], "qwen2.5-vl": some[4:6], "llama": some[6:]}[model]


def test_every_method_is_in_some_of_them():
    found = [members for model in MODELS for members in _of(model)]
    assert len({*found}) == len(found) >= len(legal(2)) // PAIRS - 2 + TRIPLES
    of_pairs = [member for members in found if len(members) == 2 for member in members]
    assert all(of_pairs.count(member) >= 3 for member in MEMBERS)


def test_a_wrong_composition_is_found(monkeypatch):
    subject = Subject("llama")
    # Where nothing should be lost, factors still have rank 2.
    monkeypatch.setattr("tests.compositions._FULL", 2)
    found = failures(subject, MEMBERS[:2])
    assert len(found) == 1 and "logits differ from dense ones" in found[0]


def test_pairs_that_are_refused_say_what_to_do_instead():
    reasons = [refusal((one, two)) for number, one in enumerate(MEMBERS) for two in MEMBERS[number + 1 :]]
    given = [reason for reason in reasons if reason is not None]
    assert len(given) == len(reasons) - len(legal(2)) > 0
    assert all("use" in reason or "drop" in reason or "give" in reason for reason in given)
