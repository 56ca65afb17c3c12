"""Low-rank factors in 8, 4 or 2 bits: a component has a scale for its column of coefficients and one for its basis row.

Every number is a signed field of `bits` bits times a scale; a byte holds 8 / bits of them, the first in its low bits,
consecutive along the last dimension:

    value = (field + offset) * scale        field in two's complement

    bits    fields          offset
    8       -127 .. 127     0
    4       -8 .. 7         0
    2       -2 .. 1         1/2

With 4 bits the sign of the scale puts the largest magnitude on the side that has the eighth level. On Gaussian and
Laplacian columns of 64 to 4096 tokens the squared error is 9-19 % below that of -7 .. 7. It is 1-11 % below that of the
sixteen levels +-1/2 .. +-15/2, which have no zero, except for Gaussian columns of 4096, where it is 2 % above.

Scales minimise the squared error over a few clipping factors f. Codes q at the step f max|x| determine the best scale
for them, <q, x> / <q, q>, and with it the error |x|^2 - <q, x>^2 / <q, q>; the best of these scales then decides the
codes anew.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpack_fx.kernels.aten.factorize import require_finite

#: Lowest and highest field, and what is added to a field.
LEVELS = {8: (-127, 127, 0.0), 4: (-8, 7, 0.0), 2: (-2, 1, 0.5)}
#: Shares of the largest magnitude that the lowest level may stand for. With 8 bits clipping gains nothing.
CLIPPING = {
    8: (1.0,),
    4: tuple(0.25 ** (step / 11) for step in range(12)),
    2: tuple(0.125 ** (step / 11) for step in range(12)),
}


def quantize(coefficient: Tensor, basis: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of some components' columns of coefficients and rows of the basis.

    coefficient: `[B, n, r]`, all-zero rows for filler tokens; basis: `[B, H, r, D]`, or `[1, H, r, D]` for all samples.
    bits: 8, 4 or 2.

    Returns uint8 codes of the coefficients `[B, n, ceil(r bits / 8)]`, uint8 codes of the basis
    `[B or 1, H, r, ceil(D bits / 8)]`, and fp32 scales `[B, 2, r]`: of the coefficients at `[:, 0]`, of the basis,
    heads concatenated, at `[:, 1]`. A scale may be negative, and is 0 where all is zero. Filler rows come back as exact
    zeros with 8 and 4 bits; 2 bits have no zero, so that filler holds half a scale and has to be masked by who reads
    it, but has no part in choosing scales.

    Raises `ValueError` for other bits, for shapes that do not belong together, and for NaN or Inf.
    """
    _check_bits(bits)
    batch, _, columns = coefficient.shape
    if basis.shape[0] not in (1, batch) or basis.shape[2] != columns:
        raise ValueError(
            f"quantize: got coefficients {list(coefficient.shape)} and a basis {list(basis.shape)}, expected [B, n, r] "
            "and [B, H, r, D] or [1, H, r, D]; give both the same components"
        )
    require_finite(coefficient, "quantize")
    require_finite(basis, "quantize")
    filler = (coefficient == 0).all(-1, keepdim=True) if LEVELS[bits][2] else None
    column_codes, column_scale = _encode(coefficient, (1,), bits, filler)
    row_codes, row_scale = _encode(basis, (1, 3), bits, None)
    scale = torch.stack([column_scale.flatten(1), row_scale.flatten(1).expand(batch, -1)], 1)
    return _pack(column_codes, bits), _pack(row_codes, bits), scale


