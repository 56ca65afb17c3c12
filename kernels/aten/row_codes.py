"""Dense tokens coded as `Rows` (`kernels/parts.py`): integers, floats of eight bits, codebooks, and what is left out.

Rows are `[B, n, H, D]`. A token whose numbers are all zero is filler: it has no part in any range, and what it is read
as is for who reads it to mask. Ranges and codes are computed in fp32; scales and zero points have the rows' dtype, and
codes are those nearest for the scale as it is stored.

`Grouping` says which numbers share a scale. A mask `left_out`, bool `[B, n, H, D]`, names outliers: they have no part
in ranges either, and `keep_outliers` stores them beside the codes.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpack_fx.kernels.linalg import require_finite
from attnpack_fx.kernels.parts import E4M3, E5M2, RowForm, Rows

#: Formats of integers: bits of an unsigned field.
INTEGERS = (8, 4, 2)
FLOATS = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
#: What a group's largest magnitude becomes: of the largest mantissa. With five bits of exponent the largest number
#: itself would leave fp16 scales of few bits, and lose numbers below 1e-3.
REACH = {E4M3: 448.0, E5M2: 1.75}


@dataclass(frozen=True)
class Grouping:
    """Which numbers share a scale: `size` channels of one token; with `channel`, every channel of `size` tokens.

    The last group is shorter where sizes do not divide.
    """

    size: int
    channel: bool = False

    def within(self, rows: Tensor) -> "Grouping":
        """The same for rows that may be smaller than a group."""
        return replace(self, size=max(1, min(self.size, rows.shape[1 if self.channel else 3])))

    def folded(self, x: Tensor, padding: float) -> Tensor:
        """`[B, n, H, D]` as groups, numbers last: `[B, n, H, G, size]`, with `channel` `[B, G, H, D, size]`."""
        size = self.size
        if not self.channel:
            return F.pad(x, (0, -x.shape[3] % size), value=padding).unflatten(3, (-(-x.shape[3] // size), size))
        padded = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size), value=padding)
        return padded.unflatten(1, (-(-x.shape[1] // size), size)).movedim(2, -1)

    def spread(self, shared: Tensor, rows: Tensor) -> Tensor:
        """One number a group for every number of the rows, `[B, n, H, D]`."""
        if self.channel:
            return shared.repeat_interleave(self.size, 1)[:, : rows.shape[1]]
        return shared.repeat_interleave(self.size, 3)[..., : rows.shape[3]]

    def group_of(self, rows: Tensor) -> Tensor | None:
        """As `Rows.group_of`."""
        if not self.channel:
            return None
        groups = torch.arange(rows.shape[1], device=rows.device, dtype=torch.int32) // self.size
        return groups.expand(rows.shape[0], -1).contiguous()


def real(rows: Tensor) -> Tensor:
    """Which tokens are no filler: bool `[B, n, 1, 1]`."""
    return (rows != 0).flatten(2).any(2)[:, :, None, None]


def bounds(rows: Tensor, grouping: Grouping, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Least and greatest number of every group, fp32, shaped as `Rows.scale`; 0 for groups of nothing.

    Raises `ValueError` for NaN or Inf.
    """
    require_finite(rows, "rows")
    grouping = grouping.within(rows)
    counted = real(rows)
    if left_out is not None:
        counted = counted & ~left_out
    x = rows.float()
    low = grouping.folded(x.masked_fill(~counted, torch.inf), torch.inf).amin(-1)
    high = grouping.folded(x.masked_fill(~counted, -torch.inf), -torch.inf).amax(-1)
    empty = low > high
    return low.masked_fill_(empty, 0), high.masked_fill_(empty, 0)


