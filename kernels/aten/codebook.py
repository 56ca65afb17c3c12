"""Levels of a codebook on [-1, 1]: weighted k-means of numbers in bins, and that of the normal distribution.

KVQuant's "nuq" (arXiv 2401.18079, section 3.3): numbers are normalised to [-1, 1] by the thresholds of their vector,
and one k-means gives the levels of a whole tensor, each number weighing as much as its error matters.
"""

import functools
from statistics import NormalDist

import torch
from torch import Tensor

#: Bins of [-1, 1] in which numbers are gathered: 64 for each of 256 levels.
BINS = 1 << 14
ITERATIONS = 50


def gathered(numbers: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What numbers in [-1, 1] weigh in each of `BINS` bins, and the sum of weight times number: float64 `[BINS]`."""
    numbers, weights = numbers.flatten().double(), weights.flatten().double()
    place = ((numbers + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    mass = torch.bincount(place, weights, BINS)
    return mass, torch.bincount(place, weights * numbers, BINS)


def k_means(mass: Tensor, moment: Tensor, levels: Tensor) -> Tensor:
    """Levels `[k]`, ascending, float64, of numbers in bins (`gathered`), from a first guess of them.

    Lloyd's iterations: every bin goes to the level nearest to its middle, every level to the mean of its bins. A level
    without any weight stays where it is.
    """
    middle = _middles(mass.device)
    mass_below = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    moment_below = torch.cat([moment.new_zeros(1), moment.cumsum(0)])
    levels = levels.to(mass)
    for _ in range(ITERATIONS):
        edges = torch.searchsorted(middle, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), BINS)])
        weight, total = mass_below[edges].diff(), moment_below[edges].diff()
        levels = torch.where(weight > 0, total / weight, levels).sort().values
    return levels


@functools.cache
def normal_levels(bits: int, share: float) -> Tensor:
    """The k-means of a normal distribution cut off where `share` of it lies beyond on both sides: fp32 `[2^bits]`.

    It is cut at 3.1 standard deviations at most (`share` 1/512), about where a sample of some hundreds ends.
    """
    end = NormalDist().inv_cdf(1 - min(max(share, 1 / 512), 0.99) / 2)
    middle = _middles(torch.device("cpu"))
    mass = (-(end * middle).square() / 2).exp()
    # The best levels of many lie as dense as the cube root of the distribution (Panter & Dite 1951).
    beyond = NormalDist(0, 3**0.5).cdf(-end)
    quantile = beyond + (1 - 2 * beyond) * (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    start = torch.special.ndtri(quantile) * (3**0.5 / end)
    return k_means(mass, mass * middle, start).float()


def _middles(device: torch.device) -> Tensor:
    return (torch.arange(BINS, device=device, dtype=torch.float64) + 0.5) * (2 / BINS) - 1
