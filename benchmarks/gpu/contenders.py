"""What packed attention is compared with: every way to attend to a dense cache, and decompressing first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_step import APPENDED
from benchmarks.gpu.layers import Layout, PackedLayer
from benchmarks.gpu.timing import Contender

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class DenseLayer:
    """query `[B, Hq, 1, D]`, keys and values `[B, H, T, D]`."""

    query: Tensor
    keys: Tensor
    values: Tensor


def dense(sets: list[DenseLayer], layout: Layout, dry: bool) -> dict[str, Contender]:
    """Contenders on a dense cache, whether they run here or not. A dry run spares the compiler."""
    found = {
        name: Contender([partial(_grouped, one, layout) for one in sets], partial(sdpa_kernel, backend))
        for name, backend in _BACKENDS.items()
    }
    flex = _flex("eager" if dry else "inductor")
    return found | {"flex": Contender([partial(flex, one.query, one.keys, one.values) for one in sets])}


def _grouped(layer: DenseLayer, layout: Layout) -> Tensor:
    """Attention with the query heads of a KV head as its queries: for one token and no mask that is the same, and no
    backend has to copy keys.
    """
    batch, heads, _, dim = layer.query.shape
    queries = layer.query.view(batch, layout.kv_heads, heads // layout.kv_heads, dim)
    return F.scaled_dot_product_attention(queries, layer.keys, layer.values).view(batch, heads, 1, dim)


def _flex(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention, which has a decoding kernel of its own for one query; compiled for each shape."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(partial(flex_attention, enable_gqa=True), dynamic=False, backend=backend)


def decompressed(packed: Mapping[int, list[PackedLayer]], tokens: int) -> dict[int, Contender]:
    """By rank: keys and values rebuilt by one matrix product each, then attention, as AttentionPack does.

    It gets the bases as that product wants them, `[B, R, H * D]`, and all write to the same room.
    """
    first = next(iter(packed.values()))[0]
    _, batch, kv_heads, dim = first.tails[0].shape
    room = [first.query.new_empty((batch, tokens, kv_heads, dim)) for _ in range(2)]

    def rebuild_and_attend(layer: PackedLayer, flat: list[Tensor]) -> Tensor:
        for whole, coefficient, basis, tail in zip(room, layer.coefficients, flat, layer.tails, strict=True):
            torch.bmm(coefficient, basis, out=whole.flatten(2)[:, : tokens - APPENDED])
            whole[:, tokens - APPENDED :] = tail.transpose(0, 1)
        keys, values = (whole.transpose(1, 2) for whole in room)
        queries = layer.query.view(batch, kv_heads, -1, dim)
        return F.scaled_dot_product_attention(queries, keys, values).view(layer.query.shape)

    return {
        rank: Contender(
            [
                partial(rebuild_and_attend, layer, [basis.transpose(1, 2).flatten(2) for basis in layer.bases])
                for layer in sets
            ]
        )
        for rank, sets in packed.items()
    }
