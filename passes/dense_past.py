"""What enters the cache dense leaves the graph packed: compress what a site keeps."""

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from attnpack_fx.kernels import ops, ops_newest  # noqa: F401  (registers torch.ops.attnpack)
from attnpack_fx.passes.asks import acting, acts_on_cache, asks_for_modality, codes_unrotated, heads_apart, observation
from attnpack_fx.passes.find_attention import scale_of
from attnpack_fx.passes.find_rotary import RotaryFinder, Rotation
from attnpack_fx.passes.left_dense import is_static
from attnpack_fx.passes.method import Stage
from attnpack_fx.passes.patterns import cat_along_tokens, layer_count, layer_number, layer_of
from attnpack_fx.passes.plan_tokens import TokenPlanner, asks_for_loss, gain, share_basis
from attnpack_fx.passes.state import (
    TEXT,
    VISION,
    Constant,
    Factors,
    GraphState,
    Layer,
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
    state: GraphState,
    site: Site,
    planner: TokenPlanner,
    rotary: RotaryFinder,
    flat: FlatOutputs,
    compressed: dict[Node, Packed],
) -> SiteReport | None:
    """Pack what this site puts into the cache."""
    results = state.results
    cached_key, cached_value = site.cached
    if cached_key not in results or cached_value not in results or is_static(site.key):
        return None
    layer = layer_of(site.node)
    if cached_key in compressed:  # by the layer that keeps them, of which this one reads
        return SiteReport(layer, site.kind, "compressed", causal=True)
    obstacle = site.obstacle or _uncompressible(site)
    if obstacle is not None:
        return SiteReport(layer, site.kind, "dense", obstacle)
    if site.window is not None and (state.policy.passes or state.policy.partial is not None):
        reason = "sliding window: methods and partial reading do not know that its cache drops the oldest tokens"
        return SiteReport(layer, site.kind, "dense", reason, causal=True)
    key_shape, value_shape = shape_of(site.key), shape_of(site.value)
    assert key_shape is not None and value_shape is not None
    widths = key_shape[1] * key_shape[3], value_shape[1] * value_shape[3]
    policy, number = state.policy, layer_number(layer)
    count = _layer_count(state)
    # Vision tokens are known by their place among all tokens, of which a window's are the newest after an earlier call.
    late = site.window is not None and bool(_past_of(site))
    modality = None if late else planner.modality(site.key)
    vision = modality is not None or (late and planner.may_know)
    rotation = _rotation(rotary, site)
    plan = policy.layer(number, count, *widths, vision=vision, rotary=rotation is not None)
    stored = {name: how for name in (VISION, TEXT) if (how := plan.of(name)) is not None}
    if late and stored:
        reason = "sliding window: its cache holds tokens of an earlier call that are dense"
        return SiteReport(layer, site.kind, "dense", reason, causal=True)
    rows = planner.rows_of(number)
    held = acts_on_cache(policy) and not policy.skips(number, count)
    if not stored and rows is None and not held:
        if site.window is None:
            state.candidates.append((results.index(site.key), results.index(site.value), number))
        reason = "the policy leaves this layer dense"
        if modality is None:
            reason = "no vision tokens are known here and text_rank is None"
        return SiteReport(layer, site.kind, "dense", reason, causal=True)
    if plan.key_space == "rotated" or not (stored or (held and codes_unrotated(policy))):
        rotation = None
    turning = 0 if rotation is None or not count else _turning(site, rotation, count)
    gains = {name: gain(policy, name, how, widths, turning) for name, how in stored.items()}
    heads = key_shape[1] if held and heads_apart(policy, bool(stored)) else 0
    loss = asks_for_loss(policy, stored.values())
    graph = state.graph
    known = {site.node, *site.cached}
    with graph.inserting_before(next(node for node in reversed(graph.nodes) if node in known).next):
        if modality is not None:
            modality = planner.newest(modality, site.window)
        *indices, slot = planner.plan(site, cached_key, modality, gains, rows)
        sources = planner.sources(indices, rows)
        index, source_of = (dict(zip((VISION, TEXT), each[:2], strict=True)) for each in (indices, sources))
        shown = flat.add(modality) if modality is not None and asks_for_modality(policy) else None
        for node, kind in ((cached_key, "key"), (cached_value, "value")):
            angles = rotation if kind == "key" else None
            source = graph.call_method("detach", (node if angles is None else _newest_rows(site, angles.unrotated),))
            factors, columns = [], []
            for name, how in stored.items():
                columns.append(getattr(how, kind))
                tokens = state, flat, source, source_of[name], columns[-1].rank
                if share_basis(policy, name):
                    own_kind = kind if angles is None else f"unrotated {kind}"
                    factors.append(_together(*tokens, _given(state, site, number, name, own_kind)))
                else:
                    factors.append(_alone(*tokens))
            attended = graph.call_method("detach", (node,))
            tail = graph.call_function(torch.ops.attnpack.take_rows.default, (attended, sources[2], 0))
            compressed[node] = Packed(
                modalities=tuple(stored),
                columns=tuple(columns),
                factors=tuple(factors),
                indices=(*(flat.add(index[name]) for name in stored), flat.add(indices[2])),
                slot=flat.add(slot),
                tail=flat.add(tail),
                squares=flat.add(planner.by_position(_squares(state, source), rows)) if loss else None,
                angles=None if angles is None else _angles(flat, planner, angles, site.window, rows),
                interleaved=angles is not None and angles.interleaved,
                vision=shown,
                heads=heads,
                window=site.window,
            )
        scores = _observed(state, site, bool(heads)) if held else None
        newest = _newest(state, site, bool(heads)) if held else None
    state.layers.append(
        Layer(
            results.index(cached_key),
            results.index(cached_value),
            number,
            text=plan.text,
            skipped=policy.skips(number, count),
            scores=None if scores is None else flat.add(scores),
            observed=None if scores is None or rows is None else flat.add(rows),
            newest=None if newest is None else flat.add(newest),
        )
    )
    alone = acting(policy.passes, Stage.MERGE) and (number is None or state.carries)
    return SiteReport(
        layer,
        site.kind,
        "compressed",
        reason="not merged: this graph does not show which layers are its neighbours" if alone else "",
        key_rank={str(name): how.key.rank for name, how in stored.items()},
        value_rank={str(name): how.value.rank for name, how in stored.items()},
        key_space="rotated" if rotation is None else "unrotated",
        causal=True,
    )


