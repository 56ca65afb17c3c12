"""Matchers see through the spellings people use, and through nothing else."""

import pytest
import torch
from torch import nn
from torch.fx import Graph

from attnpack_fx.passes.patterns import argument, is_call, layer_number, layer_of, strip_repeat_kv, through_no_ops
from tests.passes.capture import capture

KV = torch.randn(2, 2, 5, 4)


def result_of(function, *arguments):
    """The node of the first value `function` returns, and the graph's first placeholder."""
    state = capture(function, *arguments)
    return state.results[0], next(node for node in state.graph.nodes if node.op == "placeholder")


@pytest.mark.parametrize(
    "function", [lambda x: x.softmax(-1), lambda x: torch.softmax(x, -1), lambda x: nn.functional.softmax(x, -1)]
)
def test_an_operation_is_found_however_it_is_called(function):
    node, _ = result_of(function, KV)
    assert is_call(node, "softmax")
    assert is_call(node, "tanh", "softmax")
    assert not is_call(node, "tanh")


def test_what_is_no_node_is_no_call():
    assert not is_call(3.0, "mul")
    _, placeholder = result_of(lambda x: x.neg(), KV)
    assert not is_call(placeholder, "neg")


@pytest.mark.parametrize("function", [lambda x: torch.cat([x, x], 2), lambda x: torch.cat([x, x], dim=2)])
def test_an_argument_is_read_by_position_or_keyword(function):
    node, _ = result_of(function, KV)
    assert argument(node, 1, "dim") == 2
    assert argument(node, 5, "missing", "default") == "default"


@pytest.mark.parametrize(
    "function", [lambda x: x.contiguous(), lambda x: x.to(torch.float32), lambda x: x.float().contiguous()]
)
def test_no_ops_are_looked_through(function):
    node, placeholder = result_of(function, KV)
    assert through_no_ops(node) is placeholder


@pytest.mark.parametrize("function", [lambda x: x.to(torch.float64), lambda x: x.transpose(2, 3), lambda x: x * 1.0])
def test_what_changes_a_value_is_not_a_no_op(function):
    node, _ = result_of(function, KV)
    assert through_no_ops(node) is node


def expanded_by_index(x):
    batch, heads, tokens, dim = x.shape
    return x[:, :, None, :, :].expand(batch, heads, 3, tokens, dim).reshape(batch, heads * 3, tokens, dim)


def expanded_by_unsqueeze(x):
    return x.unsqueeze(2).expand(-1, -1, 3, -1, -1).reshape(2, 6, 5, 4)


def repeated(x):
    return x.repeat_interleave(3, dim=1)


def repeated_functionally(x):
    return torch.repeat_interleave(x, 3, dim=-3)


@pytest.mark.parametrize("function", [expanded_by_index, expanded_by_unsqueeze, repeated, repeated_functionally])
def test_repeat_kv_is_stripped(function):
    node, placeholder = result_of(function, KV)
    assert strip_repeat_kv(node) is placeholder


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.repeat_interleave(3, dim=0),
        lambda x: x[:, None].expand(2, 3, 2, 5, 4).reshape(2, 6, 5, 4),  # head order h0 h1 h0 h1, not h0 h0 h1 h1
        lambda x: x.reshape(2, 2, 4, 5),
    ],
)
def test_other_reshapes_are_not_repeat_kv(function):
    node, _ = result_of(function, KV)
    assert strip_repeat_kv(node) is node


def test_a_node_is_named_after_its_module():
    class Inner(nn.Module):
        def forward(self, x):
            return x.neg()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    node, _ = result_of(Outer(), KV)
    assert layer_of(node).endswith("inner")


def test_the_model_among_the_arguments_of_a_decorator_is_no_layer():
    node, _ = result_of(lambda x: x.neg(), KV)
    node.meta["nn_module_stack"] = {"1": ("L['args'][0].model.layers.3.self_attn", nn.Module)}
    assert layer_of(node) == "model.layers.3.self_attn"
    assert layer_number(layer_of(node)) == 3


def test_a_node_outside_any_module_is_named_after_itself():
    node, _ = result_of(lambda x: x.neg(), KV)
    assert layer_of(node) == node.name


def test_the_layer_of_a_node_where_the_model_is_an_argument_by_number():
    graph = Graph()
    node = graph.placeholder("x")
    node.meta["nn_module_stack"] = {"layer": ("L['args'][0].model.layers[3].self_attn", None)}
    assert layer_of(node) == "model.layers[3].self_attn"
    assert layer_number(layer_of(node)) == 3
