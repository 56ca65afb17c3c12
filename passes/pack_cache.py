"""Rewrite cached attention: compress what enters the cache, attend to what is packed, decompress where neither is possible.

A cached attention in Dynamo's graph is `k = cat([past, new])`, attention on `k`, and `k` among the outputs. Where the past is a packed
value, `cat` becomes an append to its tail and attention becomes `attnpack::attention`; where it is dense or empty, the output becomes
`attnpack::compress` and the attention of this call stays exact. See design in `docs/how-it-works.md`.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attnpack_fx.kernels import ops  # noqa: F401  (registers torch.ops.attnpack)
from attnpack_fx.passes.find_attention import scale_of
from attnpack_fx.passes.patterns import argument, is_call, layer_of, through_no_ops
from attnpack_fx.passes.state import (
    TEXT,
    VISION,
    GraphState,
    Grown,
    Modality,
    ModalityMask,
    OutputSpec,
    Packed,
    PackedInput,
    Plain,
    Site,
    SiteReport,
    Size,
    same_size,
    shape_of,
)


@dataclass
class _Appended:
    """A packed input after new tokens were appended to its tail."""

    packed: PackedInput
    count: Size
    tail: Node
    before: Node
    length: Node


def pack_cache(state: GraphState) -> int:
    """Rewrite every site that can be; reports each; returns how many changed."""
    appended = _append(state)
    compressed: dict[Node, Packed] = {}
    flat = _Outputs(state)
    planner = _Planner(state)
    for site in state.sites:
        report = _attend(state, site, appended) or _compress(state, site, planner, flat, compressed) or _leave(state, site)
        state.reports.append(report)
    _write_outputs(state, flat, appended, compressed)
    _decompress_rest(state, appended)
    return sum(report.action in ("packed", "compressed") for report in state.reports)


def decompress_inputs(state: GraphState) -> None:
    """Give every reader of a packed value its dense form, and leave the outputs as they are."""
    _decompress_rest(state, {})
    state.outputs = [Plain(number) for number in range(len(state.results))]


# ---- a packed past -----------------------------------------------------------------------------------------------------------------


def _append(state: GraphState) -> dict[Node, _Appended]:
    """Turn `cat([packed, new], dim=2)` into a write to the tail's spare rows; the first per packed input."""
    appended = {}
    for packed in state.packed.values():
        cat = next((user for user in packed.node.users if _appends_to(user, packed.node)), None)
        if cat is None:
            continue
        new = cat.args[0][1]  # type: ignore[index]
        tokens = new.meta["example_value"].shape[2]
        count = state.size(tokens)
        if count is None:
            continue
        tail = state.room(packed, tokens, count)
        length = state.length(packed)
        with state.graph.inserting_before(cat):
            detached = state.graph.call_method("detach", (new,))
            state.graph.call_function(torch.ops.attnpack.append_.default, (tail, detached, length))
            added = tokens if isinstance(tokens, int) else state.graph.call_method("size", (new, 2))
            longer = state.graph.call_function(operator.add, (length, added))
        appended[cat] = _Appended(packed, count, tail, length, longer)
    return appended


def _appends_to(node: Node, packed: Node) -> bool:
    if not is_call(node, "cat", "concat") or argument(node, 1, "dim", 0) not in (2, -2):
        return False
    pieces = node.args[0] if node.args else node.kwargs.get("tensors")
    if not isinstance(pieces, list | tuple) or len(pieces) != 2 or pieces[0] is not packed or pieces[1] is packed:
        return False
    new, past = shape_of(pieces[1]), shape_of(packed)
    return new is not None and past is not None and len(new) == 4 and new[1] == past[1] and new[3] == past[3]


def _attend(state: GraphState, site: Site, appended: dict[Node, _Appended]) -> SiteReport | None:
    """Attend to packed keys and values, just grown or only read (as in cross-attention)."""
    key, value = _packed_operand(state, site.key, appended), _packed_operand(state, site.value, appended)
    if key is None or value is None:
        return None
    obstacle = site.obstacle
    if obstacle is None and site.is_causal:
        obstacle = "is_causal over a cached past aligns the mask to the first token; give an explicit mask"
    if obstacle is not None:
        return SiteReport(layer_of(site.node), site.kind, "dense", f"decompressed: {obstacle}")
    graph = state.graph
    with graph.inserting_before(site.node):
        mask = site.mask
        if mask is not None and len(shape_of(mask)) == 2:  # type: ignore[arg-type]
            mask = graph.call_function(operator.getitem, (mask, (None, None)))
        attention = graph.call_function(
            torch.ops.attnpack.attention.default,
            (
                site.query,
                state.factors(key.packed, "coefficient"),
                state.factors(key.packed, "basis"),
                state.factors(value.packed, "coefficient"),
                state.factors(value.packed, "basis"),
                key.tail,
                value.tail,
                key.length,
                state.part(key.packed, "index"),
                mask,
                scale_of(site),
                key.packed.ragged,
            ),
        )
    attention.meta["example_value"] = site.node.meta.get("example_value")
    site.node.replace_all_uses_with(attention)
    state.pairs.append((key.packed.position, value.packed.position))
    return SiteReport(
        layer_of(site.node), site.kind, "packed", key_rank=_ranks(key.packed), value_rank=_ranks(value.packed), causal=True
    )


