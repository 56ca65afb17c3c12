"""What the attention of one decode step costs in a layer, dense and packed; and the fastest setting that loses no more.

A step puts a token into the cache and attends to all with its query. It is predicted from the bytes it reads and the
products it computes, by what this device does of either in a second, and what a step of four tokens takes; and it is
measured, by itself.

Another setting loses no more where its rank keeps as much: of keys as they are attended, singular values say which rank
leaves out no more than the packed keys do.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpack_fx.kernels import ops
from attnpack_fx.kernels.aten.rows import select_tokens
from attnpack_fx.kernels.flat import flatten
from attnpack_fx.kernels.parts import Block, PackedParts, Rows, Segment, tensors_of
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.policy import PackPolicy

#: Calls before those that are timed, and those.
_WARMUP, _CALLS = 2, 9
#: Tokens of next to nothing.
_FEW = 4
#: What summing over components takes, in multiply-adds of small matrices (`_form` in `kernels/aten/unrotated.py`).
_SUMMING = 33
#: Bytes read between calls, more than any cache holds.
_EVICTING = 96 << 20
#: What a rank may leave out beyond what the packed keys do, as a share: a factorisation need not be the best there is.
_SLACK = 1.02

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Device:
    """What it does in a second: bytes read by products of matrices with vectors, multiply-adds of small matrices."""

    bytes: float
    products: float

    def seconds(self, read: float, multiplied: float) -> float:
        return read / self.bytes + multiplied / self.products


@dataclass(frozen=True)
class Step:
    """Seconds of one step in one layer, predicted and measured."""

    predicted: float
    measured: float


@dataclass(frozen=True)
class Layer:
    """A layer of the cache after the same tokens, dense and packed. heads: of the query."""

    dense: Pair
    packed: tuple[PackedTensor, PackedTensor]
    heads: int

    @property
    def query(self) -> Tensor:
        key = self.dense[0]
        random = torch.Generator(key.device).manual_seed(0)
        shape = (key.shape[0], self.heads, 1, key.shape[3])
        return torch.randn(shape, generator=random, device=key.device).to(key.dtype)


@dataclass(frozen=True)
class Setting:
    """A policy (None: all dense), and the seconds that a step takes with it in all packed layers together."""

    policy: PackPolicy | None
    seconds: float


def dense_step(layer: Layer) -> Step:
    """The new token joins the keys and values, as `DynamicCache` has it, and the query attends to all."""
    query, (key, value) = layer.query, layer.dense
    device = _device(key.device, key.dtype)
    products = key[:, 0, :, 0].numel() * layer.heads * (key.shape[3] + value.shape[3])
    # All is read and written anew with the token, and read again.
    predicted = device.seconds(3 * (key.nbytes + value.nbytes), products)
    few = _dense(query, key[:, :, :_FEW], value[:, :, :_FEW])
    fixed, measured = (_seconds(step, key.device) for step in (few, _dense(query, key, value)))
    return Step(fixed + predicted, measured)


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    grouped = query.shape[1] != key.shape[1]
    pieces = [(each[:, :, :-1], each[:, :, -1:].clone()) for each in (key, value)]

    def step() -> Tensor:
        keys, values = (torch.cat(pair, 2) for pair in pieces)
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)

    return step


def packed_step(layer: Layer, keys: PackedParts[Tensor] | None = None) -> Step:
    """The new token goes into the tail, and the query attends to what is packed; keys: others in the same slots."""
    of_keys, of_values, query = keys or layer.packed[0].parts, layer.packed[1].parts, layer.query
    few_keys, few_values, fixed = _few(of_keys), _few(of_values), 0.0
    if few_keys is not None and few_values is not None:
        fixed = _seconds(_packed(query, replace(few_keys, ragged=False), few_values), query.device)
    read = sum(each.nbytes for parts in (of_keys, of_values) for block in parts.blocks for each in _read(block))
    read += sum(parts.tail[: int(parts.length)].nbytes for parts in (of_keys, of_values))
    products = _products(layer, of_keys) + _products(layer, of_values)
    predicted = _device(query.device, query.dtype).seconds(read, products)
    return Step(fixed + predicted, _seconds(_packed(query, of_keys, of_values), query.device))


def _packed(query: Tensor, keys: PackedParts[Tensor], values: PackedParts[Tensor]) -> Callable[[], Tensor]:
    keys, values = (replace(parts, tail=parts.tail.clone()) for parts in (keys, values))
    tails, places = [keys.tail, values.tail], [int(parts.length) - 1 for parts in (keys, values)]
    new = [parts.tail[:1].permute(1, 2, 0, 3).clone() for parts in (keys, values)]
    arguments = attention_arguments(query, keys, values)

    def step() -> Tensor:
        if min(places) >= 0:
            ops.append_(tails, new, places)
        return ops.attention(*arguments)

    return step


def _few(parts: PackedParts[Tensor]) -> PackedParts[Tensor] | None:
    """One component of a few tokens of every segment, to see what a step takes that has next to nothing to do."""
    if not _plain(parts) or not len(parts.tail):
        return None
    firsts = [segment.factors[0] for segment in parts.segments]
    cut = [replace(each, coefficient=each.coefficient[:, :_FEW, :1], basis=each.basis[:, :, :1]) for each in firsts]
    count, angles = sum(each.coefficient.shape[1] for each in cut), parts.angles
    if angles is not None and angles.axes is None:
        angles = replace(angles, cos=angles.cos[:, :count], sin=angles.sin[:, :count])
    elif angles is not None and angles.axes is not None:
        angles = replace(angles, axes=angles.axes[:, :, :count])
    segments = tuple(Segment((each,)) for each in cut)
    return replace(parts, segments=segments, length=1, index=parts.index[:, : count + 1], angles=angles)


def _plain(parts: PackedParts[Tensor]) -> bool:
    """Whether segments are low rank, in the model's dtype, and no two samples share a basis."""
    return all(
        isinstance(block, Block) and block.scale is None and block.owner is None and block.basis.shape[0] > 0
        for block in parts.blocks
    )


