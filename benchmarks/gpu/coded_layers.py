"""One layer's cache in few bits, with random contents: factors in codes, or rows in codes as KIVI stores them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten.quantize import quantize
from attnpack_fx.kernels.parts import Block, PackedParts, RowForm, Rows, Segment, tensors_of
from benchmarks.attention_step import APPENDED
from benchmarks.gpu.layers import Layout, PackedLayer

#: Tokens that share the scales of a key channel, and channels that share the scale of a value token, in KIVI.
GROUP = 32


@dataclass(frozen=True)
class CodedLayer:
    """A query `[B, Hq, 1, D]` and a cache as operators take it.

    dense: keys or values (0, 1) of a sample and KV head, float64 `[N, D]`, of what is packed.
    """

    query: Tensor
    blocks: tuple[Block[Tensor] | Rows[Tensor], Block[Tensor] | Rows[Tensor]]
    tails: tuple[Tensor, Tensor]
    index: Tensor
    dense: Callable[[int, int, int], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, all of which one attention reads."""
        parts = (tensor for block in self.blocks for tensor in tensors_of(block).values())
        return sum(part.nbytes for part in (*parts, *self.tails))

    @property
    def parts(self) -> tuple[PackedParts[Tensor], PackedParts[Tensor]]:
        """Keys and values."""
        sides = zip(self.blocks, self.tails, strict=True)
        keys, values = (PackedParts((Segment((block,)),), tail, APPENDED, self.index) for block, tail in sides)
        return keys, values

    def expected(self, rows: Sequence[tuple[int, int]]) -> Tensor:
        """Attention of some `(sample, query head)` in float64, straight from the formula: `[len(rows), D]`."""
        group = self.query.shape[1] // self.tails[0].shape[2]
        outs = []
        for sample, head in rows:
            keys, values = (
                torch.cat(
                    [self.dense(side, sample, head // group), self.tails[side][:, sample, head // group].double()]
                )
                for side in range(2)
            )
            scores = keys @ self.query[sample, head, 0].double() / math.sqrt(keys.shape[1])
            outs.append(scores.softmax(0) @ values)
        return torch.stack(outs)


def coded_factors(layer: PackedLayer, bits: int) -> CodedLayer:
    """The same factors in codes of so many bits."""
    coded = [quantize(*pair, bits) for pair in zip(layer.coefficients, layer.bases, strict=True)]
    keys, values = (Block(*each, bits) for each in coded)
    rank, dim = layer.bases[0].shape[2:]

    def dense(side: int, sample: int, head: int) -> Tensor:
        coefficients, bases, scales = coded[side]
        scale = scales[sample].double()
        coefficient = reference.decoded(coefficients[sample], rank, bits) * scale[0]
        return coefficient @ (reference.decoded(bases[sample, head], dim, bits) * scale[1, :, None])

    return CodedLayer(layer.query, (keys, values), layer.tails, layer.index, dense)


def coded_rows(
    layout: Layout, batch: int, tokens: int, bits: int, dtype: torch.dtype, random: torch.Generator
) -> CodedLayer:
    """Uniform rows of unit scale: keys by channels of groups of tokens, values by groups of a token's channels."""
    packed, device, dim = tokens - APPENDED, random.device, layout.head_dim
    size = batch, packed, layout.kv_heads
    forms = RowForm(bits, channel=True, zero=True), RowForm(bits, group=min(GROUP, dim), zero=True)
    shapes = (batch, -(-packed // GROUP), layout.kv_heads, dim), (*size, dim // forms[1].group)
    group_of = torch.arange(packed, device=device, dtype=torch.int32) // GROUP

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device, dtype=dtype)

    def rows(form: RowForm, shape: tuple[int, ...]) -> Rows[Tensor]:
        codes = torch.randint(256, (*size, dim * bits // 8), generator=random, device=device, dtype=torch.uint8)
        scale = (0.9 + 0.2 * torch.rand(shape, generator=random, device=device)) * 2 * math.sqrt(3) / (2**bits - 1)
        zero = -scale * (2**bits - 1) / 2
        shared = group_of.expand(batch, -1).contiguous() if form.channel else None
        return Rows(form, codes, scale.to(dtype), zero.to(dtype), group_of=shared)

    sides = [rows(form, shape) for form, shape in zip(forms, shapes, strict=True)]

    def dense(side: int, sample: int, head: int) -> Tensor:
        found = sides[side]
        assert found.zero is not None
        scale, zero = (of[sample, :, head].double() for of in (found.scale, found.zero))
        if found.form.channel:
            scale, zero = scale[group_of], zero[group_of]
        else:
            scale, zero = (of.repeat_interleave(found.form.group, 1) for of in (scale, zero))
        return reference.decoded(found.codes[sample, :, head], dim, bits, signed=False) * scale + zero

    keys, values = sides
    tails = [normal(APPENDED, batch, layout.kv_heads, dim) for _ in range(2)]
    return CodedLayer(
        normal(batch, layout.heads, 1, dim),
        (keys, values),
        (tails[0], tails[1]),
        torch.arange(packed, device=device).expand(batch, -1).contiguous(),
        dense,
    )


def row_bytes(layout: Layout, batch: int, tokens: int, bits: int, dtype: torch.dtype) -> int:
    """About what `coded_rows` takes, without its tails."""
    per_token = 2 * layout.width * (bits / 8 + 2 * dtype.itemsize / GROUP)
    return int(batch * tokens * per_token)
