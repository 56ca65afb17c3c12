import pytest
import torch

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten.blocks import segments, tokens
from attnpack_fx.kernels.aten.quantize import quantize
from attnpack_fx.kernels.parts import E4M3, E5M2, Block, PackedParts, RowForm, Rows, Segment

from ..inputs import Shapes, make_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def factor(count: int, rank: int, batch: int = 2, samples: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, count, rank), torch.randn(samples, 3, rank, 10)


def parts(*segments_of: tuple[Block | Rows, ...]) -> PackedParts:
    tail = torch.zeros(0, 2, 3, 10)
    return PackedParts(tuple(map(Segment, segments_of)), tail, 0, torch.zeros(2, 0, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_stay_what_they_are(dtype):
    blocks = Block(*factor(5, 3)), Block(*factor(4, 2))
    found = segments(parts(*((block,) for block in blocks)), dtype)
    assert [len(segment) for segment in found] == [1, 1]
    for (made,), block in zip(found, blocks, strict=True):
        expected = block.coefficient.to(dtype), block.basis.to(dtype)
        assert all(map(torch.equal, made, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("formats", [(8, 8), (4, 4), (2, 2), (4, 8), (0, 2), (8, 0), (E4M3, 4), (2, E5M2)])
def test_codes_become_numbers(formats, asymmetric, samples, dtype):
    bits, basis_bits = formats
    pair = factor(4, 7, samples=samples)
    *coded, scale = quantize(*pair, bits, basis_bits, asymmetric)
    stored = Block(*coded, scale, bits, None, basis_bits, asymmetric)
    ((_, block),) = segments(parts((Block(*factor(5, 3)), stored)), dtype)
    rows = scale.double()[:, :, None]
    coefficient, basis = (x.double() for x in pair)
    if bits:
        coefficient = reference.decoded(coded[0], 7, bits, not asymmetric) * rows[:, 0]
        coefficient += rows[:, 2] if asymmetric else 0
    if basis_bits:
        basis = reference.decoded(coded[1], 10, basis_bits, not asymmetric) * rows[:samples, 1, :, :, None]
        basis += rows[:samples, 3, :, :, None] if asymmetric else 0
    assert block.coefficient.dtype == block.basis.dtype == dtype
    # A sum of two numbers rounds twice.
    limit = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert (block.coefficient.double() - coefficient).abs().max() <= limit * coefficient.abs().max()
    assert (block.basis.double() - basis).abs().max() <= limit * basis.abs().max()


def test_samples_that_choose_their_basis():
    owner = torch.tensor([1, 1])
    block = Block(*factor(4, 3, samples=3), owner=owner)
    ((found,),) = segments(parts((block,)), torch.float32)
    assert torch.equal(found.basis, block.basis[owner])


def test_rows_stay_as_they_are_stored():
    form = RowForm(4, channel=True, zero=True, outliers=True, norm=True)
    rows = make_rows(form, Shapes(batch=2, heads=3), 6, 10, torch.Generator().manual_seed(0))
    found = segments(parts((Block(*factor(4, 5)),), (rows,)), torch.float32)
    assert [tokens(segment) for segment in found] == [4, 6] and found[1] is rows


def test_blocks_that_hold_nothing_are_left_out():
    empty, four, none, six = (Block(*factor(count, 2)) for count in (0, 4, 0, 6))
    rows = make_rows(RowForm(0), Shapes(batch=2, heads=3), 0, 10, torch.Generator())
    found = segments(parts((empty,), (four, none), (six,), (rows,)), torch.float32)
    assert [[block.coefficient.shape[1] for block in alike] for alike in found] == [[4], [6]]
    assert segments(parts(), torch.float32) == []