def _products(layer: Layer, parts: PackedParts[Tensor]) -> float:
    """Multiply-adds of keys, or of values, in all samples."""
    batch, _, _, dim = layer.query.shape
    found = int(parts.length) * parts.tail.shape[3]
    for block in parts.blocks:
        coefficient = _read(block)[0]
        tokens, rank = coefficient.shape[1], coefficient[0, 0].numel()
        each = 1
        if parts.angles is not None:
            # Keys before rotary embedding: for each token and component the query is turned, or along each axis, and
            # the products with it are summed, which takes the time of so many more.
            cos, axes = parts.angles.cos, parts.angles.axes
            each = _SUMMING + (2 * cos.shape[-1] if axes is None else axes.shape[1])
        found += rank * (tokens * each + dim)
    return float(batch * layer.heads * found)


def _read(block: Block[Tensor] | Rows[Tensor]) -> list[Tensor]:
    """Coefficient and basis, or codes and scale."""
    return list(tensors_of(block).values())[:2]


def attention_arguments(query: Tensor, keys: PackedParts[Tensor], values: PackedParts[Tensor]) -> tuple[Any, ...]:
    """Of `ops.attention`, without a mask, at the usual scale. query: `[B, Hq, Tq, D]`."""
    tensors, layouts = flatten(keys, values)
    return query, tensors, *layouts, keys.length, None, query.shape[-1] ** -0.5


def step_costs(policy: PackPolicy, layers: Sequence[Layer]) -> tuple[list[tuple[Step, Step]], list[Setting]]:
    """Every layer's step, dense and packed, and what `fastest` finds with them."""
    try:
        steps = [(dense_step(layer), packed_step(layer)) for layer in layers]
        return steps, fastest(policy, layers, steps)
    finally:
        _others.cache_clear()


