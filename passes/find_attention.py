"""Find attention as people write it: functional SDPA, the eager matmul-softmax-matmul form, and FlexAttention.

Matching happens in Dynamo's graph, where SDPA is still one operation and the cache update stands beside it.
"""

import math

import torch
from torch.fx import Node

from attnpack_fx.passes.patterns import argument, is_call, strip_repeat_kv
from attnpack_fx.passes.score_steps import number_of, written_out
from attnpack_fx.passes.state import GraphState, Site, same_size, shape_of

_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
#: How far operations are followed from softmax to the products around it, to say what stands in between.
_STEPS = 12


def find_attention(state: GraphState) -> int:
    """List every attention of the graph in `state.sites`, and what looks like one in `state.unknown`; returns how many
    sites.
    """
    for node in state.graph.nodes:
        site = None
        if is_call(node, "scaled_dot_product_attention"):
            site = _match_sdpa(node)
        elif is_call(node, "softmax"):
            site = _match_eager(node)
            if site is None and (reason := _unknown(node)) is not None:
                state.unknown[node] = reason
        elif is_call(node, "flex_attention"):
            site = _match_flex(node)
        if site is not None:
            state.sites.append(site)
    return len(state.sites)


def _unknown(softmax: Node) -> str | None:
    """Why a softmax between two products is no attention that is known; None where it stands between none."""
    passed, readers = _passed(softmax), [softmax]
    for _ in range(_STEPS):
        if any(is_call(reader, *_PRODUCTS) for reader in readers):
            break
        readers = [user for reader in readers for user in reader.users]
    else:
        return None
    if passed is None:
        return None
    names = ", ".join(f"`{name}`" for name in passed) or "nothing"
    return f"attention is written in a form that is not known: between its scores and softmax stands {names}"


def _passed(softmax: Node) -> list[str] | None:
    """Names of what stands between a softmax and the nearest product that goes into it, each once."""
    passed: dict[Node, list[str]] = {softmax: []}
    waiting = [softmax]
    while waiting:
        node = waiting.pop(0)
        for source in node.all_input_nodes:
            if is_call(source, *_PRODUCTS):
                return list(dict.fromkeys(passed[node]))
            if source not in passed and len(passed[node]) < _STEPS:
                passed[source] = [_name(source), *passed[node]]
                waiting.append(source)
    return None


def _name(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", node.name)


def _match_sdpa(node: Node) -> Site | None:
    query, key, value = (argument(node, position, name) for position, name in enumerate(("query", "key", "value")))
    if not all(isinstance(item, Node) for item in (query, key, value)):
        return None
    site = Site(
        node=node,
        kind="sdpa",
        query=query,
        key=strip_repeat_kv(key),
        value=strip_repeat_kv(value),
        mask=argument(node, 3, "attn_mask"),
        scale=number_of(argument(node, 6, "scale")),
        is_causal=bool(argument(node, 5, "is_causal", False)),
    )
    if argument(node, 4, "dropout_p", 0.0):
        site.obstacle = "attention dropout is active"
    elif site.scale is None and argument(node, 6, "scale") is not None:
        site.obstacle = "the scale is computed in the graph"
    else:
        site.obstacle = _shape_obstacle(site)
    return site


def _match_flex(node: Node) -> Site | None:
    query, key, value = node.args[:3]
    if not isinstance(query, Node):
        return None
    site = Site(node=node, kind="flex_attention", query=query, key=strip_repeat_kv(key), value=strip_repeat_kv(value))
    site.obstacle = "flex_attention is not rewritten yet; load the model with attn_implementation='sdpa'"
    return site


def _match_eager(softmax: Node) -> Site | None:
    """Attention written out: a product, softmax and another product."""
    found = written_out(softmax)
    if found is None:
        return None
    site = Site(
        node=found.output,
        kind="eager",
        query=found.query,
        key=strip_repeat_kv(found.key),
        value=strip_repeat_kv(found.value),
        mask=found.mask,
        padding=found.padding,
        scale=found.scale,
        cap=found.cap,
        sinks=found.sinks,
        folded=found.folded,
    )
    readers = [user for user in found.weights.users if user is not found.output and user.op != "call_method"]
    if any(user.op == "output" for user in readers):
        site.obstacle = "the attention weights are returned (output_attentions)"
    elif found.dropout:
        site.obstacle = "attention dropout is active"
    else:
        site.obstacle = _shape_obstacle(site)
    return site


def _shape_obstacle(site: Site) -> str | None:
    query, key, value = shape_of(site.query), shape_of(site.key), shape_of(site.value)
    if query is None or key is None or value is None or not len(query) == len(key) == len(value) == 4:
        return "queries, keys and values are not all [batch, heads, tokens, dim]"
    if not all(isinstance(size, int) for size in (query[1], query[3], key[1], key[3], value[1], value[3])):
        return "heads or head dims are not fixed"
    if query[1] % key[1] or key[1] != value[1] or query[3] != key[3]:
        return (
            f"{query[1]} query heads of {query[3]} do not fit {key[1]} key heads of {key[3]} and {value[1]} value heads"
        )
    mask = site.mask.meta.get("example_value") if isinstance(site.mask, Node) else None
    if site.mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4)):
        return "the attention mask is not [tokens, tokens] or [batch, heads, tokens, tokens]"
    if (
        isinstance(mask, torch.Tensor)
        and not mask.is_floating_point()
        and (site.kind == "eager" or mask.dtype != torch.bool)
    ):
        return f"a mask of {mask.dtype} is added to the scores"
    if not same_size(query[0], key[0]) or not same_size(key[0], value[0]):
        return "queries, keys and values have different batch sizes"
    return None


def scale_of(site: Site) -> float:
    """The softmax scale: as written, else SDPA's default 1 / sqrt(D)."""
    if site.scale is not None:
        return float(site.scale)
    return 1.0 / math.sqrt(shape_of(site.query)[3])  # type: ignore[index]
