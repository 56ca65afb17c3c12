"""Scores of coded keys and weighted sums of coded values, tile by tile: no more than a tile is ever decoded.

Where few query rows ask, and rows are fields and scales alone, not even a tile is: a byte of several fields

    b = sum over p of f_p 2^(p bits),    (b & mask_p) / 2^(p bits) = f_p

is masked into planes, one per field, and the query is split into the same planes. Scales and zero points then go
where there is less to multiply:

    a scale per token and group of channels    score = sum over groups of scale (q_group . f_group) + zero sum(q_group)
    a scale per channel and group of tokens    score = (q scale_group) . f + q . zero_group

The groups of a token are further query rows, each zero outside its group: a product of several rows takes little longer
than one of a single row. Values likewise, by weights instead of queries.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.coded_rows import Decoder, codebook_table, levels
from attnpack_fx.kernels.aten.rotary import Rotary, per_slot, rotate
from attnpack_fx.kernels.parts import Rows

#: Bytes of decoded numbers of one tile, on a CPU: about its L2 cache. Elsewhere launches cost more than memory.
TILE_BYTES = {"cpu": 1 << 20}
DEVICE_TILE_BYTES = 64 << 20
#: Query rows of a KV head, times groups of a token, up to which planes are faster than decoded tiles.
PLANE_ROWS = 16
#: Least tokens in a row of one group, on average, for which groups are taken one by one.
RUN_TOKENS = 8


def scores(q: Tensor, rows: Rows[Tensor], rotary: Rotary | None, first: int) -> Tensor:
    """`q . x` of every token, fp32 `[B, H, N, n]`; q `[B, H, N, D]`, scaled; rotary: of all slots, these from first."""
    q = q.float()
    if rotary is None and _in_planes(rows, q.shape):
        runs = _runs(rows)
        if runs is not None:
            return _channel_scores(q, rows, runs)
        if not rows.form.channel:
            return _plane_scores(q, rows)
    decoder, count = Decoder(rows, q.shape[3]), rows.codes.shape[1]
    out = q.new_empty((*q.shape[:3], count))
    for start, end in _tiles(rows, q.shape[3]):
        x = decoder(start, end)
        if rotary is not None:
            cos, sin = per_slot(rotary, first + start, first + end)
            x = rotate(x, cos[:, :, None].float(), sin[:, :, None].float(), rotary.interleaved)
        out[..., start:end] = torch.matmul(q, x.permute(0, 2, 3, 1))
    return out


def weighted(p: Tensor, rows: Rows[Tensor], dim: int) -> Tensor:
    """Sum of rows by weight, fp32 `[B, H, N, D]`; p `[B, H, N, n]`."""
    p = p.float()
    if not rows.form.channel and _in_planes(rows, (*p.shape[:3], dim)):
        return _plane_values(p, rows, dim)
    decoder = Decoder(rows, dim)
    out = p.new_zeros((*p.shape[:3], dim))
    for start, end in _tiles(rows, dim):
        out += torch.matmul(p[..., start:end], decoder(start, end).transpose(1, 2))
    return out


def _tiles(rows: Rows[Tensor], dim: int) -> Iterator[tuple[int, int]]:
    batch, tokens, heads = rows.codes.shape[:3]
    size = max(8, TILE_BYTES.get(rows.codes.device.type, DEVICE_TILE_BYTES) // (4 * batch * heads * dim))
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)


def _in_planes(rows: Rows[Tensor], shape: tuple[int, ...]) -> bool:
    """Whether few rows `[B, H, N, D]` ask for what is fields and scales alone."""
    form = rows.form
    fields = 8 // form.bits if form.bits in (8, 4, 2) and not form.codebook else 1
    whole = shape[3] % fields == 0 and (
        form.channel or (form.group % fields == 0 and shape[3] % max(form.group, 1) == 0)
    )
    groups = 1 if form.channel else rows.scale.shape[-1]
    return whole and not form.outliers and not form.rank and shape[2] * groups <= PLANE_ROWS


def _runs(rows: Rows[Tensor]) -> list[list[tuple[int, int, int]]] | None:
    """Of every sample, first token, end and group of tokens in a row that share scales; None where those are short.

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


