"""Attention over a packed past: `cat` becomes a write into the tail, attention reads the factors, other readers
decompress.
"""

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from attnpack_fx.kernels import ops, ops_newest  # noqa: F401  (registers torch.ops.attnpack)
from attnpack_fx.kernels.flat import flatten
from attnpack_fx.passes.asks import keeps_angles
from attnpack_fx.passes.cleanup import drop_dead
from attnpack_fx.passes.find_attention import scale_of
from attnpack_fx.passes.find_rotary import RotaryFinder, Rotation
from attnpack_fx.passes.patterns import cat_along_tokens, is_call, layer_count, layer_number, layer_of
from attnpack_fx.passes.state import GraphState, Layer, PackedInput, Site, SiteReport, Size, shape_of


@dataclass
class Appended:
    """A packed input after new tokens were appended to its tail.

    rotation: of the new keys, where they may be packed later as they were before rotary embedding; weights: how much
    this call attends to each slot, where it appends several tokens each of its newest queries by itself.
    """

    packed: PackedInput
    count: Size
    tail: Node
    before: Node
    length: Node
    rotation: Rotation | None = None
    weights: Node | None = None


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
            if packed.form.heads:
                pairs = state.graph.call_method("flatten", (detached, 0, 1))
                detached = state.graph.call_method("unsqueeze", (pairs, 1))
            state.graph.call_function(torch.ops.attnpack.append_.default, ([tail], [detached], [length]))
            added = tokens if isinstance(tokens, int) else state.graph.call_method("size", (new, 2))
            longer = state.graph.call_function(operator.add, (length, added))
        state.wanted.add(longer)  # what reads it may come after the first sweep of dead nodes
        rotation = None
        if packed.form.angles is not None and keeps_angles(state.policy):
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
    graph, heads = state.graph, key.packed.form.heads
    with graph.inserting_before(site.node):
        query, mask = site.query, site.mask
        if mask is not None and len(shape_of(mask)) == 2:  # type: ignore[arg-type]
            mask = graph.call_function(operator.getitem, (mask, (None, None)))
        if heads:
            mask = _mask_of_heads(state, site, mask, heads)
            query = _of_heads(state, query, heads)
        parts = (state.described(each.packed, each.tail, each.length) for each in (key, value))
        tensors, layouts = flatten(*parts)
        sinks = site.sinks if site.sinks is None or not heads else _sinks_of_heads(state, site, heads)
        arguments = (query, tensors, *layouts, key.length, mask, scale_of(site), site.cap, sinks)
        if key.packed.form.weighed:
            several = key.count.expression != 1 and site.key in appended
            weighing = torch.ops.attnpack.attention_each if several else torch.ops.attnpack.attention_weights
            both = graph.call_function(weighing.default, arguments)
            attention, key.weights = (graph.call_function(operator.getitem, (both, item)) for item in (0, 1))
            state.wanted.add(key.weights)  # becomes an output once all sites are rewritten
        else:
            attention = graph.call_function(torch.ops.attnpack.attention.default, arguments)
        if heads:
            samples = graph.call_method("unflatten", (attention, 0, (-1, heads)))
            attention = graph.call_method("flatten", (samples, 1, 2))
        if site.folded:
            attention = graph.call_method("flatten", (attention, 0, 1))
    attention.meta["example_value"] = site.node.meta.get("example_value")
    site.node.replace_all_uses_with(attention)
    state.pairs.append((key.packed.position, value.packed.position))
    if site.key in appended and site.value in appended:
        _remember(state, site, key, value)
    images = site.key in appended and key.count.expression != 1 and (state.modality is not None or state.modality_given)
    reason = "images of a later turn stay dense: they join a packed past in its tail" if images else ""
    return SiteReport(layer_of(site.node), site.kind, "packed", reason, causal=True)


def _of_heads(state: GraphState, query: Node, heads: int) -> Node:
    """Queries `[B, Hq, Tq, D]` as `[B * H, Hq / H, Tq, D]`."""
    apart = state.graph.call_method("unflatten", (query, 1, (heads, -1)))
    return state.graph.call_method("flatten", (apart, 0, 1))


def _sinks_of_heads(state: GraphState, site: Site, heads: int) -> Node:
    """A site's sinks, of (sample, head) pairs."""
    samples = state.graph.call_method("size", (site.query, 0))
    apart = state.graph.call_method("reshape", (site.sinks, (heads, -1)))
    return state.graph.call_method("repeat", (apart, samples, 1))


def _mask_of_heads(state: GraphState, site: Site, mask: Node | None, heads: int) -> Node | None:
    """The site's mask, given four dims, for (sample, head) pairs."""
    if site.mask is None or mask is None:
        return mask
    shape = shape_of(site.mask)
    assert shape is not None
    if len(shape) == 2 or (isinstance(shape[0], int) and shape[0] == 1 and shape[1] == 1):
        return mask
    if isinstance(shape[1], int) and shape[1] == 1:
        return state.graph.call_method("repeat_interleave", (mask, heads, 0))
    samples = state.graph.call_method("size", (site.query, 0))
    return _of_heads(state, state.graph.call_method("expand", (mask, samples, -1, -1, -1)), heads)


def _remember(state: GraphState, site: Site, key: Appended, value: Appended) -> None:
    """That this site's cache grew, where keys and values leave the graph."""
    results = state.results
    cached_key, cached_value = site.cached
    if cached_key not in results or cached_value not in results:
        return
    number = layer_number(layer_of(site.node))
    count = None if state.carries else layer_count(each.node for each in state.sites if _is_cached(state, each))
    text = None
    if state.policy.fold_every is not None:
        widths = (operand.packed.tail.shape[2] * operand.packed.tail.shape[3] for operand in (key, value))
        text = state.policy.layer(number, count, *widths, vision=False).text
    places = results.index(cached_key), results.index(cached_value)
    skipped = bool(state.policy.passes) and state.policy.skips(number, count)
    state.layers.append(Layer(*places, number, text, key.count, skipped))


def _is_cached(state: GraphState, site: Site) -> bool:
    return site.key in state.packed or site.cached[0] in state.results


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
    for asked in state.graph.find_nodes(op="call_method", target="dense"):
        # Only a packed value has this method, and what it is called on is dense by now.
        asked.replace_all_uses_with(asked.args[0])
        state.graph.erase_node(asked)


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
    tensors, (layout,) = flatten(state.described(packed, tail, length, slot=True))
    arguments = tensors, layout, length
    dense = state.graph.call_function(torch.ops.attnpack.decompress.default, arguments)
    if packed.form.heads:
        samples = state.graph.call_method("unflatten", (dense, 0, (-1, packed.form.heads)))
        dense = state.graph.call_method("squeeze", (samples, 2))
    return dense
