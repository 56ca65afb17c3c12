"""Cleanup leaves a checked graph whose placeholders are exactly what the runtime feeds."""

import pytest
import torch

from attnpack_fx.passes.cleanup import cleanup
from attnpack_fx.passes.state import Argument
from tests.packing_inputs import packed_pair
from tests.passes.capture import capture, operations

X = torch.randn(3, 4)


def test_dead_nodes_go_and_are_counted():
    state = capture(lambda x: x.neg(), X)
    placeholder = next(iter(state.inputs))
    with state.graph.inserting_before(state.output):
        dead = state.graph.call_method("exp", (placeholder,))
        state.graph.call_method("sin", (dead,))
    assert cleanup(state) == 2
    assert operations(state) == ["neg"]
    assert cleanup(state) == 0


def write_by_method(x, y):
    x.add_(1.0)
    return x * y


def write_a_view(x, y):
    x[0].copy_(y[1])
    return x * y


def write_by_index(x, y):
    x[1] = 7.0
    x.index_copy_(0, torch.tensor([2]), y[:1])
    return x * y


def write_out(x, y):
    torch.mul(y, 2.0, out=x)
    return x * y


@pytest.mark.parametrize("function", [write_by_method, write_a_view, write_by_index, write_out])
def test_writes_stay_though_nobody_reads_their_result(function):
    state = capture(function, X.clone(), X + 1)
    names = [node.name.removeprefix("l_").rstrip("_") for node in state.inputs]
    cleanup(state)
    written, expected = X.clone(), X.clone()
    values = {"x": written, "y": X + 1}
    (actual,) = torch.fx.GraphModule({}, state.graph)(*(values[name] for name in names))
    assert torch.equal(actual, function(expected, X + 1))
    assert torch.equal(written, expected)


def test_arguments_of_the_caller_stay_read_or_not():
    state = capture(lambda x, y: x + y, X, X.clone())
    used, unused = state.inputs
    state.output.args = ((used,),)
    cleanup(state)
    assert list(state.inputs.values()) == [Argument(0), Argument(1)]
    assert [node for node in state.graph.nodes if node.op == "placeholder"] == [used, unused]


def test_placeholders_of_parts_nobody_reads_go():
    key, *_ = packed_pair()
    state = capture(lambda packed, x: (packed.sum(), x.neg()), key, X)
    (packed,) = state.packed.values()
    read, unread = state.part(packed, "index"), state.part(packed, "slot")
    state.output.args = ((read, state.results[1]),)
    cleanup(state)
    assert unread not in state.inputs and unread not in state.examples
    assert packed.node not in state.inputs
    assert read in state.inputs
    assert [node for node in state.graph.nodes if node.op == "placeholder"] == list(state.inputs)


def test_a_packed_value_that_is_still_read_is_an_error():
    key, *_ = packed_pair()
    state = capture(lambda packed: packed.sum(), key)
    with pytest.raises(RuntimeError, match="still read"):
        cleanup(state)
