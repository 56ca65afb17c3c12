"""What every rewrite ends in: dead code out, placeholders nobody reads out, graph checked."""

from attnpack_fx.passes.state import GraphState


def cleanup(state: GraphState) -> int:
    """Remove dead nodes and packed placeholders; returns how many nodes went. Raises when the graph is not well formed."""
    before = len(state.graph.nodes)
    state.graph.eliminate_dead_code()
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
