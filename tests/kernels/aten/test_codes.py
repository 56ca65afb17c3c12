"""Codes of 8 bits and less, against fields spelled out and PyTorch's own floats."""

import pytest
import torch

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten.codes import FLOAT_TOP, from_float8, look_up, pack, tabulate, to_float8, unsigned
from attnpack_fx.kernels.parts import E4M3, E5M2

FLOATS = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
EVERY_BYTE = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_are_those_of_pytorch(kind):
    expected = EVERY_BYTE.view(FLOATS[kind]).float()
    finite = expected.isfinite()
    assert torch.equal(from_float8(EVERY_BYTE, kind)[finite], expected[finite])
    assert torch.equal(reference.decoded(EVERY_BYTE, 256, kind)[finite], expected[finite].double())
    assert expected[finite].max() == FLOAT_TOP[kind]
    assert torch.equal(from_float8(to_float8(expected[finite], kind), kind), expected[finite])


@pytest.mark.parametrize("kind", FLOATS)
def test_what_is_too_large_becomes_the_largest_float(kind):
    x = torch.tensor([1e6, -1e6, FLOAT_TOP[kind] * 1.2])
    assert from_float8(to_float8(x, kind), kind).tolist() == [FLOAT_TOP[kind], -FLOAT_TOP[kind], FLOAT_TOP[kind]]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_fields_come_back(bits, size):
    fields = torch.randint(2**bits, (5, 3, size), dtype=torch.uint8)
    codes = pack(fields, bits)
    assert codes.shape == (5, 3, -(-size * bits // 8))
    assert torch.equal(unsigned(codes, size, bits), fields.float())
    assert torch.equal(reference.decoded(codes, size, bits, signed=False), fields.double())


def test_the_first_field_is_in_the_low_bits():
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([1, 2, 3, 0, 2], dtype=torch.uint8), 2).tolist() == [0b00111001, 0b10]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("books", [1, 3])
def test_codebooks_of_heads(bits, books):
    levels = torch.randn(books, 2**bits)
    fields = torch.randint(2**bits, (5, 3, 8))
    found = look_up(pack(fields.to(torch.uint8), bits), 8, bits, tabulate(levels, bits))
    expected = torch.stack([levels[head % books][fields[:, head]] for head in range(3)], 1)
    assert torch.equal(found, expected)
