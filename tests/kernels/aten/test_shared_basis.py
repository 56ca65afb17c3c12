import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten.shared_basis import compress_shared

from ..inputs import SEEDS, relative_error


def samples(batch: int, seed: int, strangers: int, tokens: int = 12) -> torch.Tensor:
    """Tokens `[B, 2, tokens, 8]` near one space of four dims, but for those of the last samples, far from it."""
    random = torch.Generator().manual_seed(seed)
    common, other = (torch.randn(4, 16, generator=random) for _ in range(2))
    x = torch.randn(batch, tokens, 4, generator=random) @ common
    x[batch - strangers :] = torch.randn(strangers, tokens, 4, generator=random) @ other
    x += 0.01 * torch.randn(x.shape, generator=random)
    return x.unflatten(2, (2, 8)).transpose(1, 2)


def rebuilt(coefficient, bases, owner, common=None):
    every = bases if common is None else torch.cat([common[:, :, : bases.shape[2]].to(bases.dtype), bases])
    return coefficient[:, None] @ every[owner]


@given(
    seed=SEEDS,
    batch=st.integers(1, 4),
    strangers=st.integers(0, 4),
    rank=st.sampled_from([1, 4, 6, 40]),
    known=st.booleans(),
    filler=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_matches_the_reference(seed, batch, strangers, rank, known, filler):
    x = samples(batch, seed, min(strangers, batch))
    index = torch.arange(12).expand(batch, -1).clone()
    index[0, 12 - filler :] = -1
    common = torch.linalg.qr(torch.randn(16, 5, generator=torch.Generator().manual_seed(seed))).Q.T
    common = common.unflatten(1, (2, 8)).transpose(0, 1)[None].contiguous() if known else None
    actual = compress_shared(x, index, rank, 0.2, common)
    expected = reference.compress_shared(x, index, rank, 0.2, common)
    assert actual[0].shape == expected[0].shape and actual[1].shape == expected[1].shape
    assert torch.equal(actual[2], expected[2])
    assert relative_error(rebuilt(*actual, common), rebuilt(*expected, common), floor=0.01) < 1e-4
    assert actual[0][index < 0].eq(0).all()


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 2.0])
def test_who_gets_a_basis_of_its_own(tolerance):
    x, index = samples(4, 0, 1), torch.arange(12).expand(4, -1).clone()
    _, bases, owner = compress_shared(x, index, 4, tolerance, None)
    expected = {0.0: [0, 1, 2, 3], 0.05: [0, 0, 0, 1], 2.0: [0, 0, 0, 0]}[tolerance]
    assert owner.tolist() == expected and bases.shape == (1 + max(expected), 2, 4, 8)


def test_half_precision_is_factored_in_float32():
    x, index = samples(3, 1, 0).bfloat16(), torch.arange(12).expand(3, -1).clone()
    coefficient, bases, owner = compress_shared(x, index, 4, 0.05, None)
    assert coefficient.dtype == bases.dtype == torch.bfloat16
    assert relative_error(rebuilt(coefficient, bases, owner), x) < 0.02


def test_nan_is_refused():
    x = samples(2, 0, 0)
    x[1, 0, 3, 2] = torch.nan
    with pytest.raises(ValueError, match="compress_shared: 1 of"):
        compress_shared(x, torch.arange(12).expand(2, -1).clone(), 4, 0.1, None)
