"""Coding the older dense tokens: the oldest tail rows become a segment of `Rows`, behind those that are low rank."""

from dataclasses import replace

import torch
from torch import Tensor

from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.containers import map_tensors
from attnpack_fx.held import ROW_SEGMENT
from attnpack_fx.kernels.aten import coded_rows
from attnpack_fx.kernels.parts import Rows, Segment
from attnpack_fx.kernels.rotary import rotate
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.row_coding import Kind, RowCoding
from attnpack_fx.tail import exact


def code(layer: CachedLayer, method: RowCoding) -> None:
    """Code what the method says is due of keys and of values."""
    counts = due(layer, method)
    if any(counts):
        place_all(layer)
        layer.key = _coded(layer.key, counts[0], "key", layer, method)
        layer.value = _coded(layer.value, counts[1], "value", layer, method)


def due(layer: CachedLayer, method: RowCoding) -> tuple[int, int]:
    """How many of the oldest tail rows of keys and of values are to be coded now; rows that are pinned do not count."""
    rows = [packed.lease.length - packed.held.pinned for packed in (layer.key, layer.value)]
    keys, values = method.due("key", rows[0], layer.prefill), method.due("value", rows[1], layer.prefill)
    angles = layer.key.held.angles
    if method.unrotated and angles is not None and angles.tail is None:
        keys = 0  # they cannot be turned back
    return keys, values


def place_all(layer: CachedLayer) -> None:
    """Give every appended token of the layer a place among its prompt's, for what is coded has one."""
    placement = layer.key.placed
    if placement is not layer.key.placement:
        layer.key, layer.value = (
            PackedTensor(replace(packed.held, placement=placement), packed.lease, packed.importance)
            for packed in (layer.key, layer.value)
        )


def _coded(packed: PackedTensor, count: int, kind: Kind, layer: CachedLayer, method: RowCoding) -> PackedTensor:
    """With the oldest `count` tail rows coded."""
    if not count:
        return packed
    rows, angles = oldest(packed, count), packed.held.angles
    if method.unrotated and kind == "key" and angles is not None:
        rows, angles = turned_back(rows, packed).to(rows.dtype), angles.folded(count)
    elif angles is not None:
        angles = angles.dropped(count)
    made = method.encode(rows.permute(1, 0, 2, 3), kind, layer.number, layer.prefill)
    made = made if ROW_SEGMENT in packed.modalities else _of_two_groups(made)
    result = with_rows(packed, made, packed.lease.buffer.rows[count : packed.lease.length])
    return result if angles is None else result.turned(angles)


def _of_two_groups(rows: Rows[Tensor]) -> Rows[Tensor]:
    """With a second group and part, of no token, where there is but one: of a single one Dynamo makes a graph apart."""
    grouped = ("right", *(("scale", "zero") if rows.form.channel else ()))

    def doubled(name: str, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor], 1) if name in grouped and tensor.shape[1] == 1 else tensor

    return map_tensors(doubled, rows)


def oldest(packed: PackedTensor, count: int, first: int = 0) -> Tensor:
    """Tail rows `[count, B, H, D]` from row `first` on; zero where they hold no token. All are placed."""
    held, end = packed.held, first + count
    gone = held.placement.index[:, held.packed + first : held.packed + end].T < 0
    return packed.lease.buffer.rows[first:end].masked_fill(gone[:, :, None, None], 0)


def turned_back(rows: Tensor, packed: PackedTensor) -> Tensor:
    """The oldest tail rows `[n, B, H, D]` as they were before rotary embedding, fp32."""
    angles = packed.held.angles
    assert angles is not None
    cos, sin = (each[:, : len(rows)].float().transpose(0, 1)[:, :, None] for each in angles.tail_rows())
    norm = cos.square() + sin.square()  # not 1 where attention is scaled by rotary embedding, as in YaRN
    return rotate(rows.float(), cos / norm, -sin / norm, angles.packed.interleaved)


def with_rows(packed: PackedTensor, made: Rows[Tensor], left: Tensor) -> PackedTensor:
    """With more tokens in the coded segment, and these tail rows `[n, B, H, D]` left."""
    held = packed.held
    segments, modalities = held.segments, held.modalities
    if modalities[-1:] == (ROW_SEGMENT,):
        (block,) = segments[-1].blocks
        assert isinstance(block, Rows)
        segments = (*segments[:-1], Segment((_dense_in_memory(coded_rows.extend(block, made)),)))
    else:
        segments, modalities = (*segments, Segment((_dense_in_memory(made),))), (*modalities, ROW_SEGMENT)
    kept = exact(left.clone())  # not a view that keeps the coded rows alive
    return PackedTensor(replace(held, segments=segments, modalities=modalities, closed=True), kept, packed.importance)


def _dense_in_memory(rows: Rows[Tensor]) -> Rows[Tensor]:
    """With the strides that compiled graphs expect: a code may come from rows turned round."""
    return map_tensors(lambda _, tensor: tensor.contiguous(), rows)
