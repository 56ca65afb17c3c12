"""Low-rank factors in few bits: a component has a scale for its column of coefficients and one for its basis row.

Coefficients and basis may be in different formats, and either may stay as it is.

Symmetric: every number is a signed field of `bits` bits times a scale; a byte holds 8 / bits of them, the first in its
low bits, consecutive along the last dimension:

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

Asymmetric: `value = field * scale + zero` with unsigned fields, zero the least number and the last level the largest.

Floats of 8 bits: `value = float * scale`, where the scale takes the largest magnitude to the largest float.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.codes import FLOAT_TOP, from_float8, look_up, pack, tabulate, to_float8, unsigned
from attnpack_fx.kernels.linalg import require_finite

#: Lowest and highest field, and what is added to a field.
LEVELS = {8: (-127, 127, 0.0), 4: (-8, 7, 0.0), 2: (-2, 1, 0.5)}
#: Shares of the largest magnitude that the lowest level may stand for. With 8 bits clipping gains nothing.
CLIPPING = {
    8: (1.0,),
    4: tuple(0.25 ** (step / 11) for step in range(12)),
    2: tuple(0.125 ** (step / 11) for step in range(12)),
}


#: Most numbers that are tried at once, over all factors of `CLIPPING`.
TOGETHER = 1 << 18


def quantize(
    coefficient: Tensor, basis: Tensor, bits: int, basis_bits: int | None = None, asymmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of some components' columns of coefficients and rows of the basis.

    coefficient: `[B, n, r]`, all-zero rows for filler tokens; basis: `[B, H, r, D]`, or `[1, H, r, D]` for all samples,
        or of any number of samples where it stays as it is.
    bits, basis_bits: formats of the coefficients and of the basis: 8, 4, 2, `parts.E4M3`, `parts.E5M2`, or 0 to leave
        them as they are; basis_bits None: as `bits`.
    asymmetric: whether fields of 8, 4 and 2 bits have zero points.

    Returns uint8 codes of the coefficients `[B, n, ceil(r bits / 8)]`, uint8 codes of the basis
    `[B or 1, H, r, ceil(D bits / 8)]`, and fp32 scales `[B, 2, r]`: of the coefficients at `[:, 0]`, of the basis,
    heads concatenated, at `[:, 1]`; with asymmetric `[B, 4, r]`, zero points at `[:, 2]` and `[:, 3]`. What has no
    scale or zero point has 1 and 0. A scale may be negative, and is 0 where all is zero. Filler rows come back as exact
    zeros from symmetric fields of 8 and 4 bits and from floats; 2 bits have no zero and asymmetric fields may have
    none, so that there filler holds anything and has to be masked by who reads it. It has no part in choosing scales.

    Raises `ValueError` for other formats, for shapes that do not belong together, and for NaN or Inf.
    """
    basis_bits = bits if basis_bits is None else basis_bits
    _check_formats(bits, basis_bits, asymmetric)
    batch, _, columns = coefficient.shape
    if (basis_bits and basis.shape[0] not in (1, batch)) or basis.shape[2] != columns:
        raise ValueError(
            f"quantize: got coefficients {list(coefficient.shape)} and a basis {list(basis.shape)}, expected [B, n, r] "
            "and [B, H, r, D] or [1, H, r, D]; give both the same components"
        )
    require_finite(coefficient, "quantize")
    require_finite(basis, "quantize")
    filler = (coefficient == 0).all(-1, keepdim=True) if asymmetric or bits == 2 else None
    column_codes, *of_columns = _coded(coefficient, (1,), bits, filler, asymmetric)
    row_codes, *of_rows = _coded(basis[: basis.shape[0] if basis_bits else 1], (1, 3), basis_bits, None, asymmetric)
    pairs = [(c.flatten(1), r.flatten(1).expand(batch, -1)) for c, r in zip(of_columns, of_rows, strict=True)]
    scale = torch.stack([tensor for pair in pairs[: 1 + asymmetric] for tensor in pair], 1)
    return column_codes, row_codes if basis_bits else basis, scale