def _packed_operand(state: GraphState, node: Node, appended: dict[Node, _Appended]) -> _Appended | None:
    if node in appended:
        return appended[node]
    if node in state.packed:
        return _read(state, state.packed[node], appended)
    return None


def _read(state: GraphState, packed: PackedInput, appended: dict[Node, _Appended]) -> _Appended:
    """A packed input as it was before anything was appended; appending moves no row, so both may read one tail."""
    nothing = state.size(0)
    assert nothing is not None
    for grown in appended.values():
        if grown.packed is packed:
            return _Appended(packed, nothing, grown.tail, grown.before, grown.before)
    length = state.length(packed)
    return _Appended(packed, nothing, state.room(packed, 0, nothing), length, length)


def _ranks(packed: PackedInput) -> dict[str, int]:
    return {
        name: int(segment.coefficient.shape[-1])
        for name, segment in zip(packed.modalities, packed.fakes.segments, strict=True)
        if isinstance(segment.coefficient.shape[-1], int)
    }


def _decompress_rest(state: GraphState, appended: dict[Node, _Appended]) -> None:
    """Whatever still reads a packed value gets its dense form."""
    for cat, grown in appended.items():
        if cat.users:
            with state.graph.inserting_before(cat):
                dense = _decompress(state, grown.packed, grown.tail, grown.length)
            cat.replace_all_uses_with(dense)
        state.graph.erase_node(cat)
    for packed in state.packed.values():
        for user in list(packed.node.users):
            if user in state.wanted and is_call(user, "numel", "size", "dim"):
                state.graph.erase_node(user)
        if packed.node.users:
            read = _read(state, packed, appended)
            with state.graph.inserting_after(read.length):
                dense = _decompress(state, packed, read.tail, read.length)
            packed.node.replace_all_uses_with(dense)


def _decompress(state: GraphState, packed: PackedInput, tail: Node, length: Node) -> Node:
    return state.graph.call_function(
        torch.ops.attnpack.decompress.default,
        (
            state.factors(packed, "coefficient"),
            state.factors(packed, "basis"),
            tail,
            length,
            state.part(packed, "index"),
            state.part(packed, "slot"),
        ),
    )


# ---- a dense or empty past ---------------------------------------------------------------------------------------------------------


class _Planner:
    """Makes `attnpack::plan` once for all layers that place their tokens alike."""

    def __init__(self, state: GraphState) -> None:
        self.state = state
        self._plans: dict[Any, list[Node]] = {}
        self._real: dict[Node, Node] = {}
        self._modality: Node | None = None

    def modality(self, key: Node) -> Node | None:
        """Bool `[B, T]` over all of `key`'s tokens, or None where no modality is known."""
        if self._modality is not None:
            return self._modality
        state, shape = self.state, shape_of(key)
        assert shape is not None
        mask = state.modality
        if mask is None and state.modality_given:
            batch, tokens = state.size(shape[0]), state.size(shape[2])
            if batch is None or tokens is None:
                return None
            example = key.meta["example_value"].new_empty((shape[0], shape[2]), dtype=torch.bool)
            mask = state.add_input(ModalityMask(batch, tokens), example, "attnpack_modality")
        elif mask is not None and not same_size(shape_of(mask)[1], shape[2]):  # type: ignore[index]
            # The mask covers this call's tokens, the newest; older ones are text.
            with state.graph.inserting_after(key if _follows(state, key, mask) else mask):
                tokens = state.graph.call_method("size", (key, 2))
            with state.graph.inserting_after(tokens):
                seen = state.graph.call_method("size", (mask, 1))
            with state.graph.inserting_after(seen):
                older = state.graph.call_function(operator.sub, (tokens, seen))
            with state.graph.inserting_after(older):
                mask = state.graph.call_function(torch.nn.functional.pad, (mask, (older, 0)))
        self._modality = mask
        return mask

    def plan(self, site: Site, key: Node, modality: Node | None, gains: dict[Modality, list[int]]) -> list[Node]:
        """Nodes `(vision index, text index, dense index, slot)`, inserted at the current point."""
        graph = self.state.graph
        real = self._real_tokens(site.mask) if site.mask is not None else None
        shape = shape_of(key)
        assert shape is not None
        known = (modality, real, str(shape[0]), str(shape[2]), key.meta["example_value"].device, repr(gains))
        if known not in self._plans:
            arguments = (modality, real, key, TEXT in gains, gains.get(VISION, []), gains.get(TEXT, []))
            plan = graph.call_function(torch.ops.attnpack.plan.default, arguments)
            self._plans[known] = [graph.call_function(operator.getitem, (plan, item)) for item in range(4)]
        return self._plans[known]

    def _real_tokens(self, mask: Node) -> Node:
        """Bool `[B, T]`: tokens some query may attend to. What none may is padding."""
        if mask not in self._real:
            graph, value = self.state.graph, mask.meta["example_value"]
            allowed = mask
            if value.dtype != torch.bool:
                allowed = graph.call_function(operator.gt, (mask, torch.finfo(value.dtype).min / 2))
            if value.dim() == 2:
                self._real[mask] = graph.call_function(torch.any, (allowed, 0, True))
            else:
                over_queries = graph.call_function(torch.any, (allowed, 2))
                self._real[mask] = graph.call_function(torch.any, (over_queries, 1))
        return self._real[mask]


