"""Eviction: whole tokens leave the cache, and their bytes with them; logical positions stay."""

from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.moving import choose, taken
from attnpack_fx.passes.eviction import Eviction, Tokens


def tokens(layer: CachedLayer) -> Tokens:
    """The layer's stored tokens, as rules see them."""
    position = layer.key.positions
    placement = layer.key.placement
    return Tokens(
        position=position,
        score=layer.key.scores,
        vision=None if placement.vision is None else layer.key.is_vision,
        seen=layer.key.shape[2],
        real=layer.key.shape[2] - placement.missing,
        prefill=layer.prefill,
        layer=layer.number,
        vision_seen=None if placement.vision is None else placement.vision.sum(1),
    )


def evict(layer: CachedLayer, rule: Eviction) -> None:
    """Keep what the rule keeps."""
    seen = layer.key.shape[2] - layer.key.placement.least_missing
    if not layer.prefill and rule.spares(layer.slots, seen):
        return
    shown = tokens(layer)
    keep = rule.keep(shown)
    if keep is None:
        return
    there = shown.position >= 0
    if bool((keep | ~there).all()):
        return
    keep = keep & there
    layer.key, layer.value = taken(layer.key, layer.value, choose(layer.key, layer.value, keep))
