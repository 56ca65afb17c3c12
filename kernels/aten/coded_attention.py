"""Scores of coded keys and weighted sums of coded values, tile by tile: no more than a tile is ever decoded.

Where few query rows ask for keys as they are attended, not even a tile is decoded: a byte of several fields

    b = sum over p of f_p 2^(p bits),    (b & mask_p) / 2^(p bits) = f_p

is masked into planes, one per field, and the query is split into the same planes. Scales and zero points then go
where there is less to multiply:

    a scale per token and group of channels    score = sum over groups of scale (q_group . f_group) + zero sum(q_group)
    a scale per channel and group of tokens    score = (q scale_group) . f + q . zero_group

The groups of a token are further query rows, each zero outside its group: a product of several rows takes little longer
than one of a single row. Values likewise, by weights instead of queries. Outliers and residual:
`coded_exceptions.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.coded_exceptions import add_scores, add_values
from attnpack_fx.kernels.aten.coded_rows import Decoder, codebook_table, levels
from attnpack_fx.kernels.parts import Angles, Rows
from attnpack_fx.kernels.rotary import pairs, per_slot

#: Bytes of decoded numbers of one tile: on a CPU the L2 caches of two cores; elsewhere launches cost more than memory.
TILE_BYTES = {"cpu": 2 << 20}
DEVICE_TILE_BYTES = 64 << 20
#: Query rows of a KV head, times groups of a token, up to which planes are faster than decoded tiles.
PLANE_ROWS = 16
#: Least tokens in a row of one group, on average, for which groups are taken one by one.
RUN_TOKENS = 8

#: First token, end and group of tokens in a row that share scales.
_Run = tuple[int, int, int]


def scores(q: Tensor, rows: Rows[Tensor], angles: Angles[Tensor] | None, first: int) -> Tensor:
    """`q . x` of every token, fp32 `[B, H, N, n]`; q `[B, H, N, D]`, scaled; angles: of all slots, these from first."""
    q = q.float()
    if angles is None and _in_planes(rows, q.shape):
        runs = _runs(rows) if rows.form.channel else []
        if runs is not None:
            out = _channel_scores(q, rows, runs) if rows.form.channel else _plane_scores(q, rows)
            return add_scores(out, q, rows)
    decoder, count = Decoder(rows, q.shape[3]), rows.codes.shape[1]
    out = q.new_empty((*q.shape[:3], count))
    for start, end in _tiles(rows, q.shape[3], 2 * len(rows.codes)):
        x = decoder(start, end)
        if angles is not None:
            cos, sin = per_slot(angles, first + start, first + end)
            x = _turned(x, cos.unsqueeze(2).float(), sin.unsqueeze(2).float(), angles.interleaved)
        out[..., start:end] = torch.matmul(q, x.permute(0, 2, 3, 1))
    return out


def weighted(p: Tensor, rows: Rows[Tensor], dim: int) -> Tensor:
    """Sum of rows by weight, fp32 `[B, H, N, D]`; p `[B, H, N, n]`."""
    p = p.float()
    if not rows.form.channel and _in_planes(rows, (*p.shape[:3], dim)):
        return add_values(_plane_values(p, rows, dim), p, rows)
    decoder = Decoder(rows, dim)
    out = p.new_zeros((*p.shape[:3], dim))
    for start, end in _tiles(rows, dim, 2 * len(rows.codes)):
        out += torch.matmul(p[..., start:end], decoder(start, end).transpose(1, 2))
    return out


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`rotate` with no copies but the result; x `[B, k, H, D]`, cos and sin `[B or 1, k, 1, E / 2]`."""
    out, turning = torch.empty_like(x), 2 * cos.shape[-1]
    a, b = pairs(x[..., :turning], interleaved)
    into_a, into_b = pairs(out[..., :turning], interleaved)
    torch.mul(a, cos, out=into_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=into_b).addcmul_(a, sin)
    out[..., turning:] = x[..., turning:]
    return out