def _follows(state: GraphState, later: Node, earlier: Node) -> bool:
    for node in state.graph.nodes:
        if node is earlier:
            return True
        if node is later:
            return False
    return False


def _compress(
    state: GraphState, site: Site, planner: _Planner, flat: "_Outputs", compressed: dict[Node, Packed]
) -> SiteReport | None:
    """Pack what this site puts into the cache."""
    results = state.results
    if site.key not in results or site.value not in results or site.key in compressed:
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
                pair_node = graph.call_function(torch.ops.attnpack.compress.default, (source, index[name], pair[number]))
                factors.append(tuple(flat.add(graph.call_function(operator.getitem, (pair_node, item))) for item in (0, 1)))
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
    new = site.key
    if is_call(new, "cat", "concat"):
        new = new.args[0][-1]  # type: ignore[index,assignment]
    query, key = shape_of(site.query), shape_of(new)
    if query is None or key is None or not same_size(query[2], key[2]):
        return "cross-attention: the keys are not those of the queries' own tokens"
    for node in (site.key, site.value):
        if not node.meta["example_value"].dtype.is_floating_point:
            return "the cache is not floating point"
    return None


def _leave(state: GraphState, site: Site) -> SiteReport:
    """Say why a site stays as it is."""
    layer, key = layer_of(site.node), site.key
    kept = [user for user in key.users if user in state.results and is_call(user, "getitem", "slice", "narrow", "contiguous")]
    causal = site.is_causal
    if kept:
        return SiteReport(layer, site.kind, "dense", "sliding window: the cache keeps a slice of the keys", causal)
    base = through_no_ops(key)
    while is_call(base, "getitem", "slice", "narrow") and isinstance(base.args[0], Node):
        base = base.args[0]
    writes = ("index_copy_", "index_copy", "copy_", "setitem", "index_put_")
    if is_call(base, *writes) or (base.op == "placeholder" and any(is_call(user, *writes) for user in base.users)):
        return SiteReport(layer, site.kind, "dense", "static cache (index_copy_): packed static decode is not offered yet", causal)
    if base.op == "placeholder":
        return SiteReport(layer, site.kind, "dense", "cross-attention or a shared cache: the keys are only read here", causal)
    if site.obstacle is not None and site.kind == "flex_attention":
        return SiteReport(layer, site.kind, "dense", site.obstacle, causal)
    if is_call(base, "cat", "concat") and any(shape_of(item) == (0,) or item.op == "placeholder" for item in base.args[0]):  # type: ignore[union-attr,index]
        return SiteReport(layer, site.kind, "dense", "the keys attended to are not the keys kept in the cache", causal)
    return SiteReport(layer, site.kind, "uncached", "keys and values are not kept: no cache, as in an encoder or with use_cache=False", causal)


# ---- outputs -----------------------------------------------------------------------------------------------------------------------


class _Outputs:
    """The flat outputs of the rewritten graph, each node once."""

    def __init__(self, state: GraphState) -> None:
        self.nodes: list[Any] = []

    def add(self, node: Any) -> int:
        for number, known in enumerate(self.nodes):
            if known is node:
                return number
        self.nodes.append(node)
        return len(self.nodes) - 1


def _write_outputs(
    state: GraphState, flat: _Outputs, appended: dict[Node, _Appended], compressed: dict[Node, Packed]
) -> None:
    specs: list[OutputSpec] = []
    for result in state.results:
        if isinstance(result, Node) and result in compressed:
            specs.append(compressed[result])
        elif isinstance(result, Node) and result in appended:
            specs.append(Grown(appended[result].packed.position, appended[result].count))
        else:
            specs.append(Plain(flat.add(result)))
    if state.carries and state.modality is not None:
        state.carried = flat.add(state.modality)
    state.outputs = specs
    state.output.args = (tuple(flat.nodes),)
