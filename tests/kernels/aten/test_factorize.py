import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten.factorize import compress, fold

from ..inputs import DTYPES, SEEDS, relative_error

#: What rounding two factors to their storage dtype may add to the relative error of their product.
STORAGE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def product(coefficient: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """`[B, N, H * D]` in float64."""
    return coefficient.double() @ basis.double().transpose(1, 2).flatten(2)


def selected(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return reference.take_rows(x.double(), index, 0).transpose(0, 1).flatten(2)


@given(
    seed=SEEDS,
    dtype=DTYPES,
    size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 60), st.sampled_from([4, 16, 32])),
    chosen=st.integers(0, 60),
    rank=st.integers(1, 40),
)
@settings(max_examples=150, deadline=None)
def test_compress_is_as_good_as_the_reference(seed, dtype, size, chosen, rank):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=random).to(dtype)
    index = torch.randint(-1, size[2], (size[0], chosen), generator=random)
    coefficient, basis = compress(x, index, rank)
    expected = reference.compress(x, index, rank)
    assert (coefficient.shape, basis.shape) == (expected[0].shape, expected[1].shape)
    assert coefficient.dtype == basis.dtype == dtype
    assert coefficient.is_contiguous() and basis.is_contiguous()
    assert coefficient[index < 0].eq(0).all()
    a = selected(x, index)
    if a.numel():
        best = (product(*expected) - a).norm()
        assert (product(coefficient, basis) - a).norm() <= 1.01 * best + STORAGE[dtype] * a.norm()


def test_compress_ignores_nan_in_tokens_not_selected():
    x = torch.randn(2, 4, 40, 16)
    x[0, :, 0] = float("nan")
    x[1, :, 7] = float("inf")
    index = torch.stack([torch.arange(1, 31), torch.arange(8, 38)])
    index[:, -3:] = -1
    coefficient, basis = compress(x, index, 8)
    assert coefficient.isfinite().all() and basis.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_compress_refuses_numbers_that_are_not_finite(dtype, value):
    x = torch.randn(2, 4, 40, 16).to(dtype)
    x[1, 2, 5, 3:5] = value
    with pytest.raises(ValueError, match=r"attnpack::compress: 2 of 5120 numbers"):
        compress(x, torch.arange(40).expand(2, -1), 8)


def test_compress_takes_numbers_whose_sum_overflows():
    x = torch.full((1, 2, 10, 4), 1e37)
    coefficient, basis = compress(x, torch.arange(10)[None], 3)
    assert coefficient.isfinite().all() and basis.isfinite().all()


@pytest.mark.parametrize("tokens", [5, 300])
def test_samples_of_filler_alone_give_zeros(tokens):
    index = torch.full((2, tokens), -1)
    index[0] = torch.arange(tokens)
    coefficient, basis = compress(torch.randn(2, 4, tokens, 64), index, 16)
    assert coefficient[1].eq(0).all() and basis.isfinite().all() and coefficient[0].isfinite().all()


@given(
    seed=SEEDS,
    dtype=DTYPES,
    batch=st.integers(1, 3),
    tokens=st.integers(0, 50),
    added=st.integers(0, 20),
    old_rank=st.integers(1, 12),
    rank=st.integers(1, 40),
)
@settings(max_examples=150, deadline=None)
def test_fold_is_the_optimal_truncation_of_the_stacked_rows(seed, dtype, batch, tokens, added, old_rank, rank):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2, tokens, 8, generator=random).to(dtype)
    rows = torch.randn(added, batch, 2, 8, generator=random).to(dtype)
    coefficient, basis = compress(x, torch.arange(tokens).expand(batch, -1), old_rank)
    new_coefficient, new_basis, dropped = fold(coefficient, basis, rows, rank)
    expected = reference.fold(coefficient, basis, rows, rank)
    assert (new_coefficient.shape, new_basis.shape) == (expected[0].shape, expected[1].shape)
    assert new_coefficient.dtype == new_basis.dtype == dtype
    assert new_coefficient.is_contiguous() and new_basis.is_contiguous()
    assert dropped.dtype == torch.float32
    stacked = torch.cat([product(coefficient, basis), rows.double().transpose(0, 1).flatten(2)], 1)
    norm = stacked.norm()
    assert (dropped - expected[2]).abs().max() <= 1e-5 * norm + 1e-12
    best = (product(*expected[:2]) - stacked).norm()
    assert (product(new_coefficient, new_basis) - stacked).norm() <= best + STORAGE[dtype] * norm + 1e-12
    gram = new_basis.double().transpose(1, 2).flatten(2)
    identity = torch.eye(gram.shape[1], dtype=torch.float64)
    assert (gram @ gram.mT - identity).abs().max() < 10 * STORAGE[dtype] if gram.numel() else True


def test_fold_from_nothing_equals_compress():
    rows = torch.randn(30, 2, 4, 8)
    empty = compress(rows.permute(1, 2, 0, 3), torch.empty(2, 0, dtype=torch.int64), 8)
    coefficient, basis, _ = fold(*empty, rows, 8)
    expected = compress(rows.permute(1, 2, 0, 3), torch.arange(30).expand(2, -1), 8)
    assert relative_error(product(coefficient, basis), product(*expected)) < 1e-5


def test_fold_with_more_directions_than_old_rows():
    coefficient, basis = (
        torch.randn(1, 1, 4),
        torch.linalg.qr(torch.randn(1, 16, 4)).Q.mT.view(1, 4, 2, 8).transpose(1, 2),
    )
    rows = torch.randn(2, 1, 2, 8)
    new = fold(coefficient, basis.contiguous(), rows, 6)
    expected = reference.fold(coefficient, basis, rows, 6)
    assert new[0].shape == (1, 3, 6) and new[1].shape == (1, 2, 6, 8)
    assert relative_error(product(*new[:2]), product(*expected[:2])) < 1e-5


def test_repeated_folds_report_what_each_drops():
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 1, 4, 16, generator=random)
    coefficient, basis, dropped = fold(torch.zeros(1, 0, 0), torch.zeros(1, 4, 0, 16), rows[:20], 10)
    total = dropped.square()
    for start in (20, 40):
        coefficient, basis, dropped = fold(coefficient, basis, rows[start : start + 20], 10)
        total = total + dropped.square()
    error = (product(coefficient, basis) - rows.double().transpose(0, 1).flatten(2)).norm()
    assert error <= 3**0.5 * total.sqrt() * 1.001


def test_fold_refuses_numbers_that_are_not_finite():
    rows = torch.randn(3, 1, 2, 8)
    rows[1, 0, 1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"attnpack::fold: 1 of 48 numbers"):
        fold(torch.zeros(1, 0, 0), torch.zeros(1, 2, 0, 8), rows, 4)
