"""Factors by sketch and alignment against the float64 reference.

Where the subject is not the Jacobi kernel, which Triton's interpreter runs slowly, LAPACK stands in for it.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnpack_fx.kernels import aten, reference
from attnpack_fx.kernels.balance import lengths
from attnpack_fx.kernels.linalg import sketch_size

from ..inputs import DTYPES, SEEDS, relative_error
from .interpreted import factorize

align, compress, fold, sketch = factorize.align, factorize.compress, factorize.fold, factorize.sketch

#: What the storage dtype may add to the relative error of a product: factors are rounded, and so is what spans them.
STORAGE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def lapack(monkeypatch):
    """The small eigenproblem solved by LAPACK, in what the kernel promises."""

    def left_singular_vectors(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        left, singular, _ = torch.linalg.svd(x.double())
        left = left.mT[:, :count] * (singular[:, :count, None] > 0)
        return singular.float(), left.float()

    monkeypatch.setattr(factorize, "left_singular_vectors", left_singular_vectors)


def product(coefficient: Tensor, basis: Tensor) -> Tensor:
    """`[B, N, H * D]` in float64."""
    return coefficient.double() @ basis.double().transpose(1, 2).flatten(2)


def selected(x: Tensor, index: Tensor) -> Tensor:
    return reference.take_rows(x.double(), index, 0).transpose(0, 1).flatten(2)


def everything(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2]).expand(x.shape[0], -1)


def orthonormality_error(basis: Tensor) -> float:
    """Of rows of length 1, or in half precision of a power of two."""
    rows = basis.double().transpose(1, 2).flatten(2)
    if basis.dtype == torch.float16:
        rows = rows / lengths(basis)[:, None, None]
    identity = torch.eye(rows.shape[1], dtype=torch.float64)
    return float((rows @ rows.mT - identity).abs().max()) if rows.numel() else 0.0


def with_spectrum(tokens: int, heads: int, dim: int, singular: Tensor, seed: int = 0) -> Tensor:
    """Keys `[1, H, T, D]` of the given singular values."""
    random = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(tokens, len(singular), generator=random)).Q
    right = torch.linalg.qr(torch.randn(heads * dim, len(singular), generator=random)).Q
    return ((left * singular) @ right.T).view(1, tokens, heads, dim).transpose(1, 2)


def assert_as_good(x: Tensor, index: Tensor, rank: int, coefficient: Tensor, basis: Tensor) -> None:
    expected = reference.compress(x, index, rank)
    assert (coefficient.shape, basis.shape) == (expected[0].shape, expected[1].shape)
    assert coefficient.dtype == basis.dtype == x.dtype
    assert coefficient.is_contiguous() and basis.is_contiguous()
    assert coefficient[index < 0].eq(0).all()
    assert orthonormality_error(basis) < 5 * STORAGE[x.dtype]
    a = selected(x, index)
    if a.numel():
        best = (product(*expected) - a).norm()
        assert (product(coefficient, basis) - a).norm() <= 1.01 * best + STORAGE[x.dtype] * a.norm()


# ---- compress ----------------------------------------------------------------------------------------------


def drawn(seed: int, dtype: torch.dtype, size: tuple[int, ...], chosen: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=random).to(dtype)
    return x, torch.randint(-1, size[2], (size[0], chosen), generator=random)


@given(
    seed=SEEDS,
    dtype=DTYPES,
    size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 60), st.sampled_from([4, 16, 32])),
    chosen=st.integers(0, 60),
    rank=st.integers(1, 40),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_compress_is_as_good_as_the_reference(lapack, seed, dtype, size, chosen, rank):
    x, index = drawn(seed, dtype, size, chosen)
    assert_as_good(x, index, rank, *compress(x, index, rank))


@given(seed=SEEDS, dtype=DTYPES, heads=st.integers(1, 2), tokens=st.integers(1, 14), rank=st.integers(1, 12))
@settings(max_examples=10, deadline=None)
def test_compress_with_the_kernel(seed, dtype, heads, tokens, rank):
    x, index = drawn(seed, dtype, (1, heads, tokens, 8), tokens)
    assert_as_good(x, index, rank, *compress(x, index, rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_power_iteration_with_the_kernel(dtype):
    x, index = drawn(0, dtype, (1, 2, 50, 24), 50)
    assert sketch_size(6) < 48
    assert_as_good(x, index, 6, *compress(x, index, 6))


@pytest.mark.parametrize("decay", [0.5, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("rank", [16, 64])
def test_a_sketch_holds_all_but_one_percent(decay, rank):
    singular = torch.arange(1, 577) ** -decay
    x = with_spectrum(576, 32, 128, singular)
    coefficient, spanned = sketch([x], everything(x), rank)
    q = torch.linalg.qr(spanned[0, 0].flatten(0, 1).double()).Q
    a = selected(x, everything(x))[0]
    kept = torch.linalg.svdvals(a @ q)[:rank]
    error = (a.square().sum() - kept.square().sum()).clamp(min=0).sqrt()
    assert error <= 1.01 * singular[rank:].double().norm() + 3e-6 * singular.norm()
    # What is stored beside it is that projection.
    metric = spanned[0, 0].flatten(0, 1).double()
    assert relative_error(coefficient[0, 0], a @ metric) < 3e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1.01), (torch.bfloat16, 1.02)])
@pytest.mark.parametrize("rank", [16, 64])
def test_half_precision_costs_no_more_than_its_storage(lapack, dtype, limit, rank):
    x = 30 * with_spectrum(300, 8, 64, torch.arange(1, 301) ** -1.0).to(dtype)
    a = selected(x, everything(x))
    error = (product(*compress(x, everything(x), rank)) - a).norm()
    assert error <= limit * torch.linalg.svdvals(a)[0, rank:].norm()


@pytest.mark.parametrize("true_rank", [0, 1, 5, 20])
@pytest.mark.parametrize("rank", [20, 100])
@pytest.mark.parametrize("dtype", list(STORAGE))
def test_matrices_of_lower_rank_than_asked_for(lapack, true_rank, rank, dtype):
    x = torch.zeros(3, 4, 90, 32)
    x[:2] = with_spectrum(90, 4, 32, torch.ones(true_rank))
    x = x.to(dtype)
    coefficient, basis = compress(x, everything(x), rank)
    assert relative_error(product(coefficient, basis), selected(x, everything(x))) < STORAGE[dtype]
    assert orthonormality_error(basis) < 5 * STORAGE[dtype]
    assert coefficient[2].eq(0).all()


@pytest.mark.parametrize("tokens", [5, 70])
def test_samples_of_filler_alone_give_zeros(lapack, tokens):
    index = torch.full((2, tokens), -1)
    index[0] = torch.arange(tokens)
    coefficient, basis = compress(torch.randn(2, 4, tokens, 64), index, 16)
    assert coefficient[1].eq(0).all() and coefficient[0].isfinite().all() and orthonormality_error(basis) < 1e-5


@pytest.mark.parametrize("dtype", list(STORAGE))
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("rank", [8, 100])
def test_scale_of_the_matrix_does_not_matter(lapack, dtype, scale, rank):
    random = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 4, 60, 16, generator=random) * scale).to(dtype)
    assert_as_good(x, everything(x), rank, *compress(x, everything(x), rank))


def test_numbers_whose_squares_overflow():
    x = torch.full((1, 2, 10, 4), 1e37)
    coefficient, basis = compress(x, torch.arange(10)[None], 3)
    assert relative_error(product(coefficient, basis), selected(x, torch.arange(10)[None])) < 1e-6


@pytest.mark.parametrize("rank", [12, 60])
def test_columns_are_sorted_and_orthogonal(lapack, rank):
    singular = torch.arange(2, 82).div(2, rounding_mode="floor") ** -0.7
    x = with_spectrum(80, 4, 24, singular)
    coefficient, _ = compress(x, everything(x), rank)
    gram = coefficient[0].double().mT @ coefficient[0].double()
    norms = gram.diagonal().sqrt()
    assert (norms.diff() <= 1e-6 * norms[0]).all()
    assert (gram - torch.diag(norms.square())).abs().max() < 1e-6 * norms[0] ** 2
    if rank == 60:  # no iteration
        assert (norms - singular[:60]).abs().max() < 1e-6


def test_compress_ignores_nan_in_tokens_not_selected(lapack):
    x = torch.randn(2, 4, 40, 16)
    x[0, :, 0] = float("nan")
    x[1, :, 7] = float("inf")
    index = torch.stack([torch.arange(1, 31), torch.arange(8, 38)])
    index[:, -3:] = -1
    coefficient, basis = compress(x, index, 8)
    assert coefficient.isfinite().all() and basis.isfinite().all()


def test_numbers_that_are_not_finite_are_refused():
    x = torch.randn(2, 4, 40, 16)
    x[1, 2, 5, 3:5] = float("nan")
    with pytest.raises(ValueError, match="attnpack::compress: 2 of 5120 numbers"):
        compress(x, everything(x), 8)
    with pytest.raises(ValueError, match="attnpack::fold: 2 of 5120 numbers"):
        fold(torch.zeros(2, 0, 0), torch.zeros(2, 4, 0, 16), x.permute(2, 0, 1, 3), 4)


def test_is_deterministic_and_leaves_the_global_random_state_alone(lapack):
    x = torch.randn(1, 4, 80, 32)
    state = torch.get_rng_state()
    first, second = compress(x, everything(x), 8), compress(x, everything(x), 8)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# ---- many at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [factorize, aten.factorize], ids=["triton", "aten"])
def test_one_alignment_of_many_equals_each_alone(lapack, implementation):
    """Keys and values of one sketch, layers of other widths, ranks and numbers of tokens, and one without tokens."""
    random = torch.Generator().manual_seed(0)
    layers = []
    for heads, tokens, dim, ranks in ((2, 30, 8, (4, 4)), (1, 9, 8, (5, 9)), (1, 0, 8, (2, 2)), (3, 17, 12, (2, 17))):
        pair = [torch.randn(2, heads, tokens, dim, generator=random) for _ in range(2)]
        layers.append((pair, everything(pair[0]), ranks))
    sketches = [implementation.sketch(pair, index, max(ranks)) for pair, index, ranks in layers]
    coefficients, spanned = (list(part) for part in zip(*sketches, strict=True))
    assert spanned[0].shape == (2, 2, 2, 8, 16) and coefficients[3].shape == (2, 2, 17, 17)
    factors = implementation.align(coefficients, spanned, [rank for *_, ranks in layers for rank in ranks])
    alone = [
        implementation.compress(x, index, rank)
        for pair, index, ranks in layers
        for x, rank in zip(pair, ranks, strict=True)
    ]  # fmt: skip
    assert len(factors) == 2 * len(alone)
    for number, expected in enumerate(alone):
        coefficient, basis = factors[2 * number : 2 * number + 2]
        assert (coefficient.shape, basis.shape) == (expected[0].shape, expected[1].shape)
        if coefficient.numel():  # rounding, as large as singular values near the cut are close
            assert relative_error(product(coefficient, basis), product(*expected)) < 3e-5


def test_large_batches_are_sketched_in_parts(lapack, monkeypatch):
    pair = [torch.randn(5, 2, 40, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    whole = sketch(pair, everything(pair[0]), 4)
    monkeypatch.setattr(factorize, "PART_BYTES", 2 * 2 * 2 * 16 * (40 * 4 + 24 * sketch_size(4)))
    parts = sketch(pair, everything(pair[0]), 4)
    assert all(relative_error(left, right) < 1e-5 for left, right in zip(parts, whole, strict=True))


def test_matrices_too_large_for_the_kernel(lapack, monkeypatch):
    x, index = drawn(0, torch.float32, (2, 2, 30, 16), 30)
    index[1] = -1
    monkeypatch.setattr(factorize, "LARGEST", 8)
    assert_as_good(x, index, 30, *compress(x, index, 30))


# ---- fold --------------------------------------------------------------------------------------------------


def assert_folded(coefficient: Tensor, basis: Tensor, rows: Tensor, rank: int) -> None:
    dtype = coefficient.dtype
    new_coefficient, new_basis, dropped = fold(coefficient, basis, rows, rank)
    expected = reference.fold(coefficient, basis, rows, rank)
    assert (new_coefficient.shape, new_basis.shape) == (expected[0].shape, expected[1].shape)
    assert new_coefficient.dtype == new_basis.dtype == dtype and dropped.dtype == torch.float32
    assert new_coefficient.is_contiguous() and new_basis.is_contiguous()
    stacked = torch.cat([product(coefficient, basis), rows.double().transpose(0, 1).flatten(2)], 1)
    norm = stacked.norm()
    assert (dropped - expected[2]).abs().max() <= 1e-5 * norm + 1e-12
    best = (product(*expected[:2]) - stacked).norm()
    assert (product(new_coefficient, new_basis) - stacked).norm() <= best + STORAGE[dtype] * norm + 1e-12
    assert orthonormality_error(new_basis) < 5 * STORAGE[dtype]


def segment(seed: int, dtype: torch.dtype, batch: int, tokens: int, rank: int, added: int) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2, tokens, 8, generator=random).to(dtype)
    rows = torch.randn(added, batch, 2, 8, generator=random).to(dtype)
    coefficient, basis = reference.compress(x, everything(x), rank)
    return coefficient.to(dtype), basis.to(dtype), rows


@given(
    seed=SEEDS,
    dtype=DTYPES,
    batch=st.integers(1, 3),
    tokens=st.integers(0, 50),
    added=st.integers(0, 20),
    old_rank=st.integers(1, 12),
    rank=st.integers(1, 40),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fold_is_the_optimal_truncation_of_the_stacked_rows(lapack, seed, dtype, batch, tokens, added, old_rank, rank):
    assert_folded(*segment(seed, dtype, batch, tokens, old_rank, added), rank)


@given(seed=SEEDS, dtype=DTYPES, tokens=st.integers(0, 12), added=st.integers(0, 6), rank=st.integers(1, 12))
@settings(max_examples=8, deadline=None)
def test_fold_with_the_kernel(seed, dtype, tokens, added, rank):
    assert_folded(*segment(seed, dtype, 1, tokens, 5, added), rank)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("dtype", list(STORAGE))
def test_fold_of_rows_of_another_scale(lapack, scale, dtype):
    coefficient, basis, rows = segment(0, dtype, 2, 30, 6, 10)
    assert_folded(coefficient, basis, rows * scale, 8)
    assert_folded(coefficient, basis, rows * scale, 16)


def test_fold_of_rows_already_spanned_and_of_zeros(lapack):
    coefficient, basis, rows = segment(0, torch.float32, 2, 30, 6, 4)
    inside = product(coefficient, basis)[:, :3].float().unflatten(2, (2, 8)).transpose(0, 1)
    for same in (inside, torch.zeros_like(rows), torch.cat([rows, rows])):
        assert_folded(coefficient, basis, same, 16)


def test_fold_with_more_directions_than_old_rows(lapack):
    basis = torch.linalg.qr(torch.randn(1, 16, 4)).Q.mT.view(1, 4, 2, 8).transpose(1, 2)
    assert_folded(torch.randn(1, 1, 4), basis.contiguous(), torch.randn(2, 1, 2, 8), 6)


def test_repeated_folds_report_what_each_drops(lapack):
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 1, 4, 16, generator=random)
    coefficient, basis, dropped = fold(torch.zeros(1, 0, 0), torch.zeros(1, 4, 0, 16), rows[:20], 10)
    total = dropped.square()
    for start in (20, 40):
        coefficient, basis, dropped = fold(coefficient, basis, rows[start : start + 20], 10)
        total = total + dropped.square()
    error = (product(coefficient, basis) - rows.double().transpose(0, 1).flatten(2)).norm()
    assert error <= 3**0.5 * total.sqrt() * 1.001


@pytest.mark.parametrize("dtype", list(STORAGE))
def test_a_chain_of_lossless_folds_loses_only_rounding(lapack, dtype):
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(24, 2, 2, 8, generator=random).to(dtype)
    coefficient, basis = torch.zeros(2, 0, 0, dtype=dtype), torch.zeros(2, 2, 0, 8, dtype=dtype)
    for start in range(0, 24, 4):
        coefficient, basis, dropped = fold(coefficient, basis, rows[start : start + 4], 16)
        assert dropped.max() < 1e-5 * rows.double().norm()
    assert relative_error(product(coefficient, basis), rows.double().transpose(0, 1).flatten(2)) < 3 * STORAGE[dtype]
    assert orthonormality_error(basis) < 5 * STORAGE[dtype]


# ---- on a GPU ----------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_reads_a_number_or_calls_a_sequential_factorisation(monkeypatch, dtype):
    monkeypatch.setattr(factorize, "require_finite", lambda tokens, operator: None)
    monkeypatch.setattr(
        factorize, "left_singular_vectors", lambda x, count: (torch.ones(x.shape[:2]), x[:, :count] + 1.0)
    )
    pair = [torch.randn(2, 4, 100, 32).to(dtype) for _ in range(2)]
    rows = torch.randn(5, 2, 4, 32).to(dtype)
    with Recorder() as recorder:
        factors = align(*([part] for part in sketch(pair, everything(pair[0]), 16)), [16, 8])
        fold(*factors[:2], rows, 16)
        compress(pair[0], everything(pair[0]), 100)
    assert "aten.linalg_cholesky_ex.default" in recorder.names
    banned = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "svd", "eig", "linalg_qr", "geqrf", "lu_factor")
    assert not [name for name in recorder.names for word in banned if word in name]
