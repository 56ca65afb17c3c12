import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx import Columns
from attnpack_fx.kernels import ops, reference
from attnpack_fx.storing import squares_of, store

SEEDS = st.integers(0, 2**16)


def matrix(seed: int, batch: int, tokens: int, decay: float, heads: int = 2, dim: int = 8) -> torch.Tensor:
    """Fp32 `[B, H, T, D]` whose singular values, heads concatenated, are `decay ** i`."""
    random = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn((batch, tokens, heads * dim), generator=random, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn((batch, heads * dim, heads * dim), generator=random, dtype=torch.float64)).Q
    values = decay ** torch.arange(left.shape[2], dtype=torch.float64)
    rows = left * values @ right[:, : left.shape[2]]
    return rows.unflatten(2, (heads, dim)).transpose(1, 2).float().contiguous()


def factored(x: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coefficient, basis and the sums of squares of all tokens of x."""
    index = torch.arange(x.shape[2]).expand(x.shape[0], -1)
    return *ops.compress(x, index, rank), squares_of(x.square().sum((1, 3)), index)


def product(segment) -> torch.Tensor:
    return sum(block.coefficient.double() @ block.basis.double().transpose(1, 2).flatten(2) for block in segment.blocks)


@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    decay=st.floats(0.3, 1.0),
    energy=st.floats(0.05, 0.9999),
    at_most=st.integers(1, 16),
)
@settings(max_examples=60, deadline=None)
def test_energy_is_the_smallest_rank_that_keeps_it_in_every_sample(seed, batch, tokens, decay, energy, at_most):
    x = matrix(seed, batch, tokens, decay)
    columns = Columns(((at_most, 0),), energy)
    segment, loss = store(*factored(x, at_most)[:2], columns, factored(x, at_most)[2])
    (block,) = segment.blocks
    spectrum = torch.linalg.svdvals(x.double().transpose(1, 2).flatten(2)).square()
    share = spectrum.cumsum(1) / spectrum.sum(1, keepdim=True)
    most = min(at_most, share.shape[1])

    def smallest(threshold: float) -> int:
        return min(most, int((share < threshold).sum(1).max()) + 1)

    # Rounding in fp32 decides between neighbours.
    assert smallest(energy - 1e-5) <= block.coefficient.shape[2] <= smallest(energy + 1e-5)
    assert loss is not None and torch.allclose(loss.squares, x.double().square().sum((1, 2, 3)))


@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    decay=st.floats(0.3, 1.0),
    rank=st.integers(1, 16),
)
@settings(max_examples=60, deadline=None)
def test_loss_is_the_error(seed, batch, tokens, decay, rank):
    x = matrix(seed, batch, tokens, decay)
    coefficient, basis, squares = factored(x, rank)
    segment, loss = store(coefficient, basis, Columns(((rank, 0),)), squares)
    rows = x.double().transpose(1, 2).flatten(2)
    error = (rows - product(segment)).norm(dim=(1, 2))
    assert loss is not None
    assert torch.allclose(loss.bound, error, rtol=1e-3, atol=2e-3 * float(rows.norm()))
    assert torch.allclose(loss.squares, rows.square().sum((1, 2)))
    assert loss.relative == pytest.approx(float((loss.bound / loss.squares.sqrt()).max()))


def test_nothing_is_said_of_the_loss_unless_asked_for():
    segment, loss = store(*factored(matrix(0, 2, 20, 0.8), 4)[:2], Columns(((4, 0),)))
    assert loss is None and len(segment.blocks) == 1


@pytest.mark.parametrize(
    ("blocks", "kept", "expected"),
    [
        (((16, 0),), 16, [(16, 0)]),
        (((4, 0), (12, 0)), 16, [(4, 0), (12, 0)]),
        (((4, 8), (8, 4), (4, 2)), 16, [(4, 8), (8, 4), (4, 2)]),
        # Fewer columns than asked for: the later blocks are cut, or left out.
        (((4, 8), (8, 4), (4, 2)), 10, [(4, 8), (6, 4)]),
        (((4, 8), (8, 4), (4, 2)), 4, [(4, 8)]),
        (((4, 8), (8, 4), (4, 2)), 1, [(1, 8)]),
    ],
)
def test_columns_are_cut_into_blocks(blocks, kept, expected):
    x = matrix(0, 2, 20, 0.8)
    coefficient, basis, _ = factored(x, kept)
    segment, _ = store(coefficient, basis, Columns(blocks))
    found, start = [], 0
    for block in segment.blocks:
        count = (block.coefficient if block.scale is None else block.scale).shape[2]
        found.append((count, block.bits))
        parts = coefficient[:, :, start : start + count], basis[:, :, start : start + count]
        if block.bits:
            assert block.scale is not None and block.coefficient.dtype == torch.uint8
            levels = reference.decoded(block.coefficient, count, block.bits) * block.scale[:, 0, None]
            step = {8: 1 / 127, 4: 1 / 8, 2: 2 / 3}[block.bits]
            assert ((levels - parts[0]).abs() <= step * parts[0].abs().amax(1, keepdim=True)).all()
        else:
            assert torch.equal(block.coefficient, parts[0]) and torch.equal(block.basis, parts[1])
        start += count
    assert found == expected


def test_a_cut_block_keeps_no_other_columns_alive():
    segment, _ = store(*factored(matrix(0, 2, 20, 0.8), 16)[:2], Columns(((4, 0), (4, 0))))
    for block in segment.blocks:
        for part in (block.coefficient, block.basis):
            assert part.untyped_storage().nbytes() == part.numel() * 4


def test_energy_cuts_the_last_blocks():
    x = matrix(0, 1, 20, 0.5)
    coefficient, basis, squares = factored(x, 16)
    segment, loss = store(coefficient, basis, Columns(((2, 8), (14, 4)), energy=0.99), squares)
    assert [block.scale.shape[2] for block in segment.blocks] == [2, 2]  # 1 - 0.25 ** 4 = 0.996
    assert loss is not None and loss.relative == pytest.approx(0.25**2, rel=1e-3)


def test_a_sample_without_tokens_asks_for_nothing():
    x = matrix(0, 2, 20, 0.5)
    x[1] = 0
    segment, loss = store(*factored(x, 16)[:2], Columns(((16, 0),), energy=0.99), factored(x, 16)[2])
    assert segment.blocks[0].coefficient.shape[2] == 4
    assert loss is not None and loss.bound[1] == 0 and loss.relative > 0


def test_squares_of_leaves_filler_out():
    tokens = torch.arange(12.0).view(2, 6)
    index = torch.tensor([[5, 0, -1], [1, -1, -1]])
    assert squares_of(tokens, index).tolist() == [5.0, 7.0]
