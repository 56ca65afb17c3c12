"""Eviction: whole tokens leave the cache, and their bytes with them; logical positions stay."""

from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.moving import choose, taken
from attnpack_fx.passes.eviction import Eviction, Tokens
from attnpack_fx.passes.selection import Selection


def tokens(layer: CachedLayer) -> Tokens:
    """The layer's stored tokens, as rules see them."""
    position = layer.key.positions
    absent = layer.key.placement.absent
    assert absent is not None
    return Tokens(
        position=position,
        score=layer.key.importance,
        vision=layer.key.placement.is_vision(position),
        seen=layer.key.shape[2],
        real=layer.key.shape[2] - absent,
        prefill=layer.prefill,
        layer=layer.number,
    )


def evict(layer: CachedLayer, rule: Eviction | Selection) -> None:
    """Keep what the rule keeps."""
    shown = tokens(layer)
    keep = rule.keep(shown)
    if keep is None:
        return
    keep = keep & (shown.position >= 0)
    if bool(keep.all()):
        return
    layer.key, layer.value = taken(layer.key, layer.value, choose(layer.key, layer.value, keep))