def dequantize_coefficient(codes: Tensor, scale: Tensor, r: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Coefficients `[B, n, r]` of codes `[B, n, ceil(r bits / 8)]` and scales `[B, 2, r]`.

    Products in fp32, rounded to dtype. Raises `ValueError` for bits other than 8, 4 and 2, and for codes of another
    width.
    """
    return _levels(codes, r, bits).mul_(scale[:, 0, None]).to(dtype).contiguous()


def dequantize_basis(codes: Tensor, scale: Tensor, D: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Basis `[B or 1, H, r, D]` of codes `[B or 1, H, r, ceil(D bits / 8)]` and scales `[B, 2, r]`.

    Products in fp32, rounded to dtype. Raises `ValueError` for bits other than 8, 4 and 2, and for codes of another
    width.
    """
    return _levels(codes, D, bits).mul_(scale[: codes.shape[0], 1, None, :, None]).to(dtype).contiguous()


def _check_bits(bits: int) -> None:
    if bits not in LEVELS:
        raise ValueError(f"bits: got {bits!r}, expected 8, 4 or 2; keep what takes more bits as it is")


def _encode(x: Tensor, dims: tuple[int, ...], bits: int, filler: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fields of x as int8, and their scales, fp32: of size 1 in `dims`, over which they are shared."""
    low, _, offset = LEVELS[bits]
    if x.numel() == 0:
        shape = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
        return x.new_zeros(x.shape, dtype=torch.int8), x.new_zeros(shape, dtype=torch.float32)
    reach = -(low + offset)
    ceiling = torch.finfo(x.dtype).max / reach
    x = x.float()
    top, bottom = x.amax(dims, keepdim=True), x.amin(dims, keepdim=True)
    unit = torch.where(top > -bottom, -top, -bottom)
    empty = unit == 0
    # Over the largest magnitude, which goes to -1, no square below can overflow or vanish.
    x = x / unit.masked_fill(empty, 1)
    best, step = torch.full_like(unit, -1.0), torch.ones_like(unit)
    for factor in CLIPPING[bits]:
        q = _fields(x, factor / reach, bits).add_(offset)
        if filler is not None:
            q.masked_fill_(filler, 0)
        product, square = (q * x).sum(dims, keepdim=True), q.square_().sum(dims, keepdim=True)
        gain = product.square() / square
        better = gain > best
        best, step = torch.where(better, gain, best), torch.where(better, product / square, step)
    # A scale fitted to all may take the largest level beyond what the dtype holds.
    scale = (step * unit).clamp_(-ceiling, ceiling)
    step = torch.where(scale == 0, 1, scale / unit)
    return _fields(x, step, bits).to(torch.int8), scale


def _fields(x: Tensor, step: Tensor | float, bits: int) -> Tensor:
    low, high, offset = LEVELS[bits]
    q = x / step
    return (q.sub_(offset) if offset else q).round_().clamp_(low, high)


def _pack(fields: Tensor, bits: int) -> Tensor:
    """int8 fields `[..., m]` as uint8 `[..., ceil(m bits / 8)]`; spare bits are zero."""
    fields = fields.view(torch.uint8)
    if bits == 8:
        return fields
    together = 8 // bits
    fields = F.pad(fields & (1 << bits) - 1, (0, -fields.shape[-1] % together))
    packed = fields[..., ::together].clone()
    for place in range(1, together):
        packed |= fields[..., place::together] << bits * place
    return packed


def _levels(codes: Tensor, size: int, bits: int) -> Tensor:
    """Fields plus offset, a new fp32 `[..., size]` (a view where bytes hold spare ones)."""
    _check_bits(bits)
    if codes.shape[-1] != -(-size * bits // 8):
        raise ValueError(
            f"dequantize: got {codes.shape[-1]} bytes for {size} numbers of {bits} bits, expected "
            f"{-(-size * bits // 8)}; give the size and bits they were quantised with"
        )
    if bits == 8:
        return codes.view(torch.int8).float()
    # One look-up a byte takes less time than shifts and masks, provided that on CPU the table is there.
    table = _TABLES[bits] if codes.device.type == "cpu" else _table(bits, codes.device)
    found = table.index_select(0, codes.flatten().int()).view(codes.shape)
    return found.view(torch.float32)[..., :size]


def _table(bits: int, device: torch.device) -> Tensor:
    """What each of the 256 bytes holds: its fp32 levels, as one number."""
    low, high, offset = LEVELS[bits]
    byte = torch.arange(256, device=device)[:, None]
    fields = byte >> torch.arange(0, 8, bits, device=device) & (1 << bits) - 1
    levels = torch.where(fields > high, fields + 2 * low, fields).float() + offset
    return levels.view(torch.int64 if bits == 4 else torch.complex128).flatten()


_TABLES = {bits: _table(bits, torch.device("cpu")) for bits in (4, 2)}