def _angles(
    flat: FlatOutputs, planner: TokenPlanner, rotation: Rotation, window: int | None, rows: Node | None
) -> tuple[int, int]:
    """The outputs that are cos and sin of every logical position."""
    of_tokens = (planner.newest(each, window) for each in (rotation.cos, rotation.sin))
    cos, sin = (flat.add(planner.by_position(each, rows)) for each in of_tokens)
    return cos, sin


def _turning(site: Site, rotation: Rotation, layers: int) -> int:
    """Numbers of the cache's dtype that cos and sin of a token take, a layer's share of the copy that all read."""
    key, cos = (node.meta["example_value"] for node in (site.key, rotation.cos))
    pairs = cos.shape[-1] if isinstance(cos.shape[-1], int) else key.shape[-1] // 2  # a symbol: all dims, at most
    return math.ceil(2 * pairs * cos.element_size() / (key.element_size() * layers))


def _newest_rows(site: Site, keys: Node) -> Node:
    """Of keys `[B, H, T, D]` those that enter the cache."""
    if site.window is None:
        return keys
    every = slice(None, None, None)
    return keys.graph.call_function(operator.getitem, (keys, (every, every, slice(-site.window, None, None))))


def _observed(state: GraphState, site: Site, apart: bool) -> Node | None:
    """How much this call's queries attend to every token, in the way the policy's methods ask, `[B, H, T]`.

    apart: whether every KV head keeps tokens of its own. A mean over heads, which is taken later, does for all that is
    linear in the weights.
    """
    asked = observation(state.policy)
    if asked is None:
        return None
    arguments, scores = (site.query, site.key, site.mask, scale_of(site), site.is_causal), (site.cap, site.sinks)
    made = [
        state.graph.call_function(
            torch.ops.attnpack.observe.default, (*arguments, statistic, asked.window or 0, None, *scores)
        )
        for kind in (asked.kind, asked.text)
        if kind is not None
        for statistic in ("pivotal together" if kind == "pivotal" and not apart else kind,)
    ]
    if len(made) == 1:
        return made[0]
    return state.graph.call_function(torch.stack, (made,))


