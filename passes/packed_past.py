"""Attention over a packed past: `cat` becomes a write into the tail, attention reads the factors, other readers
decompress.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attnpack_fx.kernels import ops  # noqa: F401  (registers torch.ops.attnpack)
from attnpack_fx.kernels.parts import layout
from attnpack_fx.passes.cleanup import drop_dead
from attnpack_fx.passes.find_attention import scale_of
from attnpack_fx.passes.find_rotary import RotaryFinder, Rotation
from attnpack_fx.passes.patterns import cat_along_tokens, is_call, layer_count, layer_number, layer_of
from attnpack_fx.passes.state import GraphState, PackedInput, Pair, Site, SiteReport, Size, shape_of
from attnpack_fx.passes.storage import Stored


@dataclass
class Appended:
    """A packed input after new tokens were appended to its tail.

    rotation: of the new keys, where they may be folded before rotary embedding; importance: what it becomes.
    """

    packed: PackedInput
    count: Size
    tail: Node
    before: Node
    length: Node
    rotation: Rotation | None = None
    importance: Node | None = None


def append(state: GraphState, rotary: RotaryFinder) -> dict[Node, Appended]:
    """Turn `cat([packed, new], dim=2)` into a write to the tail's spare rows; the first per packed input."""
    appended = {}
    for packed in state.packed.values():
        cat = next((user for user in packed.node.users if _appends_to(user, packed.node)), None)
        if cat is None:
            continue
        new = cat_along_tokens(cat)[1]
        tokens = new.meta["example_value"].shape[2]
        count = state.size(tokens)
        if count is None:
            continue
        tail = state.room(packed, tokens, count)
        length = state.length(packed)
        with state.graph.inserting_before(cat):
            detached = state.graph.call_method("detach", (new,))
            state.graph.call_function(torch.ops.attnpack.append_.default, ([tail], [detached], [length]))
            added = tokens if isinstance(tokens, int) else state.graph.call_method("size", (new, 2))
            longer = state.graph.call_function(operator.add, (length, added))
        state.wanted.add(longer)  # what reads it may come after the first sweep of dead nodes
        rotation = None
        if packed.form.angles is not None and state.policy.fold_every is not None:
            rotation = rotary.rotation_of(new)
        appended[cat] = Appended(packed, count, tail, length, longer, rotation)
    return appended


def _appends_to(node: Node, packed: Node) -> bool:
    pieces = cat_along_tokens(node)
    if len(pieces) != 2 or pieces[0] is not packed or pieces[1] is packed:
        return False
    new, past = (node.meta.get("example_value") for node in (pieces[1], packed))
    if not isinstance(new, torch.Tensor) or not isinstance(past, torch.Tensor) or new.dim() != 4:
        return False
    same_heads = new.shape[1] == past.shape[1] and new.shape[3] == past.shape[3]
    return same_heads and new.dtype == past.dtype and new.device == past.device


def attend(state: GraphState, site: Site, appended: dict[Node, Appended]) -> SiteReport | None:
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
        arguments = (
            site.query,
            state.numbered(key.packed, "coefficient"),
            state.numbered(key.packed, "basis"),
            state.numbered(value.packed, "coefficient"),
            state.numbered(value.packed, "basis"),
            key.tail,
            value.tail,
            key.length,
            state.part(key.packed, "index"),
            mask,
            scale_of(site),
            key.packed.form.ragged,
            *state.rotary(key.packed),
            layout(key.packed.form.kinds),
            layout(value.packed.form.kinds),
            state.numbered(key.packed, "scale"),
            state.numbered(value.packed, "scale"),
            state.numbered(key.packed, "owner"),
            state.numbered(value.packed, "owner"),
        )
        if key.packed.form.weighed and state.policy.partial is not None:
            attention = _weighed(state, site, key, arguments, state.policy.partial.momentum)
        else:
            attention = graph.call_function(torch.ops.attnpack.attention.default, arguments)
    attention.meta["example_value"] = site.node.meta.get("example_value")
    site.node.replace_all_uses_with(attention)
    state.pairs.append(Pair(key.packed.position, value.packed.position, _text(state, site, key, value)))
    return SiteReport(layer_of(site.node), site.kind, "packed", causal=True)


