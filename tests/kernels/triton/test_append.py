import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import reference

from ..inputs import DTYPES, SEEDS
from .interpreted import append


@given(
    seed=SEEDS,
    dtype=DTYPES,
    batch=st.integers(1, 3),
    count=st.integers(1, 5),
    dims=st.lists(st.sampled_from([8, 16, 80]), min_size=1, max_size=3),
    positions=st.lists(st.integers(0, 4), min_size=3, max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_matches_the_reference(seed, dtype, batch, count, dims, positions):
    random = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=random).to(dtype)

    positions = positions[: len(dims)]
    tails = [normal(position + count + 2, batch, 3, dim) for position, dim in zip(positions, dims, strict=True)]
    new = [normal(batch, count, 3, dim).transpose(1, 2) for dim in dims]
    expected = [tail.clone() for tail in tails]
    reference.append_(expected, new, positions)
    append.append_(tails, new, positions)
    assert all(map(torch.equal, tails, expected))


def test_keys_and_values_of_different_head_counts():
    tails = [torch.zeros(4, 1, heads, 8) for heads in (2, 3)]
    new = [torch.randn(1, heads, 1, 8) for heads in (2, 3)]
    append.append_(tails, new, [1, 2])
    assert torch.equal(tails[0][1], new[0][:, :, 0]) and torch.equal(tails[1][2], new[1][:, :, 0])
    assert tails[0][[0, 2, 3]].eq(0).all() and tails[1][[0, 1, 3]].eq(0).all()


@pytest.mark.parametrize("transposed", [(1, 2), (2, 3)])
def test_strided_tokens(transposed):
    new = torch.randn(2, 3, 4, 8).transpose(*transposed).contiguous().transpose(*transposed)
    tail = torch.zeros(5, 2, 3, 8)
    append.append_([tail], [new], [1])
    assert torch.equal(tail[1:], new.permute(2, 0, 1, 3)) and tail[0].eq(0).all()


def test_strided_tails():
    tails = [torch.zeros(2, 5, 3, 8).transpose(0, 1), torch.zeros(5, 2, 3, 8)]
    new = [torch.randn(2, 3, 1, 8), torch.randn(2, 3, 1, 8)]
    append.append_(tails, new, [1, 3])
    for tail, tokens, position in zip(tails, new, [1, 3], strict=True):
        assert torch.equal(tail[position], tokens[:, :, 0]) and tail.count_nonzero() == tokens.count_nonzero()


@pytest.mark.parametrize(("position", "count"), [(4, 1), (3, 2), (9, 1), (-1, 1)])
def test_append_beyond_the_rows_is_an_error_and_writes_nothing(position, count):
    tail = torch.zeros(4, 1, 2, 3)
    with pytest.raises(IndexError, match="of a tail with 4 rows"):
        append.append_([tail], [torch.ones(1, 2, count, 3)], [position])
    assert tail.eq(0).all()
