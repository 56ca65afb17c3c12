"""Linear layers of packed decode steps go to `attnpack::linear`; all others stay."""

import pytest
import torch
import torch.nn.functional as F

from attnpack_fx.passes import pipeline
from tests.packing_inputs import FULL, packed_pair
from tests.passes.capture import capture, operations

WEIGHT = torch.randn(8, 8)


def step(past_key, past_value, new, query, weight):
    key, value = torch.cat([past_key, new], dim=2), torch.cat([past_value, new], dim=2)
    return F.linear(F.scaled_dot_product_attention(query, key, value), weight), key, value


def rewritten(rows=1, dtype=torch.float32, past=None):
    key, value, *_ = packed_pair(FULL) if past is None else past
    arguments = (torch.randn(2, 2, rows, 8), torch.randn(2, 2, rows, 8), WEIGHT)
    state = capture(step, key.to(dtype), value.to(dtype), *(item.to(dtype) for item in arguments))
    with torch.no_grad():
        counts = pipeline.run(state)
    return counts, operations(state)


def test_a_packed_decode_step_is_routed():
    counts, names = rewritten()
    assert counts["route_linear"] == 1
    assert "attnpack::linear" in " ".join(names) or "linear.default" in " ".join(names)


@pytest.mark.parametrize("setting", [{"rows": 9}, {"dtype": torch.bfloat16}])
def test_many_rows_and_other_dtypes_are_left(setting):
    counts, _ = rewritten(**setting)
    assert counts["route_linear"] == 0


def test_a_dense_step_is_left():
    dense = torch.randn(2, 2, 12, 8)
    counts, _ = rewritten(past=(dense, dense))
    assert counts["route_linear"] == 0