def _newest(state: GraphState, site: Site, apart: bool) -> Node | None:
    """What each of the newest queries adds to that, `[B, H or 1, n, T]`: a caller may take them back as drafts."""
    asked = observation(state.policy)
    if asked is None:
        return None
    arguments = site.query, site.key, site.mask, scale_of(site), site.is_causal, asked.kind == "pivotal", not apart
    return state.graph.call_function(torch.ops.attnpack.observe_newest.default, (*arguments, site.cap, site.sinks))


def _alone(state: GraphState, flat: FlatOutputs, source: Node, index: Node, rank: int) -> Factors:
    """Compress the tokens at `index`, each sample by itself."""
    made = state.graph.call_function(torch.ops.attnpack.compress.default, (source, index, rank))
    coefficient, basis = (flat.add(state.graph.call_function(operator.getitem, (made, item))) for item in (0, 1))
    return Factors(coefficient, basis)


def _together(
    state: GraphState, flat: FlatOutputs, source: Node, index: Node, rank: int, given: Constant | None
) -> Factors:
    """Compress the tokens at `index`, samples on one basis, which may be given."""
    common = None if given is None else state.constant(given)
    arguments = (source, index, rank, state.policy.basis_tolerance, common)
    made = state.graph.call_function(torch.ops.attnpack.compress_shared.default, arguments)
    items = (state.graph.call_function(operator.getitem, (made, item)) for item in range(3))
    coefficient, basis, owner = map(flat.add, items)
    return Factors(coefficient, basis, owner, None if given is None else given.tensor)


def _given(state: GraphState, site: Site, number: int | None, name: Modality, kind: str) -> Constant | None:
    """The model's basis for these tokens, in the dtype and on the device of the cache."""
    basis = state.policy.basis(number, name, kind)
    if basis is None:
        return None
    like, shape = site.key.meta["example_value"], shape_of(site.value if kind == "value" else site.key)
    assert shape is not None
    if (basis.shape[1], basis.shape[3]) != (shape[1], shape[3]):
        raise ValueError(
            f"bases: got {list(basis.shape)} for the {name} {kind}s of layer {number}, expected [1, {shape[1]}, R, "
            f"{shape[3]}]; calibrate bases for this model"
        )
    return Constant(f"basis_{number}_{name}_{kind.replace(' ', '_')}", basis.to(like.device, like.dtype))


def _layer_count(state: GraphState) -> int | None:
    """How many decoder layers there are; None where the graph may not show all."""
    results = set(state.results)
    return None if state.carries else layer_count(site.node for site in state.sites if site.cached[0] in results)


def _rotation(rotary: RotaryFinder, site: Site) -> Rotation | None:
    """The rotary embedding of all keys that this site keeps, where it is recognised."""
    if _past_of(site):
        return None
    return rotary.rotation_of((cat_along_tokens(site.key) or [site.key])[-1])


def _past_of(site: Site) -> list[Node]:
    """What of a site's keys was there before this call."""
    *past, _ = cat_along_tokens(site.key) or [site.key]
    return [piece for piece in past if shape_of(piece) != (0,)]


def _squares(state: GraphState, source: Node) -> Node:
    """The sum of squares of every token, `[B, T]`."""
    graph = state.graph
    wide = graph.call_method("float", (source,))
    return graph.call_method("sum", (graph.call_method("square", (wide,)), (1, 3)))


def _uncompressible(site: Site) -> str | None:
    new = (cat_along_tokens(site.key) or [site.key])[-1]
    query, key = shape_of(site.query), shape_of(new)
    if query is None or key is None or not same_size(query[2], key[2]):
        return "cross-attention: the keys are not those of the queries' own tokens"
    for node in (site.key, site.value):
        if not node.meta["example_value"].dtype.is_floating_point:
            return "the cache is not floating point"
    return None
