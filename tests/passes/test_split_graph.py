"""A graph cut in two computes what it did in one."""

from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node

from attnpack_fx.passes.split_graph import split_graph, splits_region
from tests.passes.capture import CapturedGraph, capture, capture_graphs, operations


def run(graph: CapturedGraph, last: Node) -> tuple[list[Any], list[Any]]:
    """What the whole graph returns, and what its two parts do."""
    split = split_graph(graph.state.graph, last)
    first, second = (GraphModule(graph.module, each) for each in (split.first, split.second))
    first.graph.lint()
    second.graph.lint()
    made: dict[str, Any] = {"argument": graph.arguments, "first": first(*graph.arguments)}
    given = [made[part][number] for (part, number), _ in split.crossing]
    made["second"] = second(*(each if isinstance(each, torch.Tensor) else torch.empty(0, each) for each in given))
    whole = GraphModule(graph.module, graph.state.graph)(*graph.arguments)
    return list(whole), [made[part][number] for part, number in split.results]


def decoder(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    early = x @ weight
    left, right = early.split(early.shape[-1] // 2, -1)
    chosen = left.relu()
    late = (chosen + right).view(x.shape[0], x.shape[1], 2, -1)
    return late.sum(2) @ weight[: late.shape[-1]], early, x


@pytest.mark.parametrize("last", range(1, 8))
@pytest.mark.parametrize("symbolic", [False, True])
def test_two_parts_return_what_the_whole_does(last, symbolic):
    x = torch.randn(3, 5, 8)
    if symbolic:
        torch._dynamo.maybe_mark_dynamic(x, 1)
    (graph,) = capture_graphs(decoder, x, torch.randn(8, 8))
    computed = [node for node in graph.state.graph.nodes if node.op in ("call_function", "call_method")]
    whole, parts = run(graph, computed[min(last, len(computed) - 2)])
    assert len(whole) == len(parts)
    for one, other in zip(whole, parts, strict=True):
        assert one == other if isinstance(one, int) else torch.equal(one, other)


def test_items_cross_not_the_operation_of_several_results():
    (graph,) = capture_graphs(decoder, torch.randn(3, 5, 8), torch.randn(8, 8))
    split = next(node for node in graph.state.graph.nodes if getattr(node.target, "__name__", node.target) == "split")
    cut = split_graph(graph.state.graph, split)
    assert all(node is not split for _, node in cut.crossing)
    whole, parts = run(graph, split)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_the_graph_itself_stays_as_it_is():
    state = capture(decoder, torch.randn(3, 5, 8), torch.randn(8, 8))
    before = str(state.graph)
    split_graph(state.graph, next(node for node in state.graph.nodes if node.op != "placeholder"))
    assert str(state.graph) == before


def in_regions(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        x = x @ x
        x = x.relu()
    with torch.enable_grad():
        x = x.sin()
    return x.cos()


def test_a_cut_inside_a_region_is_told():
    state = capture(in_regions, torch.randn(4, 4))
    nodes, names = list(state.graph.nodes), operations(state)
    told = {str(node.target): splits_region(nodes[: number + 1]) for number, node in enumerate(nodes)}
    inside = {getattr(node.target, "__name__", node.target): told[str(node.target)] for node in nodes}
    assert "_enter_autocast" in names
    assert inside["matmul"] and inside["relu"] and inside["sin"]
    assert not inside["cos"]
