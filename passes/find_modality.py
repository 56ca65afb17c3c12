"""Find which tokens are vision tokens: the mask by which image features are put among text embeddings."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from attnpack_fx.passes.patterns import argument, is_call
from attnpack_fx.passes.state import GraphState, shape_of


def find_modality(state: GraphState) -> int:
    """Set `state.modality` to a bool `[B, T]` node, True for vision, if the graph shows one; returns how many masks
    were found.

    Several masks (images, videos) are united. Recognised: `embeddings.masked_scatter(mask, features)`,
    `embeddings[mask] = features` and its functional forms, with masks `[B, T]`, `[B, T, 1]` or `[B, T, C]`. Not what
    experts do in decoder layers, which write to the tokens of a mask what they made of them.
    """
    found = [] if state.in_decoder else list(_masks(state))
    for node, mask in found:
        with state.graph.inserting_after(node):
            if len(shape_of(mask)) == 3:  # type: ignore[arg-type]
                flat = state.graph.call_function(operator.getitem, (mask, (Ellipsis, 0)))  # type: ignore[arg-type]
                _describe(flat, mask.meta["example_value"][..., 0])
            else:
                flat = mask
        if state.modality is None:
            state.modality = flat
        else:
            with state.graph.inserting_after(flat):
                united = state.graph.call_function(operator.or_, (state.modality, flat))
            _describe(united, state.modality.meta["example_value"])
            state.modality = united
    return len(found)


def _masks(state: GraphState) -> Iterator[tuple[Node, Node]]:
    """Nodes that put features among embeddings, and their masks: in front of all that keeps keys and values."""
    results = set(state.results)
    first = next((site.node for site in state.sites if site.cached[0] in results), None)
    for node in state.graph.nodes:
        if node is first:
            return
        mask = _mask_of(node)
        if mask is not None:
            yield node, mask


def _mask_of(node: Node) -> Node | None:
    if is_call(node, "masked_scatter", "masked_scatter_"):
        target, mask, features = node.args[0], argument(node, 1, "mask"), argument(node, 2, "source")
    elif is_call(node, "setitem"):
        target, mask, features = node.args
    elif is_call(node, "index_put", "index_put_"):
        target, mask, features = node.args[0], argument(node, 1, "indices"), argument(node, 2, "values")
    else:
        return None
    if isinstance(mask, tuple | list) and len(mask) == 1:
        (mask,) = mask
    if not isinstance(target, Node) or not isinstance(mask, Node):
        return None
    embeddings, value = target.meta.get("example_value"), mask.meta.get("example_value")
    if not isinstance(embeddings, torch.Tensor) or embeddings.dim() != 3 or not embeddings.is_floating_point():
        return None
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.dim() not in (2, 3):
        return None
    return None if _made_of_the_same(features, mask) else mask


def _made_of_the_same(features: Any, mask: Node) -> bool:
    """Whether features are made of tokens that the mask chose."""
    waiting = [features] if isinstance(features, Node) else []
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if is_call(node, "getitem", "masked_select", "index") and mask in node.all_input_nodes[1:]:
            return True
        new = [each for each in node.all_input_nodes if each not in seen]
        seen.update(new)
        waiting += new
    return False


def _describe(node: Node, example: torch.Tensor) -> None:
    node.meta["example_value"] = example
