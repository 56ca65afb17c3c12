import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import reference

from ..inputs import DTYPES, SEEDS
from .interpreted import gather

gather_tokens = gather.gather_tokens


@given(
    seed=SEEDS,
    dtype=DTYPES,
    size=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.sampled_from([4, 16, 24, 80])),
    chosen=st.integers(0, 14),
    tensors=st.integers(1, 3),
    transposed=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_matches_the_reference(seed, dtype, size, chosen, tensors, transposed):
    random = torch.Generator().manual_seed(seed)
    x = [torch.randn(size, generator=random).to(dtype) for _ in range(tensors)]
    if transposed:  # as a projection leaves them: tokens before heads
        x = [item.transpose(1, 2).contiguous().transpose(1, 2) for item in x]
    index = torch.randint(-1, size[2], (size[0], chosen), generator=random)
    expected = [reference.take_rows(item, index, 0).transpose(0, 1).flatten(2) for item in x]
    assert torch.equal(gather_tokens(x, index), torch.cat(expected))


@pytest.mark.parametrize("dim", [8, 1])
def test_other_strides(dim):
    x = torch.randn(2, 3, 2 * dim, 7).transpose(2, 3)[..., ::2]
    index = torch.tensor([[6, -1, 0]]).expand(2, -1)
    expected = reference.take_rows(x, index, 0).transpose(0, 1).flatten(2)
    assert torch.equal(gather_tokens([x], index), expected)


def test_more_columns_than_one_program_takes():
    x = torch.randn(1, 20, 3, 80)
    index = torch.tensor([[2, 0, -1, 1, 1]])
    expected = reference.take_rows(x, index, 0).transpose(0, 1).flatten(2)
    assert torch.equal(gather_tokens([x], index), expected)


def test_no_tokens_to_choose_from():
    assert gather_tokens([torch.empty(2, 3, 0, 4)], torch.full((2, 5), -1)).eq(0).all()
    assert gather_tokens([torch.empty(2, 3, 4, 4)], torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 12)
