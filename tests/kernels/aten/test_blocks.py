import pytest
import torch

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten.blocks import segments, tokens
from attnpack_fx.kernels.aten.quantize import quantize
from attnpack_fx.kernels.parts import E4M3, E5M2, Block, RowForm, kind

from ..inputs import Shapes, make_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def factor(count: int, rank: int, batch: int = 2, samples: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, count, rank), torch.randn(samples, 3, rank, 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_layout_every_block_is_a_segment_as_it_is(dtype):
    pairs = factor(5, 3), factor(4, 2)
    found = segments([pairs[0][0], pairs[1][0]], [pairs[0][1], pairs[1][1]], [], [], [], 10, dtype)
    assert [len(segment) for segment in found] == [1, 1]
    for (block,), (coefficient, basis) in zip(found, pairs, strict=True):
        assert torch.equal(block.coefficient, coefficient.to(dtype)) and torch.equal(block.basis, basis.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("formats", [(8, 8), (4, 4), (2, 2), (4, 8), (0, 2), (8, 0), (E4M3, 4), (2, E5M2)])
def test_codes_become_numbers(formats, asymmetric, samples, dtype):
    bits, basis_bits = formats
    plain, pair = factor(5, 3), factor(4, 7, samples=samples)
    *coded, scale = quantize(*pair, bits, basis_bits, asymmetric)
    stored = kind(Block(*coded, scale, bits, None, basis_bits, asymmetric))
    ((_, block),) = segments([plain[0], coded[0]], [plain[1], coded[1]], [scale], [], [0, 0, 0, stored], 10, dtype)
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


def test_scales_go_to_the_blocks_with_codes():
    coded = [quantize(*factor(4, rank), bits) for rank, bits in ((5, 4), (2, 8))]
    plain, basis_alone = factor(4, 3), quantize(*factor(4, 6), 0, 4)
    coefficients = [coded[0][0], plain[0], coded[1][0], basis_alone[0]]
    bases = [coded[0][1], plain[1], coded[1][1], basis_alone[1]]
    kinds = [4 | 4 << 8, 0, 8 | 8 << 8, 4 << 8]
    blocks = [number for pair in zip([0, 0, 1, 1], kinds, strict=True) for number in pair]
    scales = [coded[0][2], coded[1][2], basis_alone[2]]
    found = segments(coefficients, bases, scales, [], blocks, 10, torch.float32)
    assert [[block.coefficient.shape[2] for block in alike] for alike in found] == [[5, 3], [2, 6]]
    assert torch.equal(found[1][1].coefficient, basis_alone[0])


def test_rows_take_their_extras_from_the_scales():
    form = RowForm(4, channel=True, zero=True, outliers=True, norm=True)
    rows = make_rows(form, Shapes(batch=2, heads=3), 6, 10, torch.Generator().manual_seed(0))
    *coded, scale = quantize(*factor(4, 5), 4)
    found = segments(
        [coded[0], rows.codes],
        [coded[1], rows.scale],
        [scale, *rows.extras.values()],
        [],
        [0, 4 | 4 << 8, 1, form.kind],
        10,
        torch.float32,
    )
    assert [tokens(segment) for segment in found] == [4, 6]
    assert found[1] == rows and list(rows.extras) == ["zero", "group_of", "outliers", "places", "norm"]


def test_blocks_that_hold_nothing_are_left_out():
    pairs = [factor(0, 2), factor(4, 3), factor(0, 1), factor(6, 2)]
    coefficients, bases = (list(each) for each in zip(*pairs, strict=True))
    rows = make_rows(RowForm(0), Shapes(batch=2, heads=3), 0, 10, torch.Generator())
    blocks = [0, 0, 1, 0, 1, 0, 2, 0, 3, rows.form.kind]
    found = segments([*coefficients, rows.codes], [*bases, rows.scale], [], [], blocks, 10, torch.float32)
    assert [[block.coefficient.shape[1] for block in alike] for alike in found] == [[4], [6]]


def test_nothing():
    assert segments([], [], [], [], [], 10, torch.float32) == []
