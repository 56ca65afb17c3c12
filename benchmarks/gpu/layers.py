"""One layer's cache with random contents, made on the device straight from random factors: no SVD runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnpack_fx.kernels.parts import Block, PackedParts, Segment
from benchmarks.attention_step import APPENDED


@dataclass(frozen=True)
class Layout:
    """Heads of an attention layer. axes: of the model's rotary embedding, 0: one angle for each token."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    axes: int = 0

    @property
    def width(self) -> int:
        return self.kv_heads * self.head_dim


#: The models whose shapes are predicted and measured, and those shapes: batch and tokens, the larger batch for one.
MODELS = {
    "LLaVA-1.5-7B": Layout("MHA-32x128", 32, 32, 128),
    "Qwen2.5-VL-7B": Layout("GQA-28/4x128", 28, 4, 128, axes=3),
    "Qwen3-VL-8B": Layout("GQA-32/8x128", 32, 8, 128, axes=3),
}
TOKENS = (576, 2048, 9216, 32768, 131072)
SHAPES = [
    (layout, batch, tokens)
    for tokens in TOKENS
    for number, layout in enumerate(MODELS.values())
    for batch in ((1, 8) if number else (1, 8, 64))
]


@dataclass(frozen=True)
class PackedLayer:
    """A query and a packed cache: `tokens - APPENDED` low-rank tokens, the rest dense rows.

    query `[B, Hq, 1, D]`; coefficients `[B, N, R]`, bases `[B, H, R, D]`, tails `[rows, B, H, D]`, for keys and values
    each.
    """

    query: Tensor
    coefficients: tuple[Tensor, Tensor]
    bases: tuple[Tensor, Tensor]
    tails: tuple[Tensor, Tensor]
    index: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, all of which one attention reads."""
        return sum(part.nbytes for part in (*self.coefficients, *self.bases, *self.tails))

    @property
    def parts(self) -> tuple[PackedParts[Tensor], PackedParts[Tensor]]:
        """Keys and values, of one block each, as it is."""
        sides = zip(self.coefficients, self.bases, self.tails, strict=True)
        keys, values = (
            PackedParts((Segment((Block(coefficient, basis),)),), tail, APPENDED, self.index)
            for coefficient, basis, tail in sides
        )
        return keys, values

    def fill_dense(self, keys: Tensor, values: Tensor) -> None:
        """Write the dense cache `[B, H, T, D]` this stands for, one sample at a time: little else is held."""
        for number, dense in enumerate((keys, values)):
            coefficient, basis, tail = self.coefficients[number], self.bases[number], self.tails[number]
            packed = coefficient.shape[1]
            for sample in range(dense.shape[0]):
                dense[sample, :, :packed] = coefficient[sample] @ basis[sample]
            dense[:, :, packed:] = tail.permute(1, 2, 0, 3)

    def expected(
        self, rows: Sequence[tuple[int, int]], turned: Callable[[Tensor], Tensor] = lambda keys: keys
    ) -> Tensor:
        """Attention of some `(sample, query head)` in float64, straight from the formula: `[len(rows), D]`.

        turned: what is done to packed keys `[N, D]` first.
        """
        group = self.query.shape[1] // self.bases[0].shape[1]
        outs = []
        for sample, head in rows:
            keys, values = (
                torch.cat(
                    [
                        meant(coefficient[sample].double() @ basis[sample, head // group].double()),
                        tail[:, sample, head // group].double(),
                    ]
                )
                for meant, coefficient, basis, tail in zip(
                    (turned, lambda values: values), self.coefficients, self.bases, self.tails, strict=True
                )
            )
            scores = keys @ self.query[sample, head, 0].double() / math.sqrt(keys.shape[1])
            outs.append(scores.softmax(0) @ values)
        return torch.stack(outs)


def packed_bytes(layout: Layout, batch: int, tokens: int, rank: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of a packed layer."""
    packed = tokens - APPENDED
    return 2 * batch * (packed * rank + rank * layout.width + APPENDED * layout.width) * dtype.itemsize


def dense_bytes(layout: Layout, batch: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of a dense layer."""
    return 2 * batch * tokens * layout.width * dtype.itemsize


def packed_layer(
    layout: Layout, batch: int, tokens: int, rank: int, dtype: torch.dtype, random: torch.Generator
) -> PackedLayer:
    """A packed layer with keys, values and queries of unit scale, so that scores have it too, as in a model."""

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=random, device=random.device, dtype=dtype) * scale

    def pair(*size: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        return normal(*size, scale=scale), normal(*size, scale=scale)

    packed = tokens - APPENDED
    return PackedLayer(
        query=normal(batch, layout.heads, 1, layout.head_dim),
        coefficients=pair(batch, packed, rank),
        bases=pair(batch, layout.kv_heads, rank, layout.head_dim, scale=rank**-0.5),
        tails=pair(APPENDED, batch, layout.kv_heads, layout.head_dim),
        index=torch.arange(packed, device=random.device).expand(batch, -1).contiguous(),
    )


def low_rank(
    batch: int, heads: int, tokens: int, dim: int, rank: int, dtype: torch.dtype, random: torch.Generator
) -> Tensor:
    """Random dense `[B, H, T, D]` of unit scale whose `[T, H * D]` matrices have rank `rank`, made sample by sample."""
    dense = torch.empty((batch, heads, tokens, dim), dtype=dtype, device=random.device)
    for sample in dense:
        coefficient = torch.randn((tokens, rank), generator=random, device=random.device)
        basis = torch.randn((rank, heads * dim), generator=random, device=random.device) / math.sqrt(rank)
        sample.copy_((coefficient @ basis).view(tokens, heads, dim).transpose(0, 1))
    return dense
