"""Find which tokens are vision tokens: the mask of the `masked_scatter` that puts image features among text
embeddings.
"""

import operator

import torch
from torch.fx import Node

from attnpack_fx.passes.patterns import argument, is_call
from attnpack_fx.passes.state import GraphState, shape_of


def find_modality(state: GraphState) -> int:
    """Set `state.modality` to a bool `[B, T]` node, True for vision, if the graph shows one; returns how many masks
    were found.

    Several masks (images, videos) are united. Recognised: `embeddings.masked_scatter(mask, features)`,
    `embeddings[mask] = features` and its functional forms, with masks `[B, T]`, `[B, T, 1]` or `[B, T, C]`.
    """
    found = [(node, mask) for node in state.graph.nodes if (mask := _mask_of(node)) is not None]
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


def _mask_of(node: Node) -> Node | None:
    if is_call(node, "masked_scatter", "masked_scatter_"):
        target, mask = argument(node, 0, "input"), argument(node, 1, "mask")
    elif is_call(node, "setitem"):
        target, mask = node.args[0], node.args[1]
    elif is_call(node, "index_put", "index_put_"):
        target, mask = node.args[0], argument(node, 1, "indices")
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
    return mask


def _describe(node: Node, example: torch.Tensor) -> None:
    node.meta["example_value"] = example
