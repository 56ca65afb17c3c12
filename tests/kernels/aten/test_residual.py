"""The spec: E ~ left right per head, left with orthonormal columns, almost as good as the best of its rank."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels.aten.coded_rows import decode
from attnpack_fx.kernels.aten.residual import low_rank, with_residual
from attnpack_fx.kernels.aten.row_codes import Grouping, by_codebook, extremes, float8, keep_outliers, uniform
from attnpack_fx.kernels.parts import E4M3

from ..coded import BATCHES, DIMS, HEADS, LENGTHS, decoded, random_rows
from ..inputs import DTYPES, SEEDS, relative_error


@given(seed=SEEDS, n=st.integers(1, 40), dim=DIMS, rank=st.integers(1, 24), decay=st.floats(0.3, 1))
@settings(max_examples=40, deadline=None)
def test_nearly_the_best_of_its_rank(seed, n, dim, rank, decay):
    random = torch.Generator().manual_seed(seed)
    matrices = torch.randn(2, 3, n, dim, generator=random) * decay ** torch.arange(dim)
    left, right = low_rank(matrices, rank)
    r = min(rank, n, dim)
    assert left.shape == (2, 3, n, r) and right.shape == (2, 3, r, dim)
    assert (left.mT.double() @ left.double() - torch.eye(r)).abs().max() < 1e-5
    error = (matrices - left @ right).double().norm(dim=(-2, -1))
    singular = torch.linalg.svdvals(matrices.double())
    best, best_of_less = (singular[..., kept:].norm(dim=-1) for kept in (r, r - 1))
    assert (error <= singular.norm(dim=-1)).all()
    if decay < 0.6:  # three iterations may miss the last direction where the next is nearly as strong
        assert (error <= torch.maximum(1.2 * best, best_of_less) + 1e-5 * singular.norm(dim=-1)).all()


def test_matrices_of_lower_rank_and_of_nothing():
    matrices = torch.randn(5, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 4)
    left, right = low_rank(matrices, 3)
    assert relative_error(left @ right, matrices) < 1e-6
    left, right = low_rank(torch.zeros(2, 5, 4), 3)
    assert left.isfinite().all() and not right.any()
    assert low_rank(torch.zeros(2, 0, 4), 3)[0].shape == (2, 0, 0)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    first = low_rank(torch.ones(6, 5), 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert all(map(torch.equal, first, low_rank(torch.ones(6, 5), 2)))


@given(seed=SEEDS, batch=BATCHES, n=LENGTHS, heads=HEADS, dim=DIMS, dtype=DTYPES, channel=st.booleans())
@settings(max_examples=30, deadline=None)
def test_codes_are_read_as_the_spec_says(seed, batch, n, heads, dim, dtype, channel):
    rows = random_rows(seed, batch, n, heads, dim, dtype, filler=True)
    grouping = Grouping(5, channel)
    left_out = extremes(rows, 0.2, channel)
    levels = torch.linspace(-1, 1, 16).pow(3)
    shape = uniform(rows, 4, grouping).scale.shape
    for coded in (
        keep_outliers(uniform(rows, 2, grouping, left_out), rows, left_out),
        uniform(rows, 8, grouping),
        float8(rows, E4M3, grouping),
        by_codebook(rows, levels, -torch.ones(shape), torch.ones(shape), grouping),
    ):
        assert relative_error(decode(coded, dim), decoded(coded, dim)) < 1e-6


@given(seed=SEEDS, n=st.integers(1, 30), dim=DIMS, rank=st.integers(0, 4), dtype=DTYPES, channel=st.booleans())
@settings(max_examples=30, deadline=None)
def test_residual_lowers_the_error_and_leaves_filler_out(seed, n, dim, rank, dtype, channel):
    rows = random_rows(seed, 2, n, 2, dim, dtype, filler=True)
    grouping = Grouping(8, channel)
    coded = uniform(rows, 2, grouping)
    better = with_residual(coded, rows, rank, width=4)
    assert better.form.rank == 4 and better.left.dtype == better.right.dtype == dtype
    assert better.left.shape == (2, n, 2, 4) and better.right.shape == (2, 1, 2, 4, dim)
    assert not better.left[..., rank:].any() and not better.right[..., rank:, :].any()
    assert torch.equal(better.part_of, torch.zeros(2, n, dtype=torch.int32))
    for sample in range(2):
        real = (rows[sample] != 0).flatten(1).any(1)
        before, after = ((decoded(each, dim) - rows.double())[sample, real] for each in (coded, better))
        slack = 10 * torch.finfo(dtype).eps * float(before.norm() + rows[sample].double().norm())
        assert after.norm() <= before.norm() + slack
        if rank >= min(int(real.sum()), dim):
            assert after.norm() <= slack + 1e-5 * float(rows[sample].double().norm())


def test_a_residual_of_full_rank_is_lossless():
    rows = random_rows(0, 2, 24, 3, 8)
    grouping = Grouping(8, channel=True)
    full = with_residual(uniform(rows, 2, grouping), rows, 8, 8)
    assert relative_error(decoded(full, 8), rows) < 1e-6
    assert relative_error(decoded(uniform(rows, 2, grouping), 8), rows) > 1e-2
