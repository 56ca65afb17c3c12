"""Exact scores of packed keys that are stored before rotary embedding: `K_t = R_t (C_t B)`.

With `(a, b)` the pairs of dims that turn together, and per query row m, rank r and pair

    W_cos = q_a B_a + q_b B_b,   W_sin = q_b B_a - q_a B_b,   g[t] = [cos_t | sin_t] [W_cos | W_sin]^T

a score is `sum over r of C[t, r] g[t, r, m]`: the query is rotated instead of the key. Three forms of the same sum:

- turned queries: g for every token, one product of `2 E` operations per number of g, tiled so that g stays in cache.
- tables: where cos and sin are sums over rotary axes (`Angles.axes`), so is g: it is computed for the rows of the
  tables alone, and every token sums `A R` of its rows, weighted by its coefficients, as one embedding bag.
- turned keys: key tiles are rebuilt and rotated as complex numbers, `2 R + 1` operations per number of a key, whatever
  the number of query rows. For chunked prefill, and for large groups of query heads at high rank.

`_form` weighs them by what they took on one Xeon core (Sapphire Rapids), in nanoseconds per token; the core did 116
GFLOP/s in the first form's product. All compute in fp32: without matrix units, bf16 products of these shapes were
slower; float64 stays float64. Dims that do not turn are absorbed.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from attnpack_fx.kernels.linalg import working
from attnpack_fx.kernels.parts import Angles
from attnpack_fx.kernels.rotary import pairs, per_slot

#: Most bytes of the intermediate numbers of one tile: about the L2 caches of two cores.
TILE_BYTES = 2 << 20

#: Of one segment: coefficient `[B, n, r]` and basis `[B or 1, H, r, D]` of its blocks of columns.
_Blocks = list[tuple[Tensor, Tensor]]


def scores(
    q: Tensor, keys: Sequence[tuple[int, Tensor, Tensor]], angles: Angles[Tensor], batch: int, first: int = 0
) -> Tensor:
    """Scores of every slot, `[B, Hq * Tq, sum of N over segments]` in q's dtype, accumulated in fp32.

    q: `[B * H, g * Tq, D]`, scaled; the query rows of a KV head are neighbours.
    keys: (number of the segment, coefficient `[B, n, r]`, basis `[B * H or H, r, D]`), in slot order. Blocks of one
        segment follow each other and add up; the first covers its N tokens, further ones the first n of them.
        A basis with H rows while B > 1 is shared by the samples.
    angles: of all slots; those of these segments are first, first + 1, ...
    """
    heads = q.shape[0] // batch
    work = working(q.dtype)
    rows = q.to(work).view(batch, heads, *q.shape[1:])
    segments = list(_segments(keys, heads))
    slots = sum(blocks[0][0].shape[1] for blocks in segments)
    out = rows.new_empty((batch, heads * q.shape[1], slots))
    turning = 2 * angles.cos.shape[-1]
    start = 0
    for blocks in segments:
        tokens = blocks[0][0].shape[1]
        part = out[:, :, start : start + tokens]
        if turning:
            form = _form(rows, blocks, angles)
            form(part, *pairs(rows[..., :turning], angles.interleaved), blocks, angles, first + start)
        else:
            part.zero_()
        if turning < q.shape[2]:
            for coefficient, basis in blocks:
                latent = torch.matmul(rows[..., turning:], basis[..., turning:].to(work).mT).flatten(1, 2)
                part[:, :, : coefficient.shape[1]] += torch.bmm(latent, coefficient.to(work).mT)
        start += tokens
    return out.to(q.dtype)


def _segments(keys: Sequence[tuple[int, Tensor, Tensor]], heads: int) -> Iterator[_Blocks]:
    for _, group in itertools.groupby(keys, key=lambda key: key[0]):
        yield [(coefficient, basis.unflatten(0, (-1, heads))) for _, coefficient, basis in group]


def _form(rows: Tensor, blocks: _Blocks, angles: Angles[Tensor]) -> Callable[..., None]:
    """The cheapest form for one segment."""
    heads, dims = rows.shape[1], 2 * angles.cos.shape[-1]
    queries = heads * rows.shape[2]
    rank = sum(coefficient.shape[2] for coefficient, _ in blocks)
    costs = {
        _turned_keys: heads * dims * (0.018 * rank + 1.2) + 0.02 * queries * dims,
        _turned_queries: rank * queries * (0.018 * dims + 0.6),
    }
    if angles.axes is not None:
        share = angles.cos.shape[1] / max(1, angles.axes.shape[2])
        costs[_tables] = angles.axes.shape[1] * rank * (0.3 * queries + 8) + share * costs[_turned_queries]
    return min(costs, key=lambda form: costs[form])


def _query_matrix(a: Tensor, b: Tensor, basis: Tensor, interleaved: bool) -> Tensor:
    """`[W_cos | W_sin]`, `[B, R * Hq * Tq, E]`; a and b: pairs of the queries `[B, H, g * Tq, E / 2]`."""
    batch, heads, queries, half = a.shape
    turning = basis.to(a.dtype).transpose(1, 2).unsqueeze(3)[..., : 2 * half]
    basis_a, basis_b = pairs(turning, interleaved)
    a, b = a.unsqueeze(1), b.unsqueeze(1)
    matrix = a.new_empty((batch, basis_a.shape[1], heads, queries, 2, half))
    cosine, sine = matrix.unbind(-2)
    torch.mul(a, basis_a, out=cosine).addcmul_(b, basis_b)
    torch.mul(b, basis_a, out=sine).addcmul_(a, basis_b, value=-1)
    return matrix.view(batch, -1, 2 * half)


def _tiles(batch: int, tokens: int, bytes_per_token: int) -> Iterator[tuple[slice, int, int]]:
    """Samples and tokens whose intermediate numbers fit a tile: many tokens of one sample, or few of many."""
    size = max(16, TILE_BYTES // bytes_per_token)
    samples = max(1, size // tokens)
    for sample in range(0, batch, samples):
        for start in range(0, tokens, size):
            yield slice(sample, min(sample + samples, batch)), start, min(start + size, tokens)


def _of(x: Tensor, samples: slice) -> Tensor:
    return x if x.shape[0] == 1 else x[samples]


def _turned_queries(out: Tensor, a: Tensor, b: Tensor, blocks: _Blocks, angles: Angles[Tensor], first: int) -> None:
    batch, queries, _ = out.shape
    for number, (coefficient, basis) in enumerate(blocks):
        rank, tokens = coefficient.shape[2], coefficient.shape[1]
        matrix = _query_matrix(a, b, basis, angles.interleaved)
        turns = torch.cat(per_slot(angles, first, first + tokens), -1).to(a.dtype).mT
        weights = coefficient.to(a.dtype).mT.unsqueeze(2).contiguous()
        for samples, start, end in _tiles(batch, tokens, 4 * rank * queries):
            w = matrix[samples]
            g = torch.matmul(w, _of(turns, samples)[..., start:end]).view(w.shape[0], rank, queries, -1)
            g *= weights[samples, ..., start:end]
            into = out[samples, :, start:end]
            if number:
                into += g.sum(1)
            else:
                torch.sum(g, 1, out=into)


def _tables(out: Tensor, a: Tensor, b: Tensor, blocks: _Blocks, angles: Angles[Tensor], first: int) -> None:
    assert angles.axes is not None
    batch, queries, _ = out.shape
    length, count = angles.cos.shape[1], angles.axes.shape[1]
    turns = torch.cat([angles.cos, angles.sin], -1).to(a.dtype)
    sample = torch.arange(batch, device=out.device)[:, None, None]
    for number, (coefficient, basis) in enumerate(blocks):
        tokens, rank = coefficient.shape[1:]
        matrix = _query_matrix(a, b, basis, angles.interleaved)
        table = torch.matmul(turns, matrix.mT).view(batch * length * rank, queries)
        ranks = torch.arange(rank, device=out.device)
        for samples, start, end in _tiles(batch, tokens, 16 * count * rank + 4 * queries):
            axes = _of(angles.axes, samples)[:, :, first + start : first + end].mT
            places = ((sample[samples] * length + axes) * rank)[..., None] + ranks
            weights = coefficient[samples, start:end, None].to(a.dtype).expand(-1, -1, count, -1)
            bags = torch.arange(0, places.numel() + 1, count * rank, device=out.device)
            summed = torch.embedding_bag(
                table, places.flatten(), bags, False, 0, False, weights.flatten(), include_last_offset=True
            )[0]
            summed = summed.view(places.shape[0], end - start, queries).mT
            into = out[samples, :, start:end]
            if number:
                into += summed
            else:
                into.copy_(summed)


def _turned_keys(out: Tensor, a: Tensor, b: Tensor, blocks: _Blocks, angles: Angles[Tensor], first: int) -> None:
    batch, heads, _, half = a.shape
    tokens, dims = out.shape[2], 2 * half
    out = out.unflatten(1, (heads, -1))
    # Pairs as neighbours: the real and imaginary parts of complex numbers.
    query = torch.stack([a, b], -1).flatten(-2)
    flat = [
        torch.stack(pairs(basis[..., :dims].to(a.dtype), angles.interleaved), -1).transpose(1, 2).flatten(2)
        for _, basis in blocks
    ]
    for samples, start, end in _tiles(batch, tokens, 4 * heads * dims):
        keys = None
        for (coefficient, _), basis in zip(blocks, flat, strict=True):
            part = coefficient[samples, start:end].to(a.dtype)
            product = torch.matmul(part, _of(basis, samples))
            if keys is None:
                keys = product
            else:
                keys[:, : part.shape[1]] += product
        assert keys is not None
        cos, sin = (_of(x, samples).to(a.dtype) for x in per_slot(angles, first + start, first + end))
        turning = torch.view_as_complex(keys.view(*keys.shape[:2], heads, half, 2))
        turning *= torch.complex(cos, sin).unsqueeze(2)
        rows = keys.view(*keys.shape[:2], heads, dims).permute(0, 2, 3, 1)
        out[samples, ..., start:end] = torch.matmul(query[samples], rows)
