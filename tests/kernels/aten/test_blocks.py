import pytest
import torch

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten.blocks import by_segment, factors
from attnpack_fx.kernels.aten.quantize import quantize

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def factor(tokens: int, rank: int, batch: int = 2, samples: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, tokens, rank), torch.randn(samples, 3, rank, 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_layout_every_block_is_a_segment_as_it_is(dtype):
    first, second = factor(5, 3), factor(4, 2)
    found = factors([first[0], second[0]], [first[1], second[1]], [], [], [], 10, dtype)
    assert [block.segment for block in found] == [0, 1]
    for block, (coefficient, basis) in zip(found, (first, second), strict=True):
        assert torch.equal(block.coefficient, coefficient.to(dtype)) and torch.equal(block.basis, basis.to(dtype))
    assert [len(alike) for alike in by_segment(found)] == [1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_become_numbers(bits, samples, dtype):
    plain, coded = factor(5, 3), quantize(*factor(4, 7, samples=samples), bits)
    layout = [0, 0, 0, bits]
    found = factors([plain[0], coded[0]], [plain[1], coded[1]], [coded[2]], [], layout, 10, dtype)
    assert [block.segment for block in found] == [0, 0]
    block, scale = found[1], coded[2].double()
    coefficient = reference.decoded(coded[0], 7, bits) * scale[:, 0, None]
    basis = reference.decoded(coded[1], 10, bits) * scale[:samples, 1, None, :, None]
    assert block.coefficient.dtype == block.basis.dtype == dtype
    assert torch.equal(block.coefficient, coefficient.float().to(dtype))
    assert torch.equal(block.basis, basis.float().to(dtype))


def test_scales_go_to_the_blocks_with_bits():
    coded = [quantize(*factor(4, rank), bits) for rank, bits in ((5, 4), (2, 8))]
    plain = factor(4, 3)
    coefficients, bases = [coded[0][0], plain[0], coded[1][0]], [coded[0][1], plain[1], coded[1][1]]
    found = factors(coefficients, bases, [coded[0][2], coded[1][2]], [], [0, 4, 0, 0, 1, 8], 10, torch.float32)
    assert [block.coefficient.shape[2] for block in found] == [5, 3, 2]
    assert [[block.coefficient.shape[2] for block in alike] for alike in by_segment(found)] == [[5, 3], [2]]


def test_blocks_that_hold_nothing_are_left_out():
    pairs = [factor(0, 2), factor(4, 3), factor(0, 1), factor(6, 2)]
    coefficients, bases = (list(each) for each in zip(*pairs, strict=True))
    found = factors(coefficients, bases, [], [], [0, 0, 1, 0, 1, 0, 2, 0], 10, torch.float32)
    assert [block.segment for block in found] == [1, 2]
    assert [[block.coefficient.shape[1] for block in alike] for alike in by_segment(found)] == [[4], [6]]


def test_nothing():
    assert factors([], [], [], [], [], 10, torch.float32) == []
    assert list(by_segment([])) == []