def dequantize_coefficient(codes: Tensor, scale: Tensor, r: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Coefficients `[B, n, r]` of codes `[B, n, ceil(r bits / 8)]` and scales `[B, 2 or 4, r]`.

    Products in fp32, rounded to dtype. Raises `ValueError` for formats that `quantize` does not have, and for codes of
    another width.
    """
    zero = scale[:, 2, None] if scale.shape[1] == 4 else None
    return _numbers(codes, r, bits, scale[:, 0, None], zero, dtype)


def dequantize_basis(codes: Tensor, scale: Tensor, D: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Basis `[B or 1, H, r, D]` of codes `[B or 1, H, r, ceil(D bits / 8)]` and scales `[B, 2 or 4, r]`.

    Products in fp32, rounded to dtype. Raises `ValueError` for formats that `quantize` does not have, and for codes of
    another width.
    """
    scale = scale[: codes.shape[0], :, None, :, None]
    return _numbers(codes, D, bits, scale[:, 1], scale[:, 3] if scale.shape[1] == 4 else None, dtype)


def _check_formats(bits: int, basis_bits: int, asymmetric: bool) -> None:
    for given in (bits, basis_bits):
        if given and given not in FLOAT_TOP:
            _check_bits(given)
    if not bits and not basis_bits:
        raise ValueError("bits: got 0 for coefficients and basis, expected a format for one; keep both as they are")
    if asymmetric and not {bits, basis_bits} & LEVELS.keys():
        raise ValueError(
            f"asymmetric: got formats {bits} and {basis_bits}, expected 8, 4 or 2 bits in one; floats have no zero "
            "point, leave it out"
        )


def _check_bits(bits: int) -> None:
    if bits not in LEVELS:
        raise ValueError(f"bits: got {bits!r}, expected 8, 4 or 2; keep what takes more bits as it is")


def _coded(
    x: Tensor, dims: tuple[int, ...], bits: int, filler: Tensor | None, asymmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of x, the latter fp32 and of size 1 in `dims`, over which they are shared."""
    shape = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
    zero = x.new_zeros(shape, dtype=torch.float32)
    if not bits:
        return x, torch.ones_like(zero), zero
    if x.numel() == 0:
        width = -(-x.shape[-1] * (8 if bits in FLOAT_TOP else bits) // 8)
        return x.new_zeros((*x.shape[:-1], width), dtype=torch.uint8), zero, zero
    if bits in FLOAT_TOP:
        top = FLOAT_TOP[bits]
        unit = x.float().abs().amax(dims, keepdim=True)
        codes = to_float8(x.float() / unit.masked_fill(unit == 0, 1) * top, bits)
        # A hair below, lest the product with the top be beyond what fp32 holds.
        return codes, (unit / top).clamp_(max=_largest(x.dtype) / top * (1 - 1e-6)), zero
    fields, scale, zero = fields_of(x, dims, bits, filler, asymmetric)
    return pack(fields.to(torch.uint8 if asymmetric else torch.int8), bits), scale, zero


def fields_of(
    x: Tensor, dims: tuple[int, ...], bits: int, filler: Tensor | None, asymmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Fields of x in 8, 4 or 2 bits, as whole numbers in fp32, their scale and zero point, fp32 and 1 in `dims`."""
    if asymmetric:
        return _spread(x.float(), dims, bits, filler)
    fields, scale = _encode(x, dims, bits, filler)
    return fields, scale, torch.zeros_like(scale)


def _spread(x: Tensor, dims: tuple[int, ...], bits: int, filler: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned fields from the least to the largest number, their scale and zero point."""
    last = 2**bits - 1
    if filler is None:
        low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    else:
        low = x.masked_fill(filler, torch.inf).amin(dims, keepdim=True)
        high = x.masked_fill(filler, -torch.inf).amax(dims, keepdim=True)
        nothing = low > high
        low, high = low.masked_fill(nothing, 0), high.masked_fill(nothing, 0)
    # The difference itself may be beyond what fp32 holds, as the last level may then be.
    scale = (high / last - low / last).clamp_(max=_largest(x.dtype) / last * (1 - 1e-6))
    step = scale.masked_fill(scale == 0, 1)
    fields = (x / step - low / step).round_().clamp_(0, last).masked_fill_(scale == 0, 0)
    return fields, scale, low


def _largest(dtype: torch.dtype) -> float:
    """What a scale, which is fp32 and read in `dtype`, can be at most."""
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)


def _encode(x: Tensor, dims: tuple[int, ...], bits: int, filler: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fields of x and their scales, fp32, these of size 1 in `dims`, over which they are shared."""
    low, _, offset = LEVELS[bits]
    if x.numel() == 0:
        shape = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
        return x.new_zeros(x.shape, dtype=torch.float32), x.new_zeros(shape, dtype=torch.float32)
    reach = -(low + offset)
    ceiling = _largest(x.dtype) / reach
    x = x.float()
    top, bottom = x.amax(dims, keepdim=True), x.amin(dims, keepdim=True)
    unit = torch.where(top > -bottom, -top, -bottom)
    empty = unit == 0
    # Over the largest magnitude, which goes to -1, no square below can overflow or vanish.
    x = x / unit.masked_fill(empty, 1)
    best, step = torch.full_like(unit, -1.0), torch.ones_like(unit)
    below = tuple(dim + 1 for dim in dims)
    for factors in _in_groups(CLIPPING[bits], x.numel()):
        steps = torch.tensor(factors, device=x.device).div_(reach).view(-1, *[1] * x.dim())
        q = _fields(x, steps, bits).add_(offset)
        if filler is not None:
            q.masked_fill_(filler, 0)
        product, square = (q * x).sum(below, keepdim=True), q.square_().sum(below, keepdim=True)
        gain = product.square() / square
        most = gain.amax(0)
        fitted = torch.where(gain == most, product / square, 0).amax(0)
        better = most > best
        best, step = torch.where(better, most, best), torch.where(better, fitted, step)
    # A scale fitted to all may take the largest level beyond what the dtype holds.
    scale = (step * unit).clamp_(-ceiling, ceiling)
    step = torch.where(scale == 0, 1, scale / unit)
    return _fields(x, step, bits), scale


def _in_groups(factors: tuple[float, ...], numbers: Any) -> Iterator[tuple[float, ...]]:
    """Factors that are tried at once: all of them in a graph for any size, which stays short."""
    together = max(1, TOGETHER // max(numbers, 1)) if isinstance(numbers, int) else len(factors)
    for start in range(0, len(factors), together):
        yield factors[start : start + together]


def _fields(x: Tensor, step: Tensor | float, bits: int) -> Tensor:
    low, high, offset = LEVELS[bits]
    q = x / step
    return (q.sub_(offset) if offset else q).round_().clamp_(low, high)


def _numbers(codes: Tensor, size: int, bits: int, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What codes mean, `[..., size]` in dtype; with zero, fields are unsigned."""
    if bits not in FLOAT_TOP:
        _check_bits(bits)
    width = -(-size * (8 if bits in FLOAT_TOP else bits) // 8)
    if codes.shape[-1] != width:
        raise ValueError(
            f"dequantize: got {codes.shape[-1]} bytes for {size} numbers of {bits} bits, expected {width}; give the "
            "size and bits they were quantised with"
        )
    if bits in FLOAT_TOP:
        numbers = from_float8(codes, bits)
    elif zero is not None:
        numbers = unsigned(codes, size, bits)
    elif bits == 8:
        numbers = codes.view(torch.int8).float()
    else:
        table = _TABLES[bits] if codes.device.type == "cpu" else _table(bits, codes.device)
        numbers = look_up(codes, size, bits, table)
    numbers = numbers.mul_(scale)
    if zero is not None:
        numbers += zero
    return numbers.to(dtype).contiguous()


def _table(bits: int, device: torch.device) -> Tensor:
    """What each of the 256 bytes holds: its signed levels."""
    low, high, offset = LEVELS[bits]
    fields = torch.arange(2**bits, device=device)
    return tabulate(torch.where(fields > high, fields + 2 * low, fields).float() + offset, bits)


_TABLES = {bits: _table(bits, torch.device("cpu")) for bits in (4, 2)}
