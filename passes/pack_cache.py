"""Rewrite cached attention: attend to what is packed, compress what enters the cache, leave the rest and say why.

A cached attention in Dynamo's graph is `k = cat([past, new])`, attention on `k`, and `k` among the outputs. Where the
past is a packed
value, `cat` becomes an append to its tail and attention becomes `attnpack::attention` (`packed_past.py`); where it is
dense or empty, the
output becomes `attnpack::compress` and the attention of this call stays exact (`dense_past.py`).
"""

from dataclasses import replace
from typing import Any

from torch.fx import Node

from attnpack_fx.passes.dense_past import FlatOutputs, compress
from attnpack_fx.passes.find_rotary import RotaryFinder
from attnpack_fx.passes.find_windows import newest_of
from attnpack_fx.passes.left_dense import leave, report_unknown
from attnpack_fx.passes.packed_past import Appended, append, attend, decompress_rest
from attnpack_fx.passes.plan_tokens import TokenPlanner
from attnpack_fx.passes.state import GraphState, Grown, OutputSpec, Packed, Plain


def pack_cache(state: GraphState) -> int:
    """Rewrite every site that can be; reports each; returns how many changed."""
    rotary = RotaryFinder(state.graph)
    appended = append(state, rotary)
    compressed: dict[Node, Packed] = {}
    flat = FlatOutputs(state)
    planner = TokenPlanner(state)
    for site in state.sites:
        report = (
            attend(state, site, appended)
            or compress(state, site, planner, rotary, flat, compressed)
            or leave(state, site)
        )
        state.reports.append(report)
    report_unknown(state)
    _write_outputs(state, flat, appended, compressed)
    decompress_rest(state, appended)
    return sum(report.action in ("packed", "compressed") for report in state.reports)


def decompress_inputs(state: GraphState) -> None:
    """Give every reader of a packed value its dense form, and leave the outputs as they are."""
    decompress_rest(state, {})
    state.outputs = [Plain(number) for number in range(len(state.results))]


def _write_outputs(
    state: GraphState, flat: FlatOutputs, appended: dict[Node, Appended], compressed: dict[Node, Packed]
) -> None:
    specs: list[OutputSpec] = []
    for result in state.results:
        if isinstance(result, Node) and result in compressed:
            specs.append(compressed[result])
        elif isinstance(result, Node) and result in appended:
            specs.append(_grown(flat, appended[result]))
        elif (grown := _slice_of(result, appended)) is not None:
            specs.append(replace(_grown(flat, grown), window=newest_of(result)))
        else:
            specs.append(Plain(flat.add(result)))
    for site in state.sites:
        if site.window is not None:
            key, value = map(state.results.index, site.cached)
            both = isinstance(specs[key], Grown) and isinstance(specs[value], Grown)
            if both and (key, value) not in state.windows:
                state.windows.append((key, value))
    if state.modality is not None:
        state.shown = flat.add(state.modality)
    state.outputs = specs
    state.output.args = (tuple(flat.nodes),)


def _slice_of(result: Any, appended: dict[Node, Appended]) -> Appended | None:
    """What a layer with a sliding window keeps the newest tokens of."""
    source = result.args[0] if isinstance(result, Node) and newest_of(result) is not None else None
    return appended.get(source) if isinstance(source, Node) else None


def _grown(flat: FlatOutputs, appended: Appended) -> Grown:
    weights = None if appended.weights is None else flat.add(appended.weights)
    rotation = appended.rotation
    angles = None if rotation is None else (flat.add(rotation.cos), flat.add(rotation.sin))
    return Grown(appended.packed.position, appended.count, weights, angles)
