"""`attnpack::attention` in operations that every runtime has: what an exported step decomposes it to.

The operator stays one opaque node while a step is captured, so that no guard on its inner shapes is recorded; then
`torch.export.ExportedProgram.run_decompositions` replaces it by this. Products are re-associated as in the ATen
implementation, nothing packed in the rotated space is decompressed, and no key or value head is repeated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnpack_fx.kernels.flat import unflatten_pair
from attnpack_fx.kernels.parts import Block, PackedParts, Rows, formats, kind


def attention(
    query: Tensor,
    packed: Sequence[Tensor],
    key: Sequence[int],
    value: Sequence[int],
    length: int,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """See `ops.attention`: for slots in logical order (an empty `index`), an additive mask and a full tail.

    Segments are low rank, in numbers as they are or codes of 8, 4 or 2 bits, or rows as they are.
    """
    of_keys, of_values = unflatten_pair(packed, key, value, length)
    angles = of_keys.angles
    assert mask is not None and not of_keys.ragged
    assert angles is None or (not angles.interleaved and angles.axes is None)
    batch, heads, queries, dim = query.shape
    kv_heads, value_dim = of_values.tail.shape[2:]
    group = heads // kv_heads
    # Query heads of a KV head stand together: [B, H, G Tq, D].
    q = (query * scale).reshape(batch, kv_heads, group * queries, dim)
    scores, start = [], 0
    for segment in segments(of_keys):
        end = start + segment[0].shape[-2]
        if angles is None or statically_known_true(start >= angles.cos.shape[1]):
            scores.append(_scores(q, *segment))
        else:
            # Kept before rotary embedding: rebuilt, which takes no more products than turning queries for every slot.
            rows = segment[0] if len(segment) == 1 else segment[0][:, None] @ segment[1]
            cos, sin = angles.cos, angles.sin
            whole = statically_known_true(start == 0) and statically_known_true(cos.shape[1] == end)
            turns = (cos, sin) if whole else (cos[:, start:end], sin[:, start:end])
            scores.append(q @ rotated(rows, *(torch.cat([each, each], -1) for each in turns)).mT)
        start = end
    together = torch.cat(scores, -1).reshape(batch, heads, queries, -1)
    weights = torch.softmax((together + mask).float(), -1).to(query.dtype)
    weights = weights.reshape(batch, kv_heads, group * queries, -1)
    out, start = None, 0
    for segment in segments(of_values):
        end = start + segment[0].shape[-2]
        part = _attended(weights[..., start:end], *segment)
        out, start = part if out is None else out + part, end
    assert out is not None
    return out.reshape(batch, heads, queries, value_dim)


def segments(parts: PackedParts[Tensor]) -> list[tuple[Tensor, ...]]:
    """`(coefficient [B, N, R], basis [B, H, R, D])` of a low-rank segment, `(rows [B, H, N, D],)` of others, the tail's
    last.
    """
    found: list[tuple[Tensor, ...]] = []
    for segment in parts.segments:
        rows = segment.blocks[0]
        if isinstance(rows, Rows):
            found.append((rows.codes.transpose(1, 2),))
            continue
        # Columns of several blocks side by side are one low-rank matrix.
        each = [_factors(block, parts.tail) for block in segment.factors]
        found.append(each[0] if len(each) == 1 else tuple(map(torch.cat, zip(*each, strict=True), (2, 2))))
    return [*found, (parts.tail.permute(1, 2, 0, 3),)]


def _factors(block: Block[Tensor], tail: Tensor) -> tuple[Tensor, Tensor]:
    coefficient, basis, scale = block.coefficient, block.basis, block.scale
    if scale is None:
        return coefficient, basis
    (bits, basis_bits), zero = formats(kind(block)), scale[:, 2:] if block.asymmetric else None
    dtype, rank = tail.dtype, basis.shape[2]
    if bits:
        offset = None if zero is None else zero[:, 0, None]
        coefficient = numbers(coefficient, rank, bits, scale[:, 0, None], offset, dtype)
    if basis_bits:
        offset = None if zero is None else zero[:, 1, None, :, None]
        basis = numbers(basis, tail.shape[3], basis_bits, scale[:, 1, None, :, None], offset, dtype)
    return coefficient, basis


def numbers(codes: Tensor, size: int, bits: int, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What codes of 8, 4 or 2 bits stand for, `[..., size]`: `kernels/aten/quantize.py`, by arithmetic alone.

    Runtimes differ in the shifts and masks of bytes they know; all of them divide and round down.
    """
    level = codes.float()
    if bits < 8:
        base = float(2**bits)
        fields = []
        for _ in range(8 // bits):
            above = torch.floor(level / base)
            fields.append(level - above * base)
            level = above
        level = torch.stack(fields, -1).flatten(-2)[..., :size]
        if zero is None:
            # Two's complement; of two bits half a level higher.
            level = level - base * torch.floor(level / (base / 2)) + (0.5 if bits == 2 else 0.0)
    level = level * scale
    return (level if zero is None else level + zero).to(dtype)


def _scores(q: Tensor, *segment: Tensor) -> Tensor:
    if len(segment) == 1:
        return q @ segment[0].mT
    coefficient, basis = segment
    latent = q @ basis.mT
    return (latent.flatten(1, 2) @ coefficient.mT).unflatten(1, latent.shape[1:3])


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[B, H, N, D]` with the pairs `(i, i + E / 2)` turned by cos and sin `[B, N, E]`; dims from E on stay."""
    size = cos.shape[-1]
    turning, rest = x[..., :size], x[..., size:]
    # Written as transformers does, which PyTorch's exporter knows as ONNX's RotaryEmbedding: one pass instead of six.
    first, second = turning[..., : size // 2], turning[..., size // 2 :]
    turned = turning * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return turned if size == x.shape[-1] else torch.cat([turned, rest], -1)


def turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys `[B, H, T, D]` before rotary embedding, which may also scale them."""
    cos, sin = cos.float(), sin.float()
    squares = cos * cos + sin * sin
    return rotated(x.float(), cos / squares, -sin / squares).to(x.dtype)


def _attended(weights: Tensor, *segment: Tensor) -> Tensor:
    if len(segment) == 1:
        return weights @ segment[0]
    coefficient, basis = segment
    latent = weights.flatten(1, 2) @ coefficient
    return latent.unflatten(1, weights.shape[1:3]) @ basis
