"""Where a decoder layer begins: what enters it, and which attention stands before it."""

import re
from dataclasses import dataclass

from torch.fx import Node

from attnpack_fx.passes.patterns import cat_along_tokens, layer_number, layer_of, value_of
from attnpack_fx.passes.state import GraphState, Site, same_size, shape_of


@dataclass(frozen=True)
class Boundary:
    """The place in front of a decoder layer.

    hidden: `[B, T, C]`, what enters the layer; before: the attention of the layer in front of it.
    sites: the attention of this layer and all later ones.
    nodes: from the first node of this layer to the last of the last layer, in order.
    """

    hidden: Node
    before: Site
    sites: tuple[Site, ...]
    nodes: tuple[Node, ...]


def prompt_sites(state: GraphState) -> list[Site]:
    """The attention sites that put a prompt into an empty cache; none in a decode step."""
    results = set(state.results)
    return [site for site in state.sites if site.key in results and site.value in results and _starts(site)]


def _starts(site: Site) -> bool:
    """Whether the keys are those of the queries' own tokens, more than one, on top of nothing."""
    *past, _ = cat_along_tokens(site.key) or [site.key]
    query, key = shape_of(site.query), shape_of(site.key)
    if query is None or key is None or len(query) != 4 or any(shape_of(piece) != (0,) for piece in past):
        return False
    return same_size(query[2], key[2]) and not same_size(key[2], 1)


def find_boundary(state: GraphState, sites: list[Site], layer: int) -> Boundary | str:
    """The place in front of decoder layer number `layer`, or why there is none; sites: see `prompt_sites`."""
    stems = {_stem(layer_of(site.node)) for site in sites}
    if len(stems) != 1 or any(layer_number(layer_of(site.node)) is None for site in sites):
        return (
            "this graph shows no list of decoder layers by number: they may be compiled one by one, and tokens can be "
            "pruned only where one graph holds the layers"
        )
    stem = stems.pop()
    # Layers that keep no cache, or another one, are decoder layers too.
    decoder = [site for site in state.sites if _stem(layer_of(site.node)) == stem]
    found = {layer_number(layer_of(site.node)): site for site in decoder}
    if len(found) != len(decoder):
        return "a decoder layer has several attentions"
    last = max(number for number in found if number is not None)
    if layer > last:
        return f"there is no layer {layer} to prune in front of: the decoder has {last + 1} layers"
    if found.get(layer - 1) not in sites:
        return _not_a_prompt(state, layer - 1, found.get(layer - 1))
    order = list(state.graph.nodes)
    inside = [number for number, node in enumerate(order) if _within(node, stem, layer)]
    end = max(number for number, node in enumerate(order) if _within(node, stem, last))
    earlier = set(_users(found[layer - 1].node))
    nodes = order[min(inside) : end + 1]
    entering = {
        source
        for number in inside
        for source in order[number].all_input_nodes
        if source in earlier and not _within(source, stem, layer)
    }
    if len(entering) != 1:
        return f"{len(entering)} tensors go from layer {layer - 1} to layer {layer}, expected one"
    hidden, before = entering.pop(), found[layer - 1]
    shape, query = shape_of(hidden), shape_of(before.query)
    if shape is None or query is None or len(shape) != 3 or not same_size(shape[1], query[2]):
        return f"what goes from layer {layer - 1} to layer {layer} is not [batch, tokens, width]"
    value = value_of(hidden)
    if value is None or not value.is_floating_point():
        return f"what goes from layer {layer - 1} to layer {layer} is not floating point"
    later = tuple(site for number, site in found.items() if number is not None and number >= layer)
    return Boundary(hidden, before, later, tuple(nodes))


def _not_a_prompt(state: GraphState, layer: int, site: Site | None) -> str:
    """Why the attention of a layer does not put a prompt into an empty cache."""
    if site is None:
        return f"no attention of layer {layer} was recognised"
    if site.key not in state.results:
        return f"layer {layer} keeps other keys than it attends to, as a layer with a sliding window does"
    return f"layer {layer} does not attend to the prompt alone"


_NUMBER = re.compile(r"(?<![A-Za-z_])\d+")


def _stem(path: str) -> str:
    """The module path up to the number of the layer."""
    match = _NUMBER.search(path)
    return path if match is None else path[: match.start()]


def _within(node: Node, stem: str, layer: int) -> bool:
    """Whether a node was traced in a decoder layer."""
    if node.op == "placeholder" or not node.meta.get("nn_module_stack"):
        return False
    path = layer_of(node)
    return path == f"{stem}{layer}" or path.startswith(f"{stem}{layer}.")


def _users(node: Node) -> list[Node]:
    """Every node that depends on `node`."""
    found: dict[Node, None] = {}
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found[user] = None
                waiting.append(user)
    return list(found)