def _text(state: GraphState, site: Site, key: Appended, value: Appended) -> Stored | None:
    """How the layer of this site stores text, where tokens may be folded into it."""
    if state.policy.fold_every is None:
        return None
    count = None if state.carries else layer_count(each.node for each in state.sites if _is_cached(state, each))
    widths = (operand.packed.tail.shape[2] * operand.packed.tail.shape[3] for operand in (key, value))
    return state.policy.layer(layer_number(layer_of(site.node)), count, *widths, vision=False).text


def _is_cached(state: GraphState, site: Site) -> bool:
    return site.key in state.packed or site.key in state.results


def _weighed(state: GraphState, site: Site, key: Appended, arguments: Any, momentum: float) -> Node:
    """Attention that also updates the importance of packed tokens: `I <- w^Tq I + (1 - w^Tq) mean of the weights`."""
    graph, importance = state.graph, state.part(key.packed, "importance")
    both = graph.call_function(torch.ops.attnpack.attention_weights.default, arguments)
    attention, weights = (graph.call_function(operator.getitem, (both, item)) for item in (0, 1))
    tokens = graph.call_method("size", (importance, 1))
    now = graph.call_method("narrow", (weights, 1, 0, tokens))
    queries = shape_of(site.query)[2]  # type: ignore[index]
    if not isinstance(queries, int):
        queries = graph.call_method("size", (site.query, 2))
        kept: Any = graph.call_function(operator.pow, (momentum, queries))
        new: Any = graph.call_function(operator.sub, (1.0, kept))
    else:
        kept, new = momentum**queries, 1.0 - momentum**queries
    old = graph.call_function(operator.mul, (importance, kept))
    updated = graph.call_function(operator.add, (old, graph.call_function(operator.mul, (now, new))))
    state.wanted.add(updated)  # becomes an output once all sites are rewritten
    key.importance = updated
    return attention


def _packed_operand(state: GraphState, node: Node, appended: dict[Node, Appended]) -> Appended | None:
    if node in appended:
        return appended[node]
    if node in state.packed:
        return _read(state, state.packed[node], appended)
    return None


def _read(state: GraphState, packed: PackedInput, appended: dict[Node, Appended]) -> Appended:
    """A packed input as it was before anything was appended; appending moves no row, so both may read one tail."""
    nothing = state.size(0)
    assert nothing is not None
    for grown in appended.values():
        if grown.packed is packed:
            return Appended(packed, nothing, grown.tail, grown.before, grown.before)
    length = state.length(packed)
    return Appended(packed, nothing, state.room(packed, 0, nothing), length, length)


def decompress_rest(state: GraphState, appended: dict[Node, Appended]) -> None:
    """Give whatever still reads a packed value its dense form, and report it."""
    drop_dead(state)
    for cat, grown in appended.items():
        if cat.users:
            _report_readers(state, cat)
            with state.graph.inserting_before(cat):
                dense = _decompress(state, grown.packed, grown.tail, grown.length)
            cat.replace_all_uses_with(dense)
    drop_dead(state)
    for packed in state.packed.values():
        if packed.node.users:
            _report_readers(state, packed.node)
            read = _read(state, packed, appended)
            with state.graph.inserting_after(read.length):
                dense = _decompress(state, packed, read.tail, read.length)
            packed.node.replace_all_uses_with(dense)


def _report_readers(state: GraphState, value: Node) -> None:
    """One report per packed value that is decompressed, unless its attention site was reported already."""
    # Sizes need no data: what they are taken of is never computed.
    readers = [user for user in value.users if not is_call(user, "numel", "size", "dim")]
    if not readers or any(value in (site.key, site.value) for site in state.sites):
        return
    reader = readers[0]
    name = getattr(reader.target, "__name__", str(reader.target))
    reason = f"decompressed: `{name}` reads the packed cache, and no known form of attention does"
    state.reports.append(SiteReport(layer_of(reader), "other", "dense", reason, causal=True))


def _decompress(state: GraphState, packed: PackedInput, tail: Node, length: Node) -> Node:
    return state.graph.call_function(
        torch.ops.attnpack.decompress.default,
        (
            state.numbered(packed, "coefficient"),
            state.numbered(packed, "basis"),
            tail,
            length,
            state.part(packed, "index"),
            state.part(packed, "slot"),
            *state.rotary(packed),
            layout(packed.form.kinds),
            state.numbered(packed, "scale"),
            state.numbered(packed, "owner"),
        ),
    )
