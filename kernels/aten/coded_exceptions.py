"""What `Rows` hold besides codes and scales, in attention: outliers and the low-rank residual, never added to rows.

An outlier at (t, h, d) changes one score by `q_d (outlier - what the code says)`, and one number of the output by the
token's weight times that. The residual is absorbed as low-rank segments are:

    score += (q right[part]^T) left^T        out += (sum over the tokens of a part of p left) right[part]
"""

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.codes import FLOAT_TOP, from_float8
from attnpack_fx.kernels.parts import Rows


def add_scores(scores: Tensor, q: Tensor, rows: Rows[Tensor]) -> Tensor:
    """scores `[B, H, N, n]` of codes and scales, changed in place; q `[B, H, N, D]`; fp32."""
    heads, queries, dim = q.shape[1:]
    for sample, out in enumerate(scores):
        if rows.outliers is not None:
            row, channel, difference = _differences(rows, sample, dim)
            # By row of codes, token and head; heads of a token are neighbours there.
            place = row % heads * dim + channel
            for number in range(queries):
                change = q[sample, :, number].flatten().index_select(0, place).mul_(difference)
                added = change.new_zeros(rows.codes.shape[1] * heads).index_add_(0, row, change)
                out[:, number] += added.view(-1, heads).T
        if rows.left is not None and rows.right is not None and rows.part_of is not None:
            left, right = rows.left[sample].float(), rows.right[sample].float()
            latent = torch.matmul(q[sample], right.mT)
            of_tokens = latent.index_select(0, rows.part_of[sample])
            out += (of_tokens * left.unsqueeze(2)).sum(-1).permute(1, 2, 0)
    return scores


def add_values(values: Tensor, p: Tensor, rows: Rows[Tensor]) -> Tensor:
    """values `[B, H, N, D]` of codes and scales, changed in place; p `[B, H, N, n]`; fp32."""
    heads, queries, dim = values.shape[1:]
    for sample, out in enumerate(values):
        if rows.outliers is not None:
            row, channel, difference = _differences(rows, sample, dim)
            place = row % heads * dim + channel
            for number in range(queries):
                change = p[sample, :, number].T.flatten().index_select(0, row).mul_(difference)
                added = change.new_zeros(heads * dim).index_add_(0, place, change)
                out[:, number] += added.view(heads, dim)
        if rows.left is not None and rows.right is not None and rows.part_of is not None:
            left, right = rows.left[sample].float(), rows.right[sample].float()
            weighted = p[sample].permute(2, 0, 1).unsqueeze(3) * left.unsqueeze(2)
            latent = weighted.new_zeros((len(right), *weighted.shape[1:]))
            latent.index_add_(0, rows.part_of[sample], weighted)
            out += torch.matmul(latent, right).sum(0)
    return values


def _differences(rows: Rows[Tensor], sample: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a sample's outliers, row of codes `t H + h`, channel, and how far the code is from the number, 0 for none."""
    assert rows.places is not None and rows.outliers is not None
    form, heads = rows.form, rows.codes.shape[2]
    place = rows.places[sample].clamp(min=0)
    row, channel = place.div(dim, rounding_mode="floor"), place % dim
    fields = 8 // form.bits if form.bits in (8, 4, 2) else 1
    byte = channel if fields == 1 else channel.div(fields, rounding_mode="floor")
    code = _at(rows.codes[sample], row * rows.codes.shape[3] + byte)
    if form.bits in (8, 4, 2):
        field = code.int() >> channel % fields * form.bits & (1 << form.bits) - 1
        level = field.float()
        if rows.codebook is not None:
            books = rows.codebook.view(-1, 2**form.bits)
            level = _at(books.float(), field if len(books) == 1 else field + row % heads * 2**form.bits)
    else:
        level = from_float8(code, form.bits) if form.bits in FLOAT_TOP else code.float()
    if form.channel:
        assert rows.group_of is not None
        token = row.div(heads, rounding_mode="floor")
        scaled = (_at(rows.group_of[sample], token) * heads + row % heads) * dim + channel
    elif form.group:
        scaled = row * rows.scale.shape[3] + channel.div(form.group, rounding_mode="floor")
    if form.channel or form.group:
        level *= _at(rows.scale[sample], scaled)
        if rows.zero is not None:
            level += _at(rows.zero[sample], scaled)
    if rows.norm is not None:
        level *= _at(rows.norm[sample], row)
    difference = rows.outliers[sample].float() - level
    return row, channel, difference.masked_fill_(rows.places[sample] < 0, 0)


def _at(x: Tensor, places: Tensor) -> Tensor:
    return x.flatten().index_select(0, places)
