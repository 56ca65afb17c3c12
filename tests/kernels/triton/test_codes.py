"""What every byte stands for, in each format."""

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.parts import E4M3, E5M2

from .interpreted import codes

with knobs.runtime.scope():
    knobs.runtime.interpret = True

    @triton.jit
    def levels_kernel(given, out, FIRST: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr):
        row = tl.arange(0, 16)
        found = codes.load_levels(given, row, row < 15, FIRST, 31, 32, 64, BITS, SIGNED)
        tl.store(out + row[:, None] * 32 + tl.arange(0, 32)[None, :], found)


@pytest.mark.parametrize("first", [0, 16])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2, E4M3, E5M2])
def test_levels(bits, signed, first):
    """Rows of 31 numbers, 64 bytes apart, of which the last is not there: every byte that means a number."""
    width = -(-31 * min(bits, 8) // 8)
    given = torch.arange(16 * 64, dtype=torch.int32).view(16, 64).mul(37).remainder(256).to(torch.uint8)
    if bits in (E4M3, E5M2):
        given[given % 128 >= (127 if bits == E4M3 else 124)] = 0
    out = torch.full((16, 32), torch.nan)
    levels_kernel[(1,)](given, out, FIRST=first, BITS=bits, SIGNED=signed)
    unit = 256 if bits > 8 else 1
    expected = reference.decoded(given[:15, :width], 31, bits, signed)[:, first:]
    assert torch.equal(out[:15, : 31 - first].double() * unit, expected) and out.isfinite().all()


@pytest.mark.parametrize("bits", [8, 4, 2, E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_levels_are_exact_in_half_precision(bits, dtype):
    given = torch.arange(256, dtype=torch.uint8)
    numbers = reference.decoded(given[:, None], 1 if bits >= 8 else 8 // bits, bits)
    numbers = numbers[numbers.abs() <= {E4M3: 448, E5M2: 57344}.get(bits, 128)] / (256 if bits > 8 else 1)
    assert torch.equal(numbers.to(dtype).double(), numbers)
