"""Two parts of a graph, the second compiled when it is first called."""

from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from attnpack_fx.passes.split_graph import split_graph
from attnpack_fx.split_call import SplitCall
from tests.passes.capture import CapturedGraph, capture_graphs

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def chosen(x: torch.Tensor, keep: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Some rows of `[1, T, C]`, as many as the data say, in a later product."""
    rows = x[:, keep]
    return rows @ weight


def split(compiler: Any, failed: Any = None) -> tuple[SplitCall, CapturedGraph]:
    (graph,) = capture_graphs(chosen, torch.randn(1, 8, 4), torch.tensor([0, 2, 5]), torch.randn(4, 4))
    rows = next(node for node in graph.state.graph.nodes if getattr(node.target, "__name__", "") == "getitem")
    cut = split_graph(graph.state.graph, rows)
    first, second = (GraphModule(graph.module, each) for each in (cut.first, cut.second))
    return SplitCall(cut, first, second, (rows,), compiler, failed), graph


def test_another_number_of_rows_compiles_nothing_anew():
    compiled: list[GraphModule] = []

    def compiler(module: GraphModule, examples: list[Any]) -> Any:
        compiled.append(module)
        return module

    call, graph = split(compiler)
    x, _, weight = graph.arguments
    for count in (3, 5, 7):
        (result,) = call(x, torch.arange(count), weight)
        assert torch.equal(result, x[:, :count] @ weight)
    assert len(compiled) == 1


def test_marks_are_not_left_on_what_the_caller_holds():
    call, graph = split(lambda module, examples: module)
    call(*graph.arguments)
    assert not any(hasattr(each, "_dynamo_weak_dynamic_indices") for each in graph.arguments)


def failing(module: GraphModule, examples: list[Any]) -> Any:
    raise RuntimeError("no compiler")


def test_a_part_that_cannot_be_compiled_runs_as_it_is():
    told: list[Exception] = []
    call, graph = split(failing, told.append)
    (result,) = call(*graph.arguments)
    assert torch.equal(result, chosen(*graph.arguments))
    (again,) = call(*graph.arguments)
    assert torch.equal(again, result)
    assert [str(error).count("no compiler") for error in told] == [1]


def test_what_the_caller_raises_is_raised():
    def failed(error: Exception) -> None:
        raise error

    call, graph = split(failing, failed)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no compiler"):
        call(*graph.arguments)
