"""What every rewrite ends in: what it left dead out, placeholders nobody reads out, graph checked."""

from attnpack_fx.passes.in_place import writes
from attnpack_fx.passes.state import GraphState


def cleanup(state: GraphState) -> int:
    """Remove what the rewrite made dead; returns how many nodes went. Raises when the graph is not well formed."""
    before = len(state.graph.nodes)
    drop_dead(state)
    for packed in state.packed.values():
        if packed.node.users:
            raise RuntimeError(f"packed value {packed.node.name} is still read by {list(packed.node.users)}")
    for node in list(state.inputs):
        # Dynamo's own plain arguments stay, read or not: the runtime feeds them by position anyway.
        if node in state.packed or (not node.users and node not in state.arguments):
            state.graph.erase_node(node)
            del state.inputs[node], state.examples[node]
    state.graph.lint()
    return before - len(state.graph.nodes)


def drop_dead(state: GraphState) -> None:
    """Remove nodes whose readers the rewrite took away.

    Dynamo's graph is not functional: nodes nobody reads are there for what they do (a write in place, a mode entered),
    and FX alone
    does not know them. So only nodes that had readers before the rewrite, and write nothing, are removed.
    """
    state.graph.eliminate_dead_code(lambda node: node.is_impure() or node in state.wanted or writes(node))
