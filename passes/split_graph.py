"""Cut a graph in two, where a size that only data decide becomes a size of the second part's inputs."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Graph, Node

from attnpack_fx.passes.patterns import is_call

#: Where a value is: among the arguments of the whole graph or the results of a part, and at which place there.
Place = tuple[Literal["argument", "first", "second"], int]


@dataclass(frozen=True)
class Split:
    """Two graphs that, one after the other, compute what one did.

    first: takes the arguments of the whole graph. second: takes the values of `crossing`; of one that is a number, not
    a tensor, it takes a tensor of shape `[0, number]`, because Dynamo compiles for one number but for any size.
    crossing: each argument of `second`: where it comes from, and the node of the whole graph that makes it.
    results: where each result of the whole graph is.
    """

    first: Graph
    second: Graph
    crossing: tuple[tuple[Place, Node], ...]
    results: tuple[Place, ...]


def splits_region(nodes: Sequence[Node]) -> bool:
    """Whether a cut behind `nodes` is inside a region of the model's own, of autocast or without gradients."""
    calls = [node for node in nodes if node.op == "call_function"]
    entered, left, switched = (
        sum(node.target is function for node in calls)
        for function in (torch.amp._enter_autocast, torch.amp._exit_autocast, torch._C._set_grad_enabled)
    )
    return entered != left or switched % 2 == 1


def split_graph(graph: Graph, last: Node) -> Split:
    """Cut `graph` behind the node `last`; the graph itself stays as it is, and its results must be one flat tuple."""
    order = list(graph.nodes)
    output, cut = order[-1], order.index(last) + 1
    before = dict.fromkeys(order[:cut])
    for node in order[cut:]:
        # Of an operation with several results the items cross, not all of them as one.
        if node.op == "call_function" and node.target is operator.getitem and set(node.all_input_nodes) <= set(before):
            before[node] = None
    behind = [node for node in order[:-1] if node not in before]
    crossing, again = _needed(behind, before)
    returned: list[Node] = list(output.args[0])

    places: dict[Node, Place] = {}
    for number, node in enumerate(node for node in before if node.op == "placeholder"):
        places[node] = ("argument", number)
    copies: dict[Node, Node] = {}
    first = Graph()
    for node in before:
        copies[node] = first.node_copy(node, copies.__getitem__)
    _return(first, [node for node in (*crossing, *returned) if node in before], "first", copies, places)

    copies = {}
    second = Graph()
    for number, node in enumerate(crossing):
        copies[node] = second.placeholder(f"crossing_{number}")
    for node in filter(is_number, crossing):
        copies[node] = second.call_method("size", (copies[node], 1))
    for node in (*again, *behind):
        copies[node] = second.node_copy(node, copies.__getitem__)
    _return(second, returned, "second", copies, places)
    taken = tuple((places[node], node) for node in crossing)
    return Split(first, second, taken, tuple(places[node] for node in returned))


def is_number(node: Node) -> bool:
    """Whether a node is a size, not a tensor."""
    return isinstance(node.meta.get("example_value"), torch.SymInt)


def _needed(behind: Sequence[Node], before: dict[Node, None]) -> tuple[list[Node], list[Node]]:
    """Values from before that those behind read: what crosses, and what is made again from what crosses."""
    crossing: dict[Node, None] = {}
    again: dict[Node, None] = {}
    for node in (source for reader in behind for source in reader.all_input_nodes if source in before):
        if node.op == "get_attr":
            again[node] = None
        elif is_call(node, "size") and len(node.args) == 2:
            # A size stays what it is of the tensor: as a number of its own it would no longer be known to be the same.
            again[node] = None
            crossing[node.all_input_nodes[0]] = None
        else:
            crossing[node] = None
    return list(crossing), list(again)


def _return(
    graph: Graph,
    nodes: Sequence[Node],
    part: Literal["first", "second"],
    copies: dict[Node, Node],
    places: dict[Node, Place],
) -> None:
    """Let a part return those nodes that have no place yet, and note it."""
    made = [node for node in dict.fromkeys(nodes) if node not in places]
    graph.output(tuple(copies[node] for node in made))
    places |= {node: (part, number) for number, node in enumerate(made)}
