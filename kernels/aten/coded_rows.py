"""Blocks of `Rows`: codes turned into numbers a range of tokens at a time, tokens added, tokens selected.

x[t, h] = norm[t, h] (level(codes[t, h]) scale + zero), outliers put in, + left[t, h] right[part_of[t], h]
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpack_fx.kernels.aten.codes import FLOAT_TOP, from_float8, look_up, tabulate, unsigned
from attnpack_fx.kernels.parts import Rows

#: Tensors with an entry per token; scale and zero are too, unless tokens share them.
_PER_TOKEN = ("codes", "group_of", "left", "part_of", "norm")
#: Tensors with an entry per group of tokens or part.
_PER_GROUP = ("scale", "zero", "right")


def room(rows: Rows[Tensor]) -> int:
    """How many numbers a row of codes has room for: what `places` counts as D."""
    bits = rows.form.bits
    return rows.codes.shape[-1] * (8 // bits if bits in (8, 4, 2) else 1)


def levels(rows: Rows[Tensor], codes: Tensor, dim: int, table: Tensor | None) -> Tensor:
    """What codes `[..., H, w]` of these rows stand for: new fp32 `[..., H, D]`. table: of `codebook_table`."""
    bits = rows.form.bits
    if table is not None:
        return look_up(codes, dim, bits, table)
    if not bits:
        return codes.to(torch.float32, copy=True)
    return from_float8(codes, bits) if bits in FLOAT_TOP else unsigned(codes, dim, bits)


def codebook_table(rows: Rows[Tensor]) -> Tensor | None:
    return None if rows.codebook is None else tabulate(rows.codebook.float(), rows.form.bits)


class Decoder:
    """Rows as numbers, any range of tokens at a time."""

    def __init__(self, rows: Rows[Tensor], dim: int) -> None:
        self.rows, self.dim = rows, dim
        self.table = codebook_table(rows)

    def __call__(self, first: int, end: int) -> Tensor:
        """Tokens first .. end - 1, fp32 `[B, end - first, H, D]`."""
        rows, form = self.rows, self.rows.form
        x = levels(rows, rows.codes[:, first:end], self.dim, self.table)
        if form.channel:
            assert rows.group_of is not None
            group_of = rows.group_of[:, first:end]
            x *= _of_tokens(rows.scale, group_of)
            if rows.zero is not None:
                x += _of_tokens(rows.zero, group_of)
        elif rows.scale.shape[-1]:
            self._scaled(x, rows.scale[:, first:end], None if rows.zero is None else rows.zero[:, first:end])
        if rows.norm is not None:
            x *= rows.norm[:, first:end, :, None]
        if rows.outliers is not None:
            x = self._with_outliers(x, first, end)
        if rows.left is not None and rows.right is not None and rows.part_of is not None:
            part_of = rows.part_of[:, first:end]
            for column in range(form.rank):
                right = _of_tokens(rows.right[:, :, :, column], part_of)
                x.addcmul_(right.float(), rows.left[:, first:end, :, column, None].float())
        return x

    def _scaled(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """x times scale plus zero in place, `[B, k, H, D]` and `[B, k, H, G]`."""
        group = self.rows.form.group
        for first, count in ((0, self.dim // group), (self.dim // group * group, -(-(self.dim % group) // group))):
            if count:
                size = min(group, self.dim - first)
                part = x[..., first : first + count * size].unflatten(-1, (count, size))
                which = slice(first // group, first // group + count)
                part *= scale[..., which, None]
                if zero is not None:
                    part += zero[..., which, None]

    def _with_outliers(self, x: Tensor, first: int, end: int) -> Tensor:
        rows = self.rows
        assert rows.places is not None and rows.outliers is not None
        width = x.shape[2] * room(rows)
        low, high = first * width, end * width
        places, outliers = rows.places, rows.outliers
        if places.is_cpu and places.shape[1]:
            # They ascend: those of these tokens are neighbours. Elsewhere that would have to wait for the device.
            ends = torch.searchsorted(places, torch.tensor([[low, high]] * len(places), dtype=places.dtype))
            start, stop = int(ends[:, 0].min()), int(ends[:, 1].max())
            places, outliers = places[:, start:stop], outliers[:, start:stop]
        if not places.shape[1]:
            return x
        numbers = x.shape[1] * x.shape[2] * x.shape[3]
        local = torch.where((places >= low) & (places < high), places - low, numbers).long()
        return F.pad(x.flatten(1), (0, 1)).scatter_(1, local, outliers.float())[:, :numbers].view(x.shape)


def decode(rows: Rows[Tensor], dim: int) -> Tensor:
    """All tokens, fp32 `[B, n, H, D]`."""
    return Decoder(rows, dim)(0, rows.codes.shape[1])


def extend(old: Rows[Tensor], new: Rows[Tensor]) -> Rows[Tensor]:
    """Tokens of a later flush behind those there are, both of one form and codebook."""
    if old.form != new.form:
        raise ValueError(f"rows to add: got {new.form}, expected {old.form}; code every flush of a tensor alike")
    if old.codebook is not None and old.codebook is not new.codebook:
        assert new.codebook is not None
        if old.codebook.shape != new.codebook.shape or not torch.equal(old.codebook, new.codebook):
            raise ValueError("rows to add: got another codebook, expected the same; find it once for a tensor")
    tensors: dict[str, Any] = {}
    for name in (*_PER_TOKEN, *_PER_GROUP):
        first, second = getattr(old, name), getattr(new, name)
        if first is not None:
            after = {"group_of": old.scale, "part_of": old.right}.get(name)
            tensors[name] = torch.cat([first, second if after is None else second + after.shape[1]], 1)
    if old.places is not None and old.outliers is not None:
        assert new.places is not None and new.outliers is not None
        passed = old.codes.shape[1] * old.codes.shape[2] * room(old)
        later = torch.where(new.places < 0, -1, new.places + passed)
        tensors |= _ascending(torch.cat([old.places, later], 1), torch.cat([old.outliers, new.outliers], 1))
    return dataclasses.replace(old, **tensors)


def select(rows: Rows[Tensor], slots: Tensor) -> Rows[Tensor]:
    """Some of the tokens, in another order: slots int64 `[B, k]`, none twice, -1 for filler, which is token 0 then.

    Groups and parts stay, also those that no token belongs to any more.
    """
    index = slots.clamp(min=0)
    names = _PER_TOKEN if rows.form.channel else (*_PER_TOKEN, "scale", "zero")
    tensors: dict[str, Any] = {
        name: _gathered(tensor, index) for name in names if (tensor := getattr(rows, name)) is not None
    }
    if rows.places is not None and rows.outliers is not None:
        batch, tokens, heads = rows.codes.shape[:3]
        width = heads * room(rows)
        # Where every token goes; filler says so about one behind the last.
        goes = slots.new_full((batch, tokens + 1), -1)
        goes.scatter_(
            1, torch.where(slots < 0, tokens, slots), torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
        )
        goes[:, -1] = -1
        token = torch.where(rows.places < 0, tokens, rows.places.div(width, rounding_mode="floor"))
        target = goes.gather(1, token.long())
        places = torch.where(target < 0, -1, target * width + rows.places % width).to(rows.places.dtype)
        tensors |= _ascending(places, rows.outliers)
    return dataclasses.replace(rows, **tensors)


def _of_tokens(x: Tensor, which: Tensor) -> Tensor:
    """x `[B, m, H, D]` of the group or part that each token belongs to, `[B, k, H, D]`."""
    if x.shape[0] > 1:
        which = which + torch.arange(x.shape[0], dtype=which.dtype, device=which.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, which.flatten()).view(*which.shape, *x.shape[2:])


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """`x[b, index[b]]` along dim 1."""
    whole = index.view(*index.shape, *[1] * (x.dim() - 2))
    return x.gather(1, whole.expand(-1, -1, *x.shape[2:]))


def _ascending(places: Tensor, outliers: Tensor) -> dict[str, Tensor]:
    """Outliers in order, as many columns as the sample with the most has."""
    places, order = places.sort(dim=1, stable=True)
    count = int((places >= 0).sum(1).max()) if places.numel() else 0
    first = places.shape[1] - count
    # A copy: of one sample, the part is contiguous, and would keep the places of those that are gone.
    kept = places[:, first:].clone(memory_format=torch.contiguous_format)
    return {"places": kept, "outliers": outliers.gather(1, order[:, first:])}
