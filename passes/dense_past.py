"""What enters the cache dense leaves the graph packed: compress what a site keeps, or say why it stays as it is."""

import operator
from typing import Any

import torch
from torch.fx import Node

from attnpack_fx.kernels import ops  # noqa: F401  (registers torch.ops.attnpack)
from attnpack_fx.passes.patterns import cat_along_tokens, is_call, layer_of, through_no_ops
from attnpack_fx.passes.plan_tokens import TokenPlanner
from attnpack_fx.passes.state import (
    TEXT,
    VISION,
    GraphState,
    Modality,
    Packed,
    Site,
    SiteReport,
    same_size,
    shape_of,
)


class FlatOutputs:
    """The flat outputs of the rewritten graph, each node once."""

    def __init__(self, state: GraphState) -> None:
        self.nodes: list[Any] = []

    def add(self, node: Any) -> int:
        for number, known in enumerate(self.nodes):
            if known is node:
                return number
        self.nodes.append(node)
        return len(self.nodes) - 1


def compress(
    state: GraphState, site: Site, planner: TokenPlanner, flat: FlatOutputs, compressed: dict[Node, Packed]
) -> SiteReport | None:
    """Pack what this site puts into the cache."""
    results = state.results
    if site.key not in results or site.value not in results or site.key in compressed or _is_static(site.key):
        return None
    layer = layer_of(site.node)
    obstacle = site.obstacle or _uncompressible(site)
    if obstacle is not None:
        return SiteReport(layer, site.kind, "dense", obstacle)
    key_shape, value_shape = shape_of(site.key), shape_of(site.value)
    assert key_shape is not None and value_shape is not None
    widths = key_shape[1] * key_shape[3], value_shape[1] * value_shape[3]
    modality = planner.modality(site.key)
    ranks: dict[Modality, tuple[int, int]] = {}
    for name in (VISION, TEXT):
        chosen = state.policy.ranks(name, *widths) if name == TEXT or modality is not None else None
        if chosen is not None:
            ranks[name] = chosen
    if not ranks:
        state.candidates.append((results.index(site.key), results.index(site.value)))
        reason = "no vision tokens are known here and text_rank is None"
        if modality is not None:
            reason = "vision_rank and text_rank are None"
        return SiteReport(layer, site.kind, "dense", reason, causal=True)
    gains = {name: [] if state.policy.lossless(name) else [*pair, *widths] for name, pair in ranks.items()}
    if VISION not in ranks:
        modality = None
    graph = state.graph
    with graph.inserting_before(site.node.next):
        *indices, slot = planner.plan(site, site.key, modality, gains)
        index = dict(zip((VISION, TEXT), indices[:2], strict=True))
        for number, node in enumerate((site.key, site.value)):
            source = graph.call_method("detach", (node,))
            factors = []
            for name, pair in ranks.items():
                pair_node = graph.call_function(
                    torch.ops.attnpack.compress.default, (source, index[name], pair[number])
                )
                coefficient, basis = (graph.call_function(operator.getitem, (pair_node, item)) for item in (0, 1))
                factors.append((flat.add(coefficient), flat.add(basis)))
            tail = graph.call_function(torch.ops.attnpack.take_rows.default, (source, indices[2], 0))
            compressed[node] = Packed(
                modalities=tuple(ranks),
                factors=tuple(factors),
                indices=(*(flat.add(index[name]) for name in ranks), flat.add(indices[2])),
                slot=flat.add(slot),
                tail=flat.add(tail),
            )
    key_rank, value_rank = ({str(name): pair[number] for name, pair in ranks.items()} for number in (0, 1))
    return SiteReport(layer, site.kind, "compressed", key_rank=key_rank, value_rank=value_rank, causal=True)


def _uncompressible(site: Site) -> str | None:
    new = (cat_along_tokens(site.key) or [site.key])[-1]
    query, key = shape_of(site.query), shape_of(new)
    if query is None or key is None or not same_size(query[2], key[2]):
        return "cross-attention: the keys are not those of the queries' own tokens"
    for node in (site.key, site.value):
        if not node.meta["example_value"].dtype.is_floating_point:
            return "the cache is not floating point"
    return None


def _written(key: Node) -> Node:
    """The tensor whose part, or whole, attention reads."""
    base = through_no_ops(key)
    while is_call(base, "getitem", "slice", "narrow") and isinstance(base.args[0], Node):
        base = base.args[0]
    return base


def _is_static(key: Node) -> bool:
    """Whether the keys are written into storage of a fixed size, as in StaticCache."""
    base, writes = _written(key), ("index_copy_", "index_copy", "copy_", "setitem", "index_put_")
    return is_call(base, *writes) or any(is_call(user, *writes) and user.args[0] is base for user in base.users)


def leave(state: GraphState, site: Site) -> SiteReport:
    """Say why a site stays as it is."""
    layer, key = layer_of(site.node), site.key
    kept = [
        user
        for user in key.users
        if user in state.results and is_call(user, "getitem", "slice", "narrow", "contiguous")
    ]
    causal = site.is_causal
    if kept:
        return SiteReport(layer, site.kind, "dense", "sliding window: the cache keeps a slice of the keys", causal)
    base = _written(key)
    if _is_static(key):
        return SiteReport(
            layer,
            site.kind,
            "dense",
            "static cache (index_copy_): packed static decode is not offered yet",
            causal,
        )
    if base.op == "placeholder":
        return SiteReport(
            layer,
            site.kind,
            "dense",
            "cross-attention or a shared cache: the keys are only read here",
            causal,
        )
    if site.obstacle is not None and site.kind == "flex_attention":
        return SiteReport(layer, site.kind, "dense", site.obstacle, causal)
    if any(shape_of(piece) == (0,) or piece.op == "placeholder" for piece in cat_along_tokens(base)):
        reason = "the keys attended to are not the keys kept in the cache"
        return SiteReport(layer, site.kind, "dense", reason, causal)
    return SiteReport(
        layer,
        site.kind,
        "uncached",
        "keys and values are not kept: no cache, as in an encoder or with use_cache=False",
        causal,
    )
