"""What a block of `Rows` stands for in float64, straight from the docstring of `kernels/parts.py`; and rows to code."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx.kernels.parts import E4M3, E5M2, Rows

#: Exponent bits, mantissa bits, bias; the largest code that is a number.
_FLOATS = {E4M3: (4, 3, 7, 0x7E), E5M2: (5, 2, 15, 0x7B)}


def numbers(form: int) -> Tensor:
    """What each of the 256 codes of a float of eight bits stands for, float64; NaN for those that are no number."""
    exponents, mantissas, bias, largest = _FLOATS[form]
    found = []
    for code in range(256):
        exponent, mantissa = code >> mantissas & 2**exponents - 1, code & 2**mantissas - 1
        number = 2.0 ** (max(exponent, 1) - bias) * ((exponent > 0) + mantissa / 2**mantissas)
        found.append(math.nan if code & 127 > largest else -number if code > 127 else number)
    return torch.tensor(found, dtype=torch.float64)


def shared(tensor: Tensor, rows: Rows[Tensor], dim: int) -> Tensor:
    """A scale or zero point of every number, float64 `[B, n, H, D]`."""
    if rows.form.channel:
        assert rows.group_of is not None and rows.group_of.dtype == torch.int32
        return torch.stack([own[group.long()] for own, group in zip(tensor, rows.group_of, strict=True)]).double()
    assert tensor.shape[3] == -(-dim // rows.form.group)
    return tensor[..., [d // rows.form.group for d in range(dim)]].double()


def decoded(rows: Rows[Tensor], dim: int) -> Tensor:
    """float64 `[B, n, H, D]`."""
    form, codes = rows.form, rows.codes
    assert codes.dtype == torch.uint8
    if form.bits in _FLOATS:
        level = numbers(form.bits)[codes.long()]
    else:
        assert codes.shape[3] == -(-dim * form.bits // 8)
        fields = [codes.long() // 2**low % 2**form.bits for low in range(0, 8, form.bits)]
        level = torch.stack(fields, -1).flatten(3)[..., :dim]
        if rows.codebook is not None:
            assert rows.codebook.dtype == torch.float32 and (rows.codebook.diff() >= 0).all()
            level = rows.codebook[level]
    x = level.double() * shared(rows.scale, rows, dim)
    if rows.zero is not None:
        x = x + shared(rows.zero, rows, dim)
    if rows.places is not None and rows.outliers is not None:
        assert rows.places.dtype == torch.int32
        for flat, places, outliers in zip(x.view(len(x), -1), rows.places.tolist(), rows.outliers, strict=True):
            assert sorted(places) == places and len({p for p in places if p >= 0}) == sum(p >= 0 for p in places)
            for place, outlier in zip(places, outliers, strict=True):
                if place >= 0:
                    flat[place] = outlier
    if rows.left is not None and rows.right is not None and rows.part_of is not None:
        right = torch.stack([own[part.long()] for own, part in zip(rows.right, rows.part_of, strict=True)])
        x = x + torch.einsum("bnhr,bnhrd->bnhd", rows.left.double(), right.double())
    return x


def stored_bytes(rows: Rows[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in (rows.codes, rows.scale, *rows.extras.values()))


def random_rows(
    seed: int, batch: int, n: int, heads: int, dim: int, dtype: torch.dtype = torch.float32, filler: bool = False
) -> Tensor:
    """Rows whose channels have scales and offsets of their own, as keys do; with `filler` later samples are shorter."""
    random = torch.Generator().manual_seed(seed)
    spread = 10 ** torch.randn(heads, dim, generator=random).clamp(-1.5, 1.5)
    offset = 3 * torch.randn(heads, dim, generator=random)
    rows = torch.randn(batch, n, heads, dim, generator=random) * spread + offset
    if filler:
        for number in range(1, batch):
            rows[number, max(n - 5 * number, 0) :] = 0
    return rows.to(dtype)


BATCHES = st.integers(1, 3)
LENGTHS = st.integers(0, 40)
HEADS = st.integers(1, 3)
DIMS = st.integers(1, 20)
