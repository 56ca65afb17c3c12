"""What a packed cache needs between two calls of a model, stage after stage (`passes/method.py` has their order)."""

from collections.abc import Sequence

from attnpack_fx import coding, evicting, folding, merging, observing, regrouping, selecting
from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.passes.asks import acting
from attnpack_fx.passes.method import Stage
from attnpack_fx.policy import PackPolicy
from attnpack_fx.shared import lasting


def maintain(layers: Sequence[CachedLayer], policy: PackPolicy) -> None:
    """Do with the layers of one call all that it has made due."""
    if layers:
        with lasting():
            _maintain(layers, policy)


def _maintain(layers: Sequence[CachedLayer], policy: PackPolicy) -> None:
    active = [layer for layer in layers if not layer.skipped]
    for layer in layers:
        observing.observe(layer, policy)
        if not layer.prefill:
            _regroup_and_fold(layer, policy)
    for method in acting(policy.passes, Stage.EVICT):
        for layer in active:
            evicting.evict(layer, method)
    for method in acting(policy.passes, Stage.SELECT):
        for layer in active:
            selecting.select(layer, method)
    codings = acting(policy.passes, Stage.ROWS)
    merged: set[int | None] = set()
    for method in acting(policy.passes, Stage.MERGE):
        numbered = {layer.number: layer for layer in active}
        for lower, upper in method.pairs(_depth(layers, policy)):
            if lower not in numbered or upper not in numbered:
                continue
            if merging.merge(numbered[lower], numbered[upper], method, codings[0] if codings else None):
                merged |= {lower, upper}
    for method in codings:
        for layer in active:
            if layer.number not in merged:
                coding.code(layer, method)


def _depth(layers: Sequence[CachedLayer], policy: PackPolicy) -> int:
    """How many decoder layers there are, as far as they show: also those whose cache is not packed count."""
    return policy.layer_count or 1 + max((layer.number for layer in layers if layer.number is not None), default=-1)


def _regroup_and_fold(layer: CachedLayer, policy: PackPolicy) -> None:
    key, value = layer.key, layer.value
    if policy.partial is not None and regrouping.is_due(key, value, layer.added, policy.partial):
        key, value = regrouping.regroup(key, value, policy.partial)
    count = folding.due(key, policy)
    if count and layer.text is not None:
        key, value = folding.fold(key, value, count, layer.text, policy.max_fold_error)
    layer.key, layer.value = key, value
