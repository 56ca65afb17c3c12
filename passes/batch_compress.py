"""On a GPU, few sketches and one eigenproblem for the whole model instead of a factorisation for every cache tensor.

    coefficient, basis = compress(keys, index, R)         sketched = sketch([keys, values, ...], index, R)
    coefficient, basis = compress(values, index, R)  ->   ...
    ... the same for every layer                          aligned = align([sketched ...], [R, R, ...])

A factorisation is dozens of launches, and the eigenproblem that ends it takes a GPU about as long for one matrix as for
those of all layers. So keys and values of layers are held back until they fill `GROUP_BYTES`, then sketched at once and
let go; the sketches, a few columns wider than the factors, are held until the end of prefill.
"""

import operator
from typing import Any

import torch
from torch.fx import Node

from attnpack_fx.kernels import ops  # noqa: F401  (registers torch.ops.attnpack)
from attnpack_fx.passes.in_place import writes
from attnpack_fx.passes.patterns import is_call
from attnpack_fx.passes.state import GraphState

#: Most bytes of keys and values that are held back for one sketch.
GROUP_BYTES = 512 << 20


def batch_compress(state: GraphState, device: str = "cuda") -> int:
    """Replace the compressions of each device by sketches and one alignment; returns how many were replaced."""
    groups: dict[torch.device, list[list[Node]]] = {}
    for alike in _alike(state, device):
        groups.setdefault(_compressed(alike[0]).device, []).append(alike)
    for group in groups.values():
        _align(state, group)
    return sum(len(alike) for group in groups.values() for alike in group)


def why_not(node: Node, device: str) -> str | None:
    """Why a compression stays as it is, or None. `device` is the type of those that gain."""
    value = _compressed(node)
    if value is None or value.device.type != device:
        return f"the cache is not on {device}"
    if value.dtype == torch.float64:
        return "sketches are fp32, and float64 is factored in float64"
    for factor in node.users:
        if not is_call(factor, "getitem") or any(user.op != "output" for user in factor.users):
            return "the factors are read in this graph"
    return None


def _alike(state: GraphState, device: str) -> list[list[Node]]:
    """Compressions that one sketch makes: of the same tokens of tensors of one shape, which nothing writes before."""
    found: list[list[Node]] = []
    waiting: dict[Any, list[Node]] = {}
    for node in state.graph.nodes:
        if node.target is torch.ops.attnpack.compress.default and why_not(node, device) is None:
            value = _compressed(node)
            key = node.args[1], value.dtype, value.device, str(value.shape)
            # Where sizes are symbolic, the comparison is a guard: a longer prompt is compiled anew.
            if key not in waiting or (len(waiting[key]) + 1) * value.numel() * value.element_size() > GROUP_BYTES:
                waiting[key] = []
                found.append(waiting[key])
            waiting[key].append(node)
        elif writes(node):
            waiting = {}
    return found


def _compressed(node: Node) -> Any:
    """What Dynamo traced for the tensor a compression reads, or None."""
    source = node.args[0]
    while isinstance(source, Node) and "example_value" not in source.meta and is_call(source, "detach"):
        source = source.args[0]
    return source.meta.get("example_value") if isinstance(source, Node) else None


def _align(state: GraphState, group: list[list[Node]]) -> None:
    graph = state.graph
    coefficients, bases, ranks = [], [], []
    for alike in group:
        last, rank = alike[-1], [node.args[2] for node in alike]
        with graph.inserting_after(last):
            arguments = [node.args[0] for node in alike], last.args[1], max(rank)  # type: ignore[type-var]
            sketch = graph.call_function(torch.ops.attnpack.sketch.default, arguments)
        with graph.inserting_after(sketch):
            bases.append(graph.call_function(operator.getitem, (sketch, 1)))
            coefficients.append(graph.call_function(operator.getitem, (sketch, 0)))
        ranks += rank
    with graph.inserting_before(state.output):
        aligned = graph.call_function(torch.ops.attnpack.align.default, (coefficients, bases, ranks))
        for number, node in enumerate(node for alike in group for node in alike):
            for factor in list(node.users):
                place = 2 * number + factor.args[1]  # type: ignore[operator]
                factor.replace_all_uses_with(graph.call_function(operator.getitem, (aligned, place)))
                graph.erase_node(factor)
            graph.erase_node(node)
