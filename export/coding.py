"""Codes as an exported step makes them: those of `kernels/aten/quantize.py`, put into bytes by arithmetic alone."""

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.quantize import fields_of


def coded(
    x: Tensor, dims: tuple[int, ...], bits: int, asymmetric: bool, filler: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x `[..., m]` in 8, 4 or 2 bits, or x itself for 0; their scale and zero point, fp32, 1 in `dims`.

    filler: bool, True where x says nothing. Codes are whole numbers in fp32, for `stored`: TensorRT has bytes only
    where a graph begins and ends.
    """
    if not bits:
        shape = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
        one = x.new_ones(shape, dtype=torch.float32)
        return x, one, one - 1
    fields, scale, zero = fields_of(x, dims, bits, filler, asymmetric)
    if bits == 8:
        return fields, scale, zero
    base, together = 2**bits, 8 // bits
    # Two's complement.
    fields = torch.where(fields < 0, fields + base, fields)
    fields = torch.nn.functional.pad(fields, (0, -x.shape[-1] % together)).unflatten(-1, (-1, together))
    weights = torch.tensor([float(base**place) for place in range(together)], device=x.device)
    return (fields * weights).sum(-1), scale, zero


def stored(codes: Tensor, bits: int, asymmetric: bool) -> Tensor:
    """Codes of `coded` as the bytes that they are, int8 where they are signed ones of 8 bits; 0 bits are no codes."""
    if not bits:
        return codes
    return codes.to(torch.int8 if bits == 8 and not asymmetric else torch.uint8)