def uniform(rows: Tensor, bits: int, grouping: Grouping, left_out: Tensor | None = None) -> Rows[Tensor]:
    """Asymmetric integers of 8, 4 or 2 bits: `x ~ q scale + zero`, zero the group's least number.

        scale = (max - min) / (2^bits - 1)        q = round((x - zero) / scale), within 0 .. 2^bits - 1

    Raises `ValueError` for other bits, and for NaN or Inf.
    """
    _check(bits, INTEGERS)
    low, high = bounds(rows, grouping, left_out)
    grouping, top = grouping.within(rows), 2**bits - 1
    # In float64: a difference of fp32 numbers may be beyond fp32.
    zero, scale = low.to(rows.dtype), ((high.double() - low.double()) / top).to(rows.dtype)
    fields = _normalised(rows, scale, zero, grouping).round_().clamp_(0, top).to(torch.uint8)
    return _coded(rows, _packed(fields, bits), bits, grouping, scale, zero)


def symmetric(rows: Tensor, bits: int, grouping: Grouping, left_out: Tensor | None = None) -> Rows[Tensor]:
    """Signed integers of 8, 4 or 2 bits without a zero point, as a codebook of levels: `x ~ level scale`.

    Levels are -128 .. 127, -8 .. 7, or with 2 bits -3/2 .. 3/2. The scale takes the group's largest magnitude to the
    lowest level: it is negative where that number is positive, so that the side with one level more gets it.

    Raises `ValueError` for other bits, and for NaN or Inf.
    """
    _check(bits, INTEGERS)
    low, high = bounds(rows, grouping, left_out)
    grouping, half = grouping.within(rows), 2 ** (bits - 1)
    levels = torch.arange(-half, half, device=rows.device, dtype=torch.float32) + (0.5 if bits == 2 else 0)
    scale = (torch.where(high > -low, high, low) / (0.5 * (bits == 2) - half)).to(rows.dtype)
    fields = _nearest(_normalised(rows, scale, None, grouping), levels)
    return _coded(rows, _packed(fields, bits), bits, grouping, scale, codebook=levels)


def float8(rows: Tensor, form: int, grouping: Grouping, left_out: Tensor | None = None) -> Rows[Tensor]:
    """Floats of eight bits, `form` `E4M3` or `E5M2`: `x ~ number scale`, the largest magnitude to `REACH`.

    Raises `ValueError` for other formats, and for NaN or Inf.
    """
    _check(form, tuple(FLOATS))
    low, high = bounds(rows, grouping, left_out)
    grouping, reach = grouping.within(rows), REACH[form]
    scale = (torch.maximum(high, -low) / reach).to(rows.dtype)
    # Beyond the largest number, where a rounded scale may lead, the conversion makes NaN.
    numbers = _normalised(rows, scale, None, grouping).clamp_(-reach, reach)
    return _coded(rows, numbers.to(FLOATS[form]).view(torch.uint8), form, grouping, scale)


def by_codebook(rows: Tensor, codebook: Tensor, low: Tensor, high: Tensor, grouping: Grouping) -> Rows[Tensor]:
    """Codes of the nearest levels of a codebook, fp32 `[2^bits]`, ascending, which spans [-1, 1] = [low, high].

        x ~ level scale + zero        scale = (high - low) / 2        zero = (high + low) / 2

    low, high: thresholds, fp32, shaped as `Rows.scale`. Numbers beyond them get the outermost level.

    Raises `ValueError` for a codebook of other than 4, 16 or 256 levels, and for NaN or Inf.
    """
    bits = codebook.shape[0].bit_length() - 1
    if codebook.dim() != 1 or codebook.shape[0] != 2**bits or bits not in INTEGERS:
        raise ValueError(f"codebook: got shape {list(codebook.shape)}, expected [4], [16] or [256] levels")
    require_finite(rows, "rows")
    grouping = grouping.within(rows)
    zero, scale = (low / 2 + high / 2).to(rows.dtype), (high / 2 - low / 2).to(rows.dtype)
    codebook = codebook.to(rows.device)
    fields = _nearest(_normalised(rows, scale, zero, grouping), codebook)
    return _coded(rows, _packed(fields, bits), bits, grouping, scale, zero, codebook)


