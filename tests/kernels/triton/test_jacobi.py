"""The Jacobi kernel in Triton's interpreter against LAPACK in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..inputs import SEEDS
from .interpreted import jacobi

left_singular_vectors = jacobi.left_singular_vectors

SPECTRA = {
    "flat": lambda k: torch.ones(k),
    "slow": lambda k: torch.arange(1, k + 1) ** -0.5,
    "fast": lambda k: 10 ** -torch.linspace(0, 6, k),
    "pairs": lambda k: torch.arange(2, k + 2).div(2, rounding_mode="floor") ** -1.0,
    "lower rank": lambda k: (torch.arange(k) < (k + 1) // 2).float(),
}


def orthogonal(random: torch.Generator, size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64)).Q


def cholesky_factor(random: torch.Generator, spectrum: str, size: int) -> Tensor:
    """Of a Gram matrix with these singular values, shifted as `factorize.py` does it: float64."""
    vectors, singular = orthogonal(random, size), SPECTRA[spectrum](size).double()
    gram = (vectors * singular.square()) @ vectors.T
    return torch.linalg.cholesky(gram + 1e-13 * gram.trace() * torch.eye(size, dtype=torch.float64))


def assert_decomposed(x: Tensor, singular: Tensor, vectors: Tensor) -> None:
    """`vectors` are the leading left singular vectors of x, sorted, and `singular` all singular values."""
    exact = torch.linalg.svdvals(x.double())
    unit = exact[:, :1]
    assert ((singular - exact).abs() <= 4e-6 * unit).all()
    assert (singular.diff() <= 0).all()
    count = vectors.shape[1]
    gram = vectors.double() @ vectors.double().mT
    assert (gram - torch.eye(count, dtype=torch.float64)).abs().max() < 5e-6
    # The rows of V^T X are orthogonal, with the singular values as norms: also where those are equal.
    turned = vectors.double() @ x.double()
    assert (
        (turned @ turned.mT - torch.diag_embed(exact[:, :count].square())).abs() <= 8e-6 * unit[..., None] ** 2
    ).all()


@pytest.mark.slow
@given(
    seed=SEEDS,
    matrices=st.integers(1, 2),
    size=st.integers(1, 16),
    count=st.integers(1, 16),
    spectrum=st.sampled_from(sorted(SPECTRA)),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
@settings(max_examples=25, deadline=None)
def test_factors_of_gram_matrices(seed, matrices, size, count, spectrum, scale):
    random = torch.Generator().manual_seed(seed)
    x = scale * torch.stack([cholesky_factor(random, spectrum, size) for _ in range(matrices)]).float()
    assert_decomposed(x, *left_singular_vectors(x, min(count, size)))


@given(seed=SEEDS, size=st.integers(1, 16))
@settings(max_examples=8, deadline=None)
def test_any_square_matrix(seed, size):
    x = torch.randn(1, size, size, generator=torch.Generator().manual_seed(seed))
    assert_decomposed(x, *left_singular_vectors(x, size))


@pytest.mark.parametrize("size", [33, 80])
def test_sizes_of_models(size):
    x = cholesky_factor(torch.Generator().manual_seed(size), "slow", size).float()[None]
    assert_decomposed(x, *left_singular_vectors(x, size - 16))


@pytest.mark.slow
def test_the_largest_matrix(monkeypatch):
    """Nearly diagonal, so that few sweeps do."""
    monkeypatch.setattr(jacobi, "TILE", 1 << 17)  # all pairs at once: the interpreter's time goes by launches of a tile
    random = torch.Generator().manual_seed(0)
    x = torch.diag(torch.linspace(2, 1, 288)) + 1e-6 * torch.randn(288, 288, generator=random)
    assert_decomposed(x[None], *left_singular_vectors(x[None], 256))


@pytest.mark.parametrize("size", [19, 24])
def test_pairs_that_take_several_tiles(monkeypatch, size):
    monkeypatch.setattr(jacobi, "TILE", 128)
    assert jacobi.tile(size)[0] == 4
    x = torch.randn(1, size, size, generator=torch.Generator().manual_seed(0))
    assert_decomposed(x, *left_singular_vectors(x, size))


def test_smaller_matrices_filled_up_by_zeros_come_out_as_if_alone():
    x = torch.zeros(2, 9, 9)
    small = cholesky_factor(torch.Generator().manual_seed(0), "lower rank", 6).float()
    x[0, :6, :6] = small
    singular, vectors = left_singular_vectors(x, 9)
    assert_decomposed(small[None], singular[:1, :6], vectors[:1, :6, :6])
    assert singular[0, 6:].eq(0).all() and vectors[0, 6:].eq(0).all() and vectors[0, :, 6:].eq(0).all()
    assert singular[1].eq(0).all() and vectors[1].eq(0).all()


def test_numbers_that_are_not_finite_end_the_sweeps():
    singular, _ = left_singular_vectors(torch.full((1, 4, 4), float("nan")), 2)
    assert singular.shape == (1, 4)


def test_tiles_give_every_thread_the_same_numbers():
    for size in range(1, 520):
        pairs, width, warps = jacobi.tile(size + size % 2)
        assert width >= size and warps <= 16
        assert pairs * width <= jacobi.TILE and pairs * width >= 32 * warps
