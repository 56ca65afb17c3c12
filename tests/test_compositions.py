"""Every legal pair of methods, and some triples, on models in turn; `compositions.py` has what must hold of each."""

import pytest

from tests.compositions import MEMBERS, MODELS, Composition, Subject, failures, legal, names, refusal, triples

TRIPLES = 20
COMPOSITIONS = [*legal(2), *triples(TRIPLES)]


@pytest.fixture(autouse=True)
def _alone(fresh_dynamo):
    """What other tests compiled is not reused."""


@pytest.mark.filterwarnings("ignore:attnpack")
@pytest.mark.parametrize("model", MODELS)
def test_compositions_are_finite_repeatable_small_and_exact_where_they_do_nothing(model):
    subject = Subject(model)
    wrong = {names(members): found for members in _of(model) if (found := failures(subject, members))}
    assert not wrong


def _of(model: str) -> list[Composition]:
    return COMPOSITIONS[MODELS.index(model) :: len(MODELS)]


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