def extremes(rows: Tensor, share: float, channel: bool) -> Tensor:
    """The outermost numbers of every vector, as many lowest as highest: bool `[B, n, H, D]`, False for filler.

    A vector is what one channel is over all tokens, or one token over all heads and channels. Of its N numbers (of
    tokens that are no filler), `round(share N / 2)` on each side are taken; ties may let both sides take the same.
    """
    require_finite(rows, "rows")
    x, alive = rows.float().flatten(2), real(rows)[..., 0]
    dim = 1 if channel else 2
    size = x.shape[dim]
    # Counts per sample, without a look at the device.
    count = alive.sum(1, keepdim=True) if channel else torch.full_like(alive, size, dtype=torch.long)
    taken = (count * (share / 2) + 0.5).floor()
    most = min(int(size * (share / 2) + 0.5), size)
    order = torch.arange(most, device=rows.device)
    inside = (order[None, :, None] if channel else order) < taken
    found = torch.zeros_like(x, dtype=torch.bool)
    for largest, filler in ((True, -torch.inf), (False, torch.inf)):
        place = x.masked_fill(~alive, filler).topk(most, dim, largest).indices
        found |= torch.zeros_like(found).scatter_(dim, place, inside.expand_as(place))
    return (found & alive).view_as(rows)


def keep_outliers(coded: Rows[Tensor], rows: Tensor, left_out: Tensor) -> Rows[Tensor]:
    """The same rows with the numbers where `left_out` is True kept as they are. Waits for the device, to count them.

    Raises `ValueError` where places do not fit 32 bits.
    """
    batch, numbers = rows.shape[0], rows[:1].numel()
    if numbers >= 2**31:
        raise ValueError(
            f"outliers: got {numbers} numbers a sample, expected fewer than 2^31, which int32 places can name; "
            "code fewer tokens at once"
        )
    marked = left_out.flatten(1)
    sample, place = marked.nonzero(as_tuple=True)
    count = marked.sum(1)
    most = int(count.max()) if batch else 0
    column = torch.arange(place.shape[0], device=rows.device) + (most - count.cumsum(0))[sample]
    places = torch.full((batch, most), -1, dtype=torch.int32, device=rows.device)
    places[sample, column] = place.int()
    outliers = rows.new_zeros(batch, most)
    outliers[sample, column] = rows.flatten(1)[sample, place]
    return replace(coded, form=replace(coded.form, outliers=True), outliers=outliers, places=places)


def _check(form: int, allowed: tuple[int, ...]) -> None:
    if form not in allowed:
        raise ValueError(f"bits: got {form!r}, expected one of {', '.join(map(str, allowed))}")


def _normalised(rows: Tensor, scale: Tensor, zero: Tensor | None, grouping: Grouping) -> Tensor:
    """(x - zero) / scale in fp32, of the scale and zero point as they are stored; a scale of 0 counts as 1."""
    x = rows.float() if zero is None else rows.float() - grouping.spread(zero.float(), rows)
    return x / grouping.spread(scale.float().masked_fill(scale == 0, 1), rows)


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The number of the nearest level, uint8, as `x`."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


def _packed(fields: Tensor, bits: int) -> Tensor:
    """uint8 fields `[..., D]` as `[..., ceil(D bits / 8)]`, the first in a byte's low bits; spare bits are zero."""
    together = 8 // bits
    fields = F.pad(fields, (0, -fields.shape[-1] % together))
    packed = fields[..., ::together].clone()
    for place in range(1, together):
        packed |= fields[..., place::together] << bits * place
    return packed


def _coded(
    rows: Tensor,
    codes: Tensor,
    bits: int,
    grouping: Grouping,
    scale: Tensor,
    zero: Tensor | None = None,
    codebook: Tensor | None = None,
) -> Rows[Tensor]:
    group = 0 if grouping.channel else grouping.size
    form = RowForm(bits, grouping.channel, group, zero is not None, codebook is not None)
    return Rows(form, codes, scale, zero, grouping.group_of(rows), codebook)
