import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels.aten.svd import truncated_svd
from attnpack_fx.kernels.linalg import orthonormal

from ..inputs import SEEDS, relative_error


def with_spectrum(rows: int, columns: int, singular: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A matrix of the given singular values with random singular vectors, fp32 `[1, rows, columns]`."""
    random = torch.Generator().manual_seed(seed)
    size = len(singular)
    left = torch.linalg.qr(torch.randn(rows, size, generator=random, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, size, generator=random, dtype=torch.float64)).Q
    return ((left * singular) @ right.T).float()[None]


def orthonormality_error(basis: torch.Tensor) -> float:
    identity = torch.eye(basis.shape[1], dtype=torch.float64)
    return float((basis.double() @ basis.double().mT - identity).abs().max())


@pytest.mark.parametrize("decay", [0.5, 1.0, 1.5, 3.0])
@pytest.mark.parametrize(("rows", "columns"), [(576, 1024), (1024, 512)])
@pytest.mark.parametrize("rank", [16, 64])
def test_error_is_near_the_optimum(decay, rows, columns, rank):
    singular = torch.arange(1, min(rows, columns) + 1, dtype=torch.float64) ** -decay
    a = with_spectrum(rows, columns, singular)
    coefficient, basis = truncated_svd(a, rank)
    error = torch.linalg.norm(a.double() - coefficient.double() @ basis.double())
    allowed = 1.02 if decay == 0.5 else 1.01
    assert error <= allowed * singular[rank:].square().sum().sqrt() + 5e-6 * singular.norm()
    assert orthonormality_error(basis) < 1e-5


@pytest.mark.parametrize("period", [1, 8, 40, 80])
def test_rows_that_repeat(period):
    """In a sum of the sketch they are then all alike, which must not make them vanish."""
    random = torch.Generator().manual_seed(0)
    a = torch.randn(1, period, 200, generator=random).repeat(1, 480 // period, 1)
    coefficient, basis = truncated_svd(a, 16)
    best = torch.linalg.svdvals(a.double())[0, 16:].norm()
    error = torch.linalg.norm(a.double() - coefficient.double() @ basis.double())
    assert error <= 1.02 * best + 1e-5 * a.norm()


def test_one_row_that_is_unlike_all_others():
    a = torch.randn(1, 480, 200, generator=torch.Generator().manual_seed(0))
    a[:, :, 0] = 0
    a[0, 123] = 0
    a[0, 123, 0] = 1e3
    coefficient, basis = truncated_svd(a, 16)
    assert relative_error(coefficient @ basis, a) < 0.5
    assert (coefficient @ basis)[0, 123, 0] == pytest.approx(1e3, rel=1e-3)


@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    rows=st.integers(1, 90),
    columns=st.integers(1, 90),
    rank=st.integers(1, 100),
    conditioning=st.sampled_from([0.0, 2.0, 8.0]),
)
@settings(max_examples=100, deadline=None)
def test_full_rank_is_lossless(seed, batch, rows, columns, rank, conditioning):
    random = torch.Generator().manual_seed(seed)
    size = min(rows, columns, rank)
    # Columns and rows of a power-law range of norms: as badly conditioned as `conditioning` decades.
    left = torch.randn(batch, rows, size, generator=random) * 10 ** -torch.linspace(0, conditioning, size)
    a = left @ torch.randn(batch, size, columns, generator=random)
    coefficient, basis = truncated_svd(a, rank)
    assert coefficient.shape == (batch, rows, size) and basis.shape == (batch, size, columns)
    assert relative_error(coefficient @ basis, a) < (3e-6 if size == min(rows, columns) else 1e-5)
    assert orthonormality_error(basis) < 1e-5


@pytest.mark.parametrize("true_rank", [0, 1, 5, 20])
def test_matrices_of_lower_rank_than_asked_for(true_rank):
    a = torch.zeros(3, 220, 300)
    a[:2] = with_spectrum(220, 300, torch.ones(true_rank, dtype=torch.float64))
    coefficient, basis = truncated_svd(a, 20)
    assert relative_error(coefficient @ basis, a) < 1e-5
    assert orthonormality_error(basis) < 1e-5
    assert coefficient[2].eq(0).all() and coefficient.isfinite().all()


@pytest.mark.parametrize("rank", [20, 190])
def test_columns_carry_the_singular_values_in_order(rank):
    singular = torch.arange(1, 221, dtype=torch.float64) ** -0.7
    coefficient, _ = truncated_svd(with_spectrum(220, 300, singular), rank)
    norms = coefficient[0].double().norm(dim=0)
    assert (norms.diff() <= 3e-3 * norms[0]).all()
    assert torch.allclose(norms[: rank // 2], singular[: rank // 2], rtol=0.02)


@pytest.mark.parametrize("factor", [1e-18, 1e-6, 1.0, 1e6, 1e18])
def test_scale_of_the_matrix_does_not_matter(factor):
    a = with_spectrum(220, 300, torch.arange(1, 221, dtype=torch.float64) ** -1.0)
    coefficient, basis = truncated_svd(a * factor, 20)
    plain, plain_basis = truncated_svd(a, 20)
    assert relative_error(coefficient @ basis / factor, a) == pytest.approx(
        relative_error(plain @ plain_basis, a), rel=1e-3
    )


def test_is_deterministic_and_leaves_the_global_random_state_alone():
    a = torch.randn(1, 220, 300)
    state = torch.get_rng_state()
    first, second = truncated_svd(a, 20), truncated_svd(a, 20)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_every_sample_of_a_batch_is_factored_as_if_alone():
    a = torch.randn(3, 150, 200) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    coefficient, basis = truncated_svd(a, 16)
    for sample in range(3):
        alone = truncated_svd(a[sample : sample + 1], 16)
        assert relative_error((coefficient @ basis)[sample : sample + 1], alone[0] @ alone[1]) < 1e-3


@pytest.mark.parametrize("conditioning", [0, 3, 6])
def test_orthonormal(conditioning):
    z = with_spectrum(100, 20, 10 ** -torch.linspace(0, conditioning, 20, dtype=torch.float64))
    once = orthonormal(z)
    assert orthonormality_error(orthonormal(once).mT) < 1e-5
    # The same columns span the same spaces: what is left of z outside is rounding.
    inside = once.double() @ torch.linalg.lstsq(once.double(), z.double()).solution
    assert relative_error(inside, z) < 1e-5
