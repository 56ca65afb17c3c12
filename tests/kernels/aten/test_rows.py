import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten.rows import append_, select_tokens, take_rows

from ..inputs import DTYPES, SEEDS


@given(
    seed=SEEDS,
    dtype=DTYPES,
    size=st.tuples(*[st.integers(1, 4)] * 2, st.integers(0, 12), st.integers(1, 20)),
    chosen=st.integers(0, 15),
    spare=st.integers(0, 4),
)
@settings(max_examples=150, deadline=None)
def test_take_rows_matches_the_reference(seed, dtype, size, chosen, spare):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=random).to(dtype)
    index = (
        torch.randint(-1, size[2], (size[0], chosen), generator=random)
        if size[2]
        else torch.full((size[0], chosen), -1)
    )
    rows = take_rows(x, index, spare)
    assert rows.is_contiguous() and torch.equal(rows, reference.take_rows(x, index, spare))
    assert torch.equal(select_tokens(x, index), rows[:chosen].transpose(0, 1))


@pytest.mark.parametrize(
    ("index", "view"),
    [
        ([[1, 2, 3], [1, 2, 3]], True),
        ([[0, 1, 2], [1, 2, 3]], False),
        ([[1, 3, 4], [1, 3, 4]], False),
        ([[3, 2, 1], [3, 2, 1]], False),
        ([[-1, 0, 1], [-1, 0, 1]], False),
    ],
)
def test_tokens_that_follow_each_other_are_not_copied(index, view):
    x, chosen = torch.randn(2, 2, 5, 4), torch.tensor(index)
    found = select_tokens(x, chosen)
    assert (found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == view
    assert torch.equal(found.transpose(0, 1), reference.take_rows(x, chosen, 0))


def test_take_rows_ignores_nan_in_tokens_not_chosen():
    x = torch.randn(2, 2, 5, 4)
    x[:, :, 0] = float("nan")
    assert take_rows(x, torch.tensor([[1, 3], [2, -1]]), 1).isfinite().all()


@given(seed=SEEDS, dtype=DTYPES, count=st.integers(0, 5), before=st.integers(0, 5), after=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_append_matches_the_reference(seed, dtype, count, before, after):
    random = torch.Generator().manual_seed(seed)
    tail = torch.randn(before + count + after, 2, 3, 8, generator=random).to(dtype)
    new = torch.randn(2, count, 3, 8, generator=random).to(dtype).transpose(1, 2)
    expected, address = tail.clone(), tail.data_ptr()
    reference.append_([expected], [new], [before])
    append_([tail], [new], [before])
    assert torch.equal(tail, expected) and tail.data_ptr() == address


@pytest.mark.parametrize(("position", "count"), [(4, 1), (3, 2), (9, 1)])
def test_append_beyond_the_rows_is_an_error_and_writes_nothing(position, count):
    tail = torch.zeros(4, 1, 2, 3)
    with pytest.raises((RuntimeError, IndexError)):
        append_([tail], [torch.ones(1, 2, count, 3)], [position])
    assert tail.eq(0).all()
