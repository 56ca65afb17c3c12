"""What attention remembers about stored tokens: one number a token, kept beside the keys (`PackedTensor.importance`).

At prefill `attnpack::observe` tells it of the whole prompt; after every decode step the weights of that step update it
(`passes/method.py` has the formulas). Slots stay in order when tokens are folded or coded, so it stays as it is.
"""

import torch
from torch import Tensor

from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.partial import Partial
from attnpack_fx.passes.asks import observation
from attnpack_fx.passes.method import Observation
from attnpack_fx.policy import PackPolicy


def observe(layer: CachedLayer, policy: PackPolicy) -> None:
    """Update what is known about the layer's tokens by what this call observed."""
    if layer.observed is None:
        return
    if policy.partial is not None:
        layer.key = layer.key.attended(_moving_average(layer, layer.observed, policy.partial))
        return
    asked = observation(policy)
    assert asked is not None
    made = _of_prompt(layer, layer.observed) if layer.prefill else _updated(layer, layer.observed, asked)
    layer.key = layer.key.attended(made)


def _moving_average(layer: CachedLayer, weights: Tensor, partial: Partial) -> Tensor:
    """`I <- w^Tq I + (1 - w^Tq) mean of the weights`, of the first segment's tokens (AttentionPack)."""
    old = layer.key.importance
    assert old is not None
    kept = partial.momentum**layer.added
    mean = weights if weights.dim() == 2 else weights.sum(1) / max(layer.added, 1)
    return old * kept + mean[:, : old.shape[1]] * (1 - kept)


def _of_prompt(layer: CachedLayer, observed: Tensor) -> Tensor:
    """From logical positions to slots."""
    positions = layer.key.positions
    made, *text = (each.gather(1, positions.clamp(min=0)) for each in observed)
    if text:
        made = torch.where(layer.key.is_vision, made, text[0])
    return made.masked_fill(positions < 0, 0)


def _updated(layer: CachedLayer, weights: Tensor, asked: Observation) -> Tensor:
    key = layer.key
    old, ragged = key.scores, key.placement.ragged
    assert old is not None
    stored = (key.positions >= 0).sum(1, keepdim=True) if ragged else layer.slots
    made = _after(asked.kind, old, weights, layer.added, stored)
    if asked.text is not None and asked.text != asked.kind:
        made = torch.where(key.is_vision, made, _after(asked.text, old, weights, layer.added, stored))
    return made.masked_fill(key.positions < 0, 0) if ragged else made


def _after(kind: str, old: Tensor, weights: Tensor, queries: int, stored: Tensor | int) -> Tensor:
    """weights: as in `CachedLayer`. Of older queries, whose sum is all that is known, each counts as their mean."""
    older, newest = (None, weights[:, None]) if weights.dim() == 2 else (weights[:, 0], weights[:, 1:])
    count = newest.shape[1]
    if kind == "last":
        return newest[:, -1]
    if kind == "sum":
        return old + newest.sum(1) if older is None else old + older + newest.sum(1)
    # The newest query sees all tokens, those before it one less each.
    behind = torch.arange(count - 1, -1, -1, device=weights.device)[:, None]
    sight = (stored if isinstance(stored, int) else stored[:, None]) - behind
    made = old + (newest * sight >= 1).sum(1)
    if older is not None and queries > count:
        many = queries - count
        made = made.add(older * (stored - count) >= many, alpha=many)
    return made
