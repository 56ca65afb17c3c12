"""Dynamo graphs of small functions, ready for the passes."""

from collections.abc import Callable
from typing import Any

import torch

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