class _Planes:
    """Codes `[B, H, k, w]` of a tile as planes of numbers, fp32 `[P, B, H, k, w]`: plane p has channels p, p + P, ...

    Its numbers are `2 ** (p bits)` times as large as the fields.
    """

    def __init__(self, rows: Rows[Tensor], dim: int) -> None:
        self.rows, self.dim, self.table = rows, dim, codebook_table(rows)
        bits = rows.form.bits
        fields = bits in (4, 2) and self.table is None
        self.masks = [(1 << bits) - 1 << shift for shift in range(0, 8, bits)] if fields else []
        units = [2.0**-shift for shift in range(0, 8, bits)] if fields else [1.0]
        self.units = torch.tensor(units, device=rows.codes.device)

    def __call__(self, codes: Tensor) -> Tensor:
        """codes `[B, k, H, w]`."""
        if not self.masks:
            return levels(self.rows, codes, self.dim, self.table).transpose(1, 2)[None]
        batch, tokens, heads, width = codes.shape
        planes = codes.new_empty((len(self.masks), batch, heads, tokens, width))
        for plane, mask in zip(planes, self.masks, strict=True):
            torch.bitwise_and(codes.transpose(1, 2), mask, out=plane)
        return planes.float()

    def split(self, x: Tensor) -> Tensor:
        """`[..., D]` as `[P, ..., w]`, divided by how much larger the planes' numbers are."""
        planes = x.unflatten(-1, (-1, len(self.units))) * self.units
        return planes.movedim(-1, 0)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of how channels are split, with the same division: `[P, ..., w]` to `[..., D]`."""
        return (x.movedim(0, -1) * self.units).flatten(-2)


def _tokens_last(x: Tensor) -> Tensor:
    """`[B, n, H, G]` as fp32 `[B, H, G, n]`."""
    return x.float().permute(0, 2, 3, 1)


def _groups(rows: Rows[Tensor], width: int) -> Tensor:
    """Which of `width` bytes belong to which group of channels, `[G, w]` of 0 and 1."""
    count = max(1, rows.scale.shape[-1])
    return torch.eye(count, device=rows.codes.device).repeat_interleave(width // count, 1)


def _plane_scores(q: Tensor, rows: Rows[Tensor]) -> Tensor:
    batch, heads, queries, dim = q.shape
    planes, count = _Planes(rows, dim), rows.codes.shape[1]
    split = planes.split(q)
    ones = _groups(rows, split.shape[-1])
    groups = len(ones)
    split = (split.unsqueeze(-2) * ones).flatten(0, 2).flatten(1, 2)
    out = q.new_empty((batch, heads, queries * groups, count))
    for start, end in _tiles(rows, dim):
        tile = planes(rows.codes[:, start:end])
        part = torch.bmm(split, tile.flatten(0, 2).mT).view(tile.shape[0], batch, heads, -1, end - start)
        torch.sum(part, 0, out=out[..., start:end])
    out = out.view(batch, heads, queries, groups, count)
    if rows.scale.shape[-1]:
        out = (out * _tokens_last(rows.scale).unsqueeze(2)).sum(3)
        if rows.zero is not None:
            out += torch.matmul(q.unflatten(3, (groups, -1)).sum(-1), _tokens_last(rows.zero))
    else:
        out = out[:, :, :, 0]
    if rows.norm is not None:
        out *= rows.norm.float().transpose(1, 2).unsqueeze(2)
    return out


def _plane_values(p: Tensor, rows: Rows[Tensor], dim: int) -> Tensor:
    batch, heads, queries, _ = p.shape
    planes = _Planes(rows, dim)
    if rows.norm is not None:
        p = p * rows.norm.float().transpose(1, 2).unsqueeze(2)
    weights = p.unsqueeze(3)
    if rows.scale.shape[-1]:
        weights = weights * _tokens_last(rows.scale).unsqueeze(2)
    groups = weights.shape[3]
    weights = weights.flatten(0, 1).flatten(1, 2)
    out = None
    for start, end in _tiles(rows, dim):
        tile = planes(rows.codes[:, start:end]).flatten(1, 2)
        if out is None:
            out = p.new_zeros((tile.shape[0], batch * heads, queries * groups, tile.shape[3]))
        for plane, numbers in zip(out, tile, strict=True):
            plane.baddbmm_(weights[..., start:end], numbers)
    assert out is not None
    # Of the row of a group only its own channels count.
    own = (out.view(len(out), batch, heads, queries, groups, -1) * _groups(rows, out.shape[-1])).sum(-2)
    total = planes.join(own)
    if rows.zero is not None:
        total += torch.matmul(p, _tokens_last(rows.zero).mT).repeat_interleave(dim // groups, 3)
    return total


def _channel_scores(q: Tensor, rows: Rows[Tensor], runs: list[list[tuple[int, int, int]]]) -> Tensor:
    batch, heads, queries, dim = q.shape
    planes, count = _Planes(rows, dim), rows.codes.shape[1]
    assert rows.group_of is not None
    split, out = planes.split(q).contiguous(), q.new_empty((batch, heads, queries, count))
    plain = torch.ones_like(planes.units)
    scales = (rows.scale.float().unflatten(-1, (-1, len(plain)))).movedim(-1, 2).contiguous()
    size = max(8, next(_tiles(rows, dim))[1])
    for sample, ranges in enumerate(runs):
        for first, last, group in ranges:
            # [P, H, N, w] by [P, H, 1, w].
            turned = (split[:, sample] * scales[sample, group].unsqueeze(2)).flatten(0, 1)
            for start in range(first, last, size):
                end = min(start + size, last)
                tile = planes(rows.codes[sample : sample + 1, start:end])
                part = torch.bmm(turned, tile.flatten(0, 2).mT).view(len(plain), heads, queries, -1)
                torch.sum(part, 0, out=out[sample, ..., start:end])
    if rows.norm is not None:
        out *= rows.norm.float().transpose(1, 2).unsqueeze(2)
    if rows.zero is not None:
        zero = torch.matmul(q, rows.zero.float().permute(0, 2, 3, 1))
        where = rows.group_of.long()[:, None, None].expand(*out.shape)
        found = zero.gather(3, where)
        if rows.norm is not None:
            found *= rows.norm.float().transpose(1, 2).unsqueeze(2)
        out += found
    return out