def _tiles(rows: Rows[Tensor], dim: int, copies: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of tokens of which so many copies make a tile."""
    tokens, heads = rows.codes.shape[1:3]
    size = max(8, TILE_BYTES.get(rows.codes.device.type, DEVICE_TILE_BYTES) // (4 * heads * dim * copies))
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)


def _in_planes(rows: Rows[Tensor], shape: tuple[int, ...]) -> bool:
    """Whether few rows `[B, H, N, D]` ask, and no byte holds channels of two groups."""
    form = rows.form
    fields = 8 // form.bits if form.bits in (8, 4, 2) and not form.codebook else 1
    whole = shape[3] % fields == 0
    if not form.channel and form.group:
        whole = whole and form.group % fields == 0 and shape[3] % form.group == 0
    groups = 1 if form.channel else rows.scale.shape[-1]
    return whole and shape[2] * groups <= PLANE_ROWS


def _runs(rows: Rows[Tensor]) -> list[list[_Run]] | None:
    """The runs of every sample; None where they are short.

    Reads numbers, for which only a CPU does not have to wait.
    """
    group_of = rows.group_of
    if group_of is None or not group_of.is_cpu:
        return None
    runs = []
    for row in group_of:
        groups, counts = torch.unique_consecutive(row, return_counts=True)
        if len(groups) * RUN_TOKENS > len(row) + RUN_TOKENS:
            return None
        ends = counts.cumsum(0).tolist()
        runs.append(list(zip([0, *ends], ends, groups.tolist(), strict=False)))
    return runs


def _batches(runs: list[_Run], tokens: int, most: int) -> Iterator[list[_Run]]:
    """Neighbours of no more tokens, and no more than so many; or one that has more tokens."""
    batch: list[_Run] = []
    for run in runs:
        if batch and (len(batch) == most or run[1] - batch[0][0] > tokens):
            yield batch
            batch = []
        batch.append(run)
    if batch:
        yield batch


class _Planes:
    """Codes of some tokens of a sample as planes of numbers: plane p has channels p, p + P, ...

    Its numbers are `2 ** (p bits)` times as large as the fields.
    """

    def __init__(self, rows: Rows[Tensor], dim: int) -> None:
        self.rows, self.dim, self.table = rows, dim, codebook_table(rows)
        bits = rows.form.bits
        fields = bits in (4, 2) and self.table is None
        self.masks = [(1 << bits) - 1 << shift for shift in range(0, 8, bits)] if fields else []
        units = [2.0**-shift for shift in range(0, 8, bits)] if fields else [1.0]
        self.units = torch.tensor(units, device=rows.codes.device)

    def __call__(self, sample: int, start: int, end: int) -> list[Tensor]:
        """fp32 `[H, end - start, w]` each, rows of a head far apart: moving them would take longer than products do."""
        codes = self.rows.codes[sample, start:end]
        if not self.masks:
            return [levels(self.rows, codes, self.dim, self.table).transpose(0, 1)]
        planes = codes.new_empty((len(self.masks), *codes.shape))
        for number, mask in enumerate(self.masks):
            torch.bitwise_and(codes, mask, out=planes[number])
        return list(planes.float().transpose(1, 2).unbind())

    def split(self, x: Tensor) -> Tensor:
        """`[..., D]` as `[P, ..., w]`, divided by how much larger the planes' numbers are."""
        return (x.unflatten(-1, (-1, len(self.units))) * self.units).movedim(-1, 0).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """The inverse of how channels are split, with the same division: `[P, ..., w]` to `[..., D]`."""
        return (x.movedim(0, -1) * self.units).flatten(-2)


def _products(queries: Tensor, planes: list[Tensor]) -> Tensor:
    """`[H, rows, k]`: the sum over planes of queries `[P, H, rows, w]` times `[H, k, w]`."""
    total = torch.bmm(queries[0], planes[0].mT)
    for query, plane in zip(queries[1:], planes[1:], strict=True):
        total.baddbmm_(query, plane.mT)
    return total


def _tokens_last(x: Tensor) -> Tensor:
    """`[n, H, ...]` of a sample as fp32 `[H, ..., n]`."""
    # PyTorch transposes matrices block by block, and nothing else.
    return x.flatten(1).t().contiguous().float().view(*x.shape[1:], -1)


def _of_groups(rows: Rows[Tensor], width: int) -> Tensor:
    """Which of `width` bytes belong to which group of channels, `[G, w]` of 0 and 1."""
    count = max(1, rows.scale.shape[-1])
    return torch.eye(count, device=rows.codes.device).repeat_interleave(width // count, 1)


def _plane_scores(q: Tensor, rows: Rows[Tensor]) -> Tensor:
    batch, heads, queries, dim = q.shape
    planes, count = _Planes(rows, dim), rows.codes.shape[1]
    split = planes.split(q)
    own = _of_groups(rows, split.shape[-1])
    groups = len(own)
    split = (split.unsqueeze(-2) * own).flatten(3, 4)
    out = q.new_empty((batch, heads, queries, count))
    for sample in range(batch):
        found = q.new_empty((heads, queries * groups, count))
        for start, end in _tiles(rows, dim):
            found[..., start:end] = _products(split[:, sample], planes(sample, start, end))
        found = found.view(heads, queries, groups, count)
        if rows.scale.shape[-1]:
            found *= _tokens_last(rows.scale[sample]).unsqueeze(1)
        torch.sum(found, 2, out=out[sample])
        if rows.zero is not None:
            sums = q[sample].unflatten(2, (groups, -1)).sum(-1)
            out[sample].baddbmm_(sums, _tokens_last(rows.zero[sample]))
        if rows.norm is not None:
            out[sample] *= _tokens_last(rows.norm[sample]).unsqueeze(1)
    return out


def _plane_values(p: Tensor, rows: Rows[Tensor], dim: int) -> Tensor:
    batch, heads, queries, _ = p.shape
    planes = _Planes(rows, dim)
    groups = max(1, rows.scale.shape[-1])
    width = dim // len(planes.units)
    found = p.new_zeros((len(planes.units), batch, heads, queries * groups, width))
    zeros = []
    for sample in range(batch):
        weights = p[sample]
        if rows.norm is not None:
            weights = weights * _tokens_last(rows.norm[sample]).unsqueeze(1)
        if rows.zero is not None:
            zeros.append(torch.bmm(weights, _tokens_last(rows.zero[sample]).mT))
        if rows.scale.shape[-1]:
            weights = (weights.unsqueeze(2) * _tokens_last(rows.scale[sample]).unsqueeze(1)).flatten(1, 2)
        for start, end in _tiles(rows, dim):
            for plane, numbers in zip(found[:, sample], planes(sample, start, end), strict=True):
                plane.baddbmm_(weights[..., start:end], numbers)
    # Of the row of a group only its own channels count.
    own = (found.unflatten(3, (queries, groups)) * _of_groups(rows, width)).sum(-2)
    out = planes.join(own)
    return out + torch.stack(zeros).repeat_interleave(dim // groups, 3) if zeros else out


def _channel_scores(q: Tensor, rows: Rows[Tensor], runs: list[list[_Run]]) -> Tensor:
    batch, heads, queries, dim = q.shape
    planes, size = _Planes(rows, dim), next(_tiles(rows, dim))[1]
    assert rows.group_of is not None
    out = q.new_empty((batch, heads, queries, rows.codes.shape[1]))
    together = max(1, PLANE_ROWS // queries)
    for sample, ranges in enumerate(runs):
        for some in _batches(ranges, size, together):
            groups = torch.tensor([group for _, _, group in some])
            scale = rows.scale[sample].index_select(0, groups).float().transpose(0, 1)
            # Every group is asked by query rows of its own, and they ask the others in vain.
            turned = planes.split((q[sample].unsqueeze(1) * scale.unsqueeze(2)).flatten(1, 2))
            for start in range(some[0][0], some[-1][1], size):
                end = min(start + size, some[-1][1])
                found = _products(turned, planes(sample, start, end)).unflatten(1, (-1, queries))
                for number, (first, last, _) in enumerate(some):
                    first, last = max(first, start), min(last, end)
                    out[sample, ..., first:last] = found[:, number, :, first - start : last - start]
    if rows.zero is not None:
        of_groups = torch.matmul(q, rows.zero.float().permute(0, 2, 3, 1))
        out += of_groups.gather(3, rows.group_of.long()[:, None, None].expand(*out.shape))
    if rows.norm is not None:
        out *= rows.norm.float().transpose(1, 2).unsqueeze(2)
    return out
