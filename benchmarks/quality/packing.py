"""A batch's dense cache as a policy packs it, and the compiled model that decodes from it."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attnpack_fx import PackedTensor, PackPolicy, backend, hf, pack
from attnpack_fx.angles import SharedAngles
from attnpack_fx.cache_bytes import cache_bytes
from attnpack_fx.kernels import ops
from attnpack_fx.tail import TailBuffer
from benchmarks.quality.data import Batch, Layer

Pair = tuple[PackedTensor, PackedTensor]


class Prefilled(Protocol):
    """What packing takes of a batch: its dense cache, `cos` and `sin` `[1, T, D]` and `vision`, bool `[B, T]`."""

    @property
    def layers(self) -> Sequence[Layer]: ...
    @property
    def cos(self) -> Tensor: ...
    @property
    def sin(self) -> Tensor: ...
    @property
    def vision(self) -> Tensor: ...


def packed(batch: Prefilled, policy: PackPolicy) -> list[Pair]:
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
                angles = SharedAngles.of_prompt(batch.cos, batch.sin, index, key.held.packed, False, False)
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


def cache_of(model: Any, batch: Batch, pairs: list[Pair]) -> Any:
    """A transformers cache that holds these pairs."""
    cache = hf.empty_cache(model)
    for number, (layer, pair) in enumerate(zip(batch.layers, pairs, strict=True)):
        cache.update(layer.key, layer.value, number)
        cache.layers[number].keys, cache.layers[number].values = pair
    return cache


def vision_bytes(pairs: Iterable[tuple[Tensor, Tensor]], batch: Batch) -> int:
    """Bytes of all that packed tensors hold besides dense rows: factors, scales, indices, angles, importance.

    Vision tokens that a layer leaves dense, since packing saves nothing at that rank, count as dense.
    """
    held: list[Tensor] = []
    left = 0
    for pair in pairs:
        for each in pair:
            if not isinstance(each, PackedTensor):
                raise RuntimeError(f"the cache holds a {type(each).__name__}, expected a PackedTensor")
            rows = each.lease.buffer.rows
            held += [tensor for tensor in each.tensors if tensor is not rows]
            if not each.segments:
                left += int(batch.vision.sum()) * each.shape[1] * each.shape[3] * each.element_size()
    return cache_bytes(held) + left


class Decoders:
    """The model compiled for decoding, once for each kind of maintenance; ranks, bits and blocks only retrace."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._made: dict[Any, Any] = {}

    def of(self, policy: PackPolicy) -> Any:
        known = policy.partial, policy.fold_every
        if known not in self._made:
            self._made[known] = compiled(self._model, PackPolicy(partial=policy.partial, strict=True))
        return self._made[known]


def compiled(model: Any, policy: PackPolicy) -> Callable[..., Any]:
    options: dict[str, Any] = {"policy": policy}
    alone = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    return torch.compile(model, backend=backend.attnpack_backend, options=options, **alone)


@contextmanager
def op_by_op() -> Iterator[None]:
    """Rewritten graphs run as they are, without Inductor; any number of them."""
    before = backend._inductor
    backend._inductor = lambda module, examples, patches: module
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
            yield
    finally:
        backend._inductor = before
        torch._dynamo.reset()
