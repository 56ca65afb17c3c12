"""Write the new keys and values of a layer in one call: on a GPU, one kernel launch less per layer and step."""

import torch
from torch.fx import Node

from attnpack_fx.kernels import ops, ops_newest  # noqa: F401  (registers torch.ops.attnpack)
from attnpack_fx.kernels.flat import unflatten
from attnpack_fx.passes.in_place import writes
from attnpack_fx.passes.state import GraphState

_ATTENTION = tuple(
    getattr(torch.ops.attnpack, name).default for name in ("attention", "attention_weights", "attention_each")
)
_APPEND = torch.ops.attnpack.append_.default


def merge_appends(state: GraphState) -> int:
    """Merge the two appends whose tails one attention reads, where the first may as well happen later; how many."""
    nodes = list(state.graph.nodes)
    order = {node: number for number, node in enumerate(nodes)}
    appends = {_tail(node): node for node in nodes if node.target is _APPEND}
    merged = 0
    for attention in [node for node in nodes if node.target in _ATTENTION]:
        _, tensors, *layouts = attention.args[:4]
        key, value = (appends.get(unflatten(tensors, layout, 0).tail) for layout in layouts)
        if key is None or value is None or key is value:
            continue
        first, second = sorted((key, value), key=lambda node: order[node])
        if not _may_wait(first, nodes[order[first] + 1 : order[second]]):
            continue
        columns = zip(key.args, value.args, strict=True)
        with state.graph.inserting_after(second):
            state.graph.call_function(_APPEND, tuple([*one, *other] for one, other in columns))
        for node in (first, second):
            del appends[_tail(node)]
            state.graph.erase_node(node)
        merged += 1
    return merged


def _tail(append: Node) -> Node:
    """What an append of one tail writes to."""
    return append.args[0][0]  # type: ignore[index, return-value]


def _may_wait(append: Node, between: list[Node]) -> bool:
    """Whether an append may happen after these nodes: none reads the rows it writes, none writes what it reads."""
    return not any(node in _tail(append).users or writes(node) for node in between)