def fastest(policy: PackPolicy, layers: Sequence[Layer], steps: Sequence[tuple[Step, Step]]) -> list[Setting]:
    """The policy, dense keys and values, and rotated keys at a rank that loses no more: the fastest first.

    Without the last where keys are rotated already, where no rank is enough, and where the policy says more than ranks:
    a calibrated plan, methods, energies, shared bases. steps: of every layer, dense and packed.
    """
    if not layers:
        return []
    found = [
        Setting(policy, sum(packed.measured for _, packed in steps)),
        Setting(None, sum(dense.measured for dense, _ in steps)),
    ]
    plain = not (policy.layers or policy.passes or policy.partial or policy.varies) and policy.bases == "sample"
    if plain and all(each.packed[0].parts.angles is not None and _plain(each.packed[0].parts) for each in layers):
        found += filter(None, [_rotated(policy, layers)])
    return sorted(found, key=lambda setting: setting.seconds)


def _rotated(policy: PackPolicy, layers: Sequence[Layer]) -> Setting | None:
    """With keys packed as they are attended, at the least rank that loses no more in any layer."""
    ranks: dict[str, int] = {}
    for layer in layers:
        for name, rows, packed in _rows(layer):
            lost = _SLACK * (packed - rows).square().sum((1, 2), dtype=torch.float64).sqrt()
            # What a rank leaves out, from none of the components on.
            left = _energies(rows).flip(-1).cumsum(-1).flip(-1).sqrt()
            needed = int((left > lost[:, None]).sum(-1).amax())
            ranks[name] = max(1, needed, ranks.get(name, 0))
            tokens, width = rows.shape[1:]
            if ranks[name] * (tokens + width) >= tokens * width:
                return None  # it would stay dense
    seconds = sum(packed_step(layer, _repacked(layer, ranks)).measured for layer in layers)
    of_values = {name: max(layer.packed[1].ranks.get(name, 0) for layer in layers) for name in ranks}
    # A policy's ranks mean the whole layer, of which these are one process's share.
    shares = policy.processes
    pairs: Any = {f"{name}_rank": (rank * shares, of_values[name] * shares) for name, rank in ranks.items()}
    return Setting(replace(policy, key_space="rotated", **pairs), seconds)


def _rows(layer: Layer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of the keys in segments: modality, and all their tokens `[B, N, H * D]`, dense and as they are packed."""
    key, start = layer.packed[0], 0
    contents = key.dense()
    for name, segment in zip(key.modalities, key.segments, strict=True):
        end = start + segment.factors[0].coefficient.shape[1]
        index = key.positions[:, start:end]
        dense, packed = (select_tokens(each, index).flatten(2).float() for each in (layer.dense[0], contents))
        yield name, dense, packed
        start = end


def _energies(rows: Tensor) -> Tensor:
    """Squared singular values of `[B, N, M]`, descending, float64."""
    wide = rows.double()
    gram = wide @ wide.mT if wide.shape[1] <= wide.shape[2] else wide.mT @ wide
    return torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0)


def _repacked(layer: Layer, ranks: Mapping[str, int]) -> PackedParts[Tensor]:
    """The packed keys with segments of these ranks, of the dense keys as they are attended."""
    parts, dtype, segments = layer.packed[0].parts, layer.dense[0].dtype, []
    for name, rows, _ in _rows(layer):
        x = rows.unflatten(2, (layer.dense[0].shape[1], -1)).transpose(1, 2).to(dtype)
        index = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[0], -1)
        segments.append(Segment((Block(*ops.compress(x, index, ranks[name])),)))
    return replace(parts, segments=tuple(segments), angles=None)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call that finds nothing in the device's caches: a step reads the model's weights between."""
    others = _others(device)
    seconds = []
    for _ in range(_WARMUP + _CALLS):
        others.sum()
        _wait(device)
        began = time.perf_counter()
        step()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[_WARMUP:])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@lru_cache
def _others(device: torch.device) -> Tensor:
    return torch.zeros(_EVICTING // 4, device=device)


@lru_cache
def _device(device: torch.device, dtype: torch.dtype) -> Device:
    matrix = torch.zeros((4096, 4096), device=device, dtype=dtype)
    vector = torch.zeros((4096, 1), device=device, dtype=dtype)
    small = torch.zeros((512, 512), device=device, dtype=dtype)
    read = matrix.nbytes / _seconds(lambda: matrix @ vector, device)
    return Device(read, small.numel() * small.shape[0] / _seconds(lambda: small @ small, device))
