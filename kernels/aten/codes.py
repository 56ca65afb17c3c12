"""Numbers in few bits as bytes: fields of 8, 4 or 2 bits, the first in the low bits of a byte, and floats of 8 bits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpack_fx.kernels.parts import E4M3, E5M2

#: Largest finite number of either float.
FLOAT_TOP = {E4M3: 448.0, E5M2: 57344.0}
_FLOATS = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def pack(fields: Tensor, bits: int) -> Tensor:
    """Fields `[..., m]`, uint8 or int8 (two's complement), as uint8 `[..., ceil(m bits / 8)]`; spare bits are zero."""
    fields = fields.view(torch.uint8)
    if bits == 8:
        return fields
    together = 8 // bits
    fields = F.pad(fields & (1 << bits) - 1, (0, -fields.shape[-1] % together))
    packed = fields[..., ::together].clone()
    for place in range(1, together):
        packed |= fields[..., place::together] << bits * place
    return packed


def to_float8(x: Tensor, kind: int) -> Tensor:
    """The nearest numbers of a float of 8 bits, as uint8; what is beyond its largest becomes that."""
    return x.clamp(-FLOAT_TOP[kind], FLOAT_TOP[kind]).to(_FLOATS[kind]).view(torch.uint8)


def from_float8(codes: Tensor, kind: int) -> Tensor:
    """What codes of a float of 8 bits mean, fp32.

    A float16 has the bits of an E5M2 on top. Those of an E4M3 are one place lower, with a bias 8 smaller; its one NaN,
    which no finite number is coded as, is not told apart. PyTorch's own conversion takes 50 times as long on CPU.
    """
    wide = codes.view(torch.int8).short()
    if kind == E5M2:
        return wide.bitwise_left_shift_(8).view(torch.float16).float()
    # Of the two copies of the sign above the exponent, the lower one is in its way.
    return wide.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16).float().mul_(256)


def look_up(codes: Tensor, size: int, bits: int, table: Tensor) -> Tensor:
    """Numbers `[..., size]` of codes `[..., ceil(size bits / 8)]`: new fp32, a view where bytes hold spare fields.

    table: of `tabulate`; of several codebooks in turn, the last but one dim of codes says which.
    """
    index = codes.int()
    if table.numel() > 256:
        index += torch.arange(0, table.numel(), 256, dtype=torch.int32, device=codes.device)[:, None]
    found = table.index_select(0, index.flatten()).view(codes.shape)
    return found if bits == 8 else found.view(torch.float32)[..., :size]


def tabulate(levels: Tensor, bits: int) -> Tensor:
    """What each of the 256 bytes holds, as one number: of levels fp32 `[..., 2 ** bits]`, `[... 256]` flattened."""
    if bits == 8:
        return levels.flatten()
    byte = torch.arange(256, device=levels.device)[:, None]
    fields = byte >> torch.arange(0, 8, bits, device=levels.device) & (1 << bits) - 1
    return levels[..., fields].contiguous().view(torch.int64 if bits == 4 else torch.complex128).flatten()


def unsigned(codes: Tensor, size: int, bits: int) -> Tensor:
    """Unsigned fields of codes, as `look_up`."""
    if bits == 8:
        return codes.float()
    # One look-up a byte takes less time than shifts and masks, provided that on CPU the table is there.
    table = UNSIGNED[bits] if codes.device.type == "cpu" else _unsigned(bits, codes.device)
    return look_up(codes, size, bits, table)


def _unsigned(bits: int, device: torch.device) -> Tensor:
    return tabulate(torch.arange(2.0**bits, device=device), bits)


UNSIGNED = {bits: _unsigned(bits, torch.device("cpu")) for bits in (4, 2)}
