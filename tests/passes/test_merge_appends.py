"""The two appends of a layer become one call, unless something between them depends on their order."""

import pytest
import torch
import torch.nn.functional as F

from attnpack_fx import attnpack_backend
from attnpack_fx.passes import pipeline
from tests.packing_inputs import FULL, packed_pair
from tests.passes.capture import capture, operations


def adjacent(past_key, past_value, new, query):
    key, value = torch.cat([past_key, new], dim=2), torch.cat([past_value, new * 2], dim=2)
    return F.scaled_dot_product_attention(query, key, value), key, value


def written_between(past_key, past_value, new, query):
    new = new.clone()
    key = torch.cat([past_key, new], dim=2)
    new.mul_(2)
    value = torch.cat([past_value, new], dim=2)
    return F.scaled_dot_product_attention(query, key, value), key, value


def read_between(past_key, past_value, new, query):
    key = torch.cat([past_key, new], dim=2)
    query = F.scaled_dot_product_attention(query, key, key)
    value = torch.cat([past_value, new * 2], dim=2)
    return F.scaled_dot_product_attention(query, key, value), key, value


@pytest.mark.parametrize(("function", "calls"), [(adjacent, 1), (written_between, 2), (read_between, 2)])
def test_appends_are_merged_where_order_does_not_matter(function, calls, without_inductor):
    key, value, dense_key, dense_value = packed_pair(FULL)
    inputs = [torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)]
    state = capture(function, key, value, *inputs)
    with torch.no_grad():
        counts = pipeline.run(state)
        compiled = torch.compile(function, backend=attnpack_backend, options={"policy": FULL})
        results = compiled(key, value, *inputs)
    assert counts["merge_appends"] == (calls == 1)
    assert sum(name.startswith("append_") for name in operations(state)) == calls
    for actual, expected in zip(results, function(dense_key, dense_value, *inputs), strict=True):
        actual = actual.dense() if hasattr(actual, "dense") else actual
        assert torch.allclose(actual, expected, atol=1e-4)
