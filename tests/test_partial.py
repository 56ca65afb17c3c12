import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.partial import Partial, checked_partial
from attnpack_fx.policy import PolicyError


def test_defaults_are_the_papers():
    partial = Partial()
    assert (partial.shares, partial.fractions, partial.momentum, partial.keys) == ((0.25, 0.75), (1, 0.25), 0.25, False)
    assert (partial.regroup_every, partial.store) == (16, False)
    # The saving the default implies on values: 56.25 % of the decompression.
    assert 1 - sum(s * f for s, f in zip(partial.shares, partial.fractions, strict=True)) == 0.5625


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shares": ()}, r"partial.shares: got \(\), expected one number in \(0, 1\] for each group"),
        ({"shares": 1.0}, "partial.shares: got 1.0"),
        ({"shares": (0.0, 1.0)}, "partial.shares: got"),
        ({"shares": (True,)}, "partial.shares: got"),
        ({"shares": (0.5, 0.4)}, r"partial.shares: got \(0.5, 0.4\), which sum to 0.9, expected a sum of 1"),
        ({"shares": (0.5, 0.25, 0.25)}, "partial.fractions: got 2 for 3 shares, expected one for each group"),
        ({"fractions": (1, float("nan"))}, "partial.fractions: got"),
        ({"fractions": (1, 0)}, "partial.fractions: got"),
        ({"fractions": (0.5, 0.25)}, "partial.fractions: got .*expected 1 first"),
        (
            {"shares": (0.2, 0.3, 0.5), "fractions": (1, 0.25, 0.5)},
            "partial.fractions: got .*none above the one before",
        ),
        ({"momentum": 1}, r"partial.momentum: got 1, expected a number in \[0, 1\)"),
        ({"momentum": -0.1}, "partial.momentum: got -0.1"),
        ({"momentum": "0.5"}, "partial.momentum: got '0.5'"),
        ({"keys": 1}, "partial.keys: got 1, expected a bool"),
        ({"regroup_every": 0}, "partial.regroup_every: got 0 .*expected an int >= 1"),
        ({"store": None}, "partial.store: got None, expected a bool"),
        ({"shares": (1,), "fractions": (1,), "store": True}, "partial.store: got True with a single group"),
    ],
)
def test_bad_field_is_refused(given, message):
    with pytest.raises(PolicyError, match=message):
        Partial(**given)


def test_a_mapping_or_nothing():
    assert checked_partial(None) is None
    assert checked_partial({}) == Partial()
    assert checked_partial({"shares": [0.5, 0.5]}) == Partial(shares=(0.5, 0.5))
    partial = Partial(keys=True)
    assert checked_partial(partial) is partial
    assert checked_partial(dataclasses.asdict(partial)) == partial


def test_columns_are_rounded_up():
    partial = Partial(shares=(0.2, 0.3, 0.5), fractions=(1, 0.5, 0.1))
    assert [partial.columns(rank) for rank in (1, 5, 30, 31)] == [(1, 1, 1), (5, 3, 1), (30, 15, 3), (31, 16, 4)]


@given(st.lists(st.floats(1e-12, 1), max_size=4), st.integers(1, 4096))
@settings(max_examples=60, deadline=None)
def test_columns_never_grow_and_never_vanish(fractions, rank):
    fractions = (1, *sorted(fractions, reverse=True))
    columns = Partial(shares=[1 / len(fractions)] * len(fractions), fractions=fractions).columns(rank)
    assert columns[0] == rank
    assert sorted(columns, reverse=True) == list(columns)
    assert columns[-1] >= 1
