"""A dense cache as a policy packs it, where there is no prefill to do so."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnpack_fx import PackedTensor, PackPolicy, hf, pack
from attnpack_fx.angles import SharedAngles
from attnpack_fx.kernels import ops
from attnpack_fx.kernels.rotary import pairs as pairs_of_dims
from attnpack_fx.tail import TailBuffer

Pair = tuple[PackedTensor, PackedTensor]


@dataclass(frozen=True)
class Layer:
    """One layer of the dense cache after prefill, each `[B, H, T, D]`; plain: keys before rotary embedding."""

    key: Tensor
    plain: Tensor
    value: Tensor


@dataclass(frozen=True)
class Prompt:
    """A prefilled batch: its dense cache, `cos` and `sin` `[1, T, D]`, and `vision`, bool `[B, T]`."""

    layers: list[Layer]
    cos: Tensor
    sin: Tensor
    vision: Tensor


def packed(batch: Prompt, policy: PackPolicy) -> list[Pair]:
    """Keys and values of every layer, packed as the compiled prefill packs them."""
    policy = replace(policy, layer_count=len(batch.layers))
    angles: SharedAngles | None = None
    pairs: list[Pair] = []
    for number, layer in enumerate(batch.layers):
        widths = (layer.key.shape[1] * layer.key.shape[3], layer.value.shape[1] * layer.value.shape[3])
        unrotated = policy.layer(number, len(batch.layers), *widths).key_space == "unrotated"
        source = layer.plain if unrotated else layer.key
        key, value = pack(source, layer.value, policy, modality=batch.vision, layer=number)
        if pairs:  # Layers share one placement where they agree, as they do in a compiled call.
            key, value = (_placed(each, pairs[0][0]) for each in (key, value))
        else:
            value = _placed(value, key)
        if unrotated:
            if angles is None and key.segments:
                index = key.placement.index
                cos, sin = (pairs_of_dims(each, interleaved=False)[0] for each in (batch.cos, batch.sin))
                angles = SharedAngles.of_prompt(cos, sin, index, key.held.packed, False, False)
            key = _turned(key, layer, angles if key.segments else None)
        pairs.append((key, value))
    return pairs


def _placed(tensor: PackedTensor, other: PackedTensor) -> PackedTensor:
    mine, theirs = tensor.placement, other.placement
    if not (torch.equal(mine.index, theirs.index) and torch.equal(mine.slot, theirs.slot)):
        return tensor
    return PackedTensor(replace(tensor.held, placement=theirs), tensor.lease, tensor.importance)


def _turned(key: PackedTensor, layer: Layer, angles: SharedAngles | None) -> PackedTensor:
    """Packed keys before rotary embedding, whose dense rows are after it."""
    tail = key.placement.index[:, key.held.packed :]
    lease = TailBuffer(ops.take_rows(layer.key, tail, 0)).lease(tail.shape[1])
    return PackedTensor(replace(key.held, angles=angles), lease, key.importance)


def cache_of(model: Any, batch: Prompt, pairs: list[Pair]) -> Any:
    """A transformers cache that holds these pairs."""
    cache = hf.empty_cache(model)
    for number, (layer, pair) in enumerate(zip(batch.layers, pairs, strict=True)):
        cache.update(layer.key, layer.value, number)
        cache.layers[number].keys, cache.layers[number].values = pair
    return cache
