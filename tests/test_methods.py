"""Methods of a policy as plain data."""

import json

import pytest

from attnpack_fx import KIVI, PackPolicy, PolicyError
from attnpack_fx.methods import checked_methods, to_mapping
from attnpack_fx.passes.catalogue import METHODS
from attnpack_fx.passes.method import Method
from attnpack_fx.passes.random_eviction import RandomEviction


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_every_method_goes_through_plain_data(kind):
    method: Method = kind(**({"budget": 0.5} if kind is RandomEviction else {}))
    mapping = json.loads(json.dumps(to_mapping(method)))
    assert mapping["method"] == kind.__name__
    assert checked_methods([mapping]) == (method,) == checked_methods(method) == checked_methods((method,))


def test_a_policy_with_methods_goes_through_a_mapping():
    policy = PackPolicy(vision_rank=4, passes=({"method": "H2O", "budget": 0.5}, KIVI(4)))
    assert [method.name for method in policy.passes] == ["H2O", "KIVI"]
    assert policy.passes[0].budget == 0.5
    assert PackPolicy.from_dict(policy.to_dict()) == policy


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("H2O", "expected methods in a tuple"),
        ([KIVI], r"passes\[0\]: got the class KIVI"),
        ([KIVI(), 3], r"passes\[1\]: got 3"),
        ([{"budget": 0.5}], "expected a method or a mapping with its name"),
        ([{"method": "H20"}], "H2O"),
        ([{"method": "H2O", "bugdet": 0.5}], "bugdet"),
        ([{"method": "H2O", "budget": 0.0}], r"passes\[0\]: "),
        ([{"method": "H2O"}, {"method": "StreamingLLM"}], "H2O with StreamingLLM"),
        ([KIVI(), KIVI(4)], "twice"),
    ],
)
def test_what_is_no_list_of_methods(values, says):
    with pytest.raises(PolicyError, match=says):
        checked_methods(values)
