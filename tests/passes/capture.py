"""Dynamo graphs of small functions, ready for the passes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnpack_fx import PackPolicy
from attnpack_fx.backend import _state_of
from attnpack_fx.passes.state import GraphState


def capture(function: Callable[..., Any], *arguments: Any, policy: PackPolicy | None = None) -> GraphState:
    """The state of the single graph Dynamo captures from `function(*arguments)`; nothing is compiled."""
    states: list[GraphState] = []

    def backend(gm, example_inputs):
        states.append(_state_of(gm, example_inputs, policy or PackPolicy(vision_rank="full", text_rank="full")))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    (state,) = states
    return state


def operations(state: GraphState) -> list[str]:
    """Names of the operations in the graph, in order."""
    return [
        getattr(node.target, "__name__", str(node.target))
        for node in state.graph.nodes
        if node.op in ("call_function", "call_method")
    ]


@dataclass(frozen=True)
class CapturedGraph:
    """One graph Dynamo captured, and the real arguments of its first call."""

    state: GraphState
    module: GraphModule
    arguments: list[Any]

    def evaluate(self, *nodes: Node) -> tuple[Any, ...]:
        """The values of these nodes. The graph returns nothing else from then on."""
        self.state.output.args = (nodes,)
        self.state.graph.lint()
        return tuple(GraphModule(self.module, self.state.graph)(*self.arguments))


def capture_graphs(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[CapturedGraph]:
    """Every graph Dynamo captures from one call of `function`; nothing is compiled."""
    graphs: list[CapturedGraph] = []

    def backend(gm, example_inputs):
        state = _state_of(gm, example_inputs, PackPolicy(vision_rank="full", text_rank="full"))
        graph = CapturedGraph(state, gm, [])

        def call(*given):
            if not graph.arguments:
                graph.arguments.extend(item.clone() if isinstance(item, torch.Tensor) else item for item in given)
            return gm.forward(*given)

        graphs.append(graph)
        return call

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend)(*arguments, **keywords)
    return graphs
