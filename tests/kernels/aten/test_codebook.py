"""The spec: weighted k-means of numbers on [-1, 1], gathered in bins, against one over the numbers themselves."""

from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx.kernels.aten.codebook import ITERATIONS, gathered, k_means, normal_levels

from ..inputs import SEEDS


def lloyd(numbers: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """As many of Lloyd's iterations, number by number."""
    for _ in range(ITERATIONS):
        nearest = (numbers[:, None] - levels).abs().argmin(1)
        for number in range(len(levels)):
            own = nearest == number
            if weights[own].sum() > 0:
                levels = levels.clone()
                levels[number] = (weights * numbers)[own].sum() / weights[own].sum()
    return levels


def distortion(numbers: Tensor, weights: Tensor, levels: Tensor) -> float:
    return float((weights * (numbers[:, None] - levels).square().amin(1)).sum() / weights.sum())


@given(seed=SEEDS, bits=st.sampled_from([2, 4]), power=st.sampled_from([1, 3]))
@settings(max_examples=10, deadline=None)
def test_as_good_as_k_means_over_the_numbers_themselves(seed, bits, power):
    random = torch.Generator().manual_seed(seed)
    numbers = torch.rand(2000, generator=random, dtype=torch.float64).mul_(2).sub_(1).pow_(power)
    weights = torch.rand(2000, generator=random, dtype=torch.float64).square()
    start = normal_levels(bits, 0.01).double()
    found = k_means(*gathered(numbers, weights), start)
    assert (found.diff() >= 0).all() and found.abs().max() <= 1
    expected = distortion(numbers, weights, lloyd(numbers, weights, start))
    # Either may end in a local optimum that the other passes by.
    assert distortion(numbers, weights, found) <= 1.1 * expected
    assert distortion(numbers, weights, found) < distortion(numbers, weights, start)


def test_weights_pull_levels_and_levels_without_any_stay():
    numbers = torch.tensor([-0.5, 0.25, 0.75], dtype=torch.float64)
    start = torch.tensor([-0.9, -0.6, 0.5, 0.9])
    mass, moment = gathered(numbers, torch.tensor([1.0, 3.0, 1.0]))
    assert float(mass.sum()) == 5 and float(moment.sum()) == pytest.approx(1.0)
    assert k_means(mass, moment, start).tolist() == pytest.approx([-0.9, -0.5, 0.25, 0.75])
    assert torch.equal(k_means(mass * 0, moment * 0, start), start.double())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
def test_levels_of_the_normal_distribution_are_means_of_their_cells(bits, share):
    levels = normal_levels(bits, share).double()
    assert levels.shape == (2**bits,) and (levels.diff() > 0).all() and levels[-1] < 1
    assert (levels + levels.flip(0)).abs().max() < 1e-3
    normal = NormalDist()
    end = normal.inv_cdf(1 - max(share, 1 / 512) / 2)
    edges = [-1.0, *((levels[1:] + levels[:-1]) / 2).tolist(), 1.0]
    for low, high, level in zip(edges[:-1], edges[1:], levels.tolist(), strict=True):
        mass = normal.cdf(high * end) - normal.cdf(low * end)
        mean = (normal.pdf(low * end) - normal.pdf(high * end)) / mass / end
        assert level == pytest.approx(mean, abs=0.05 * (high - low) + 1e-4)
