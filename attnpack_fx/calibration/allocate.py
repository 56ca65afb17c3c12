"""Bits for every component of every packed matrix, by reverse water-filling with measured errors.

Component i of a matrix, one column of coefficients and one row of the basis, costs effect_i where it is dropped and
effect_i * error(bits) where it is kept in `bits` bits. Wanted is the least sum over all components whose bytes stay
within a budget, or the fewest bytes whose sum stays within an error, with bits non-increasing along a matrix (its
components are sorted by singular value; factors are stored as blocks of columns).

On the lower convex hull of a matrix's (bytes, error) points, upgrades by falling gain per byte are optimal up to the
last one (Shoham & Gersho 1988); with error(bits) = 4^-bits this is reverse water-filling (Cover & Thomas, 10.3.3).
Where effects rise along a matrix, neighbours are pooled until their means do not (isotonic regression), and a pool is
upgraded as one.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: Relative squared error of a component whose column and row are both in so many bits, |c b - c' b'|^2 / |c b|^2: means
#: over 256 Gaussian columns of 576 and rows of 4096 through kernels/aten/quantize.py.
ERROR = {2: 0.224, 4: 0.0229, 8: 1.33e-4}


@dataclass(frozen=True, eq=False)
class Matrix:
    """One packed key or value segment, as the allocation sees it.

    name: unlike every other's.
    effect: `[R]`, what dropping component i wholly costs, >= 0, in units of the caller's choice, alike in all matrices.
    column_bytes: what a component costs at one bit, (N + H * D) / 8.
    dtype_bits: 16 or 32, what a number takes that is not quantised.
    overhead_bytes: what a quantised component costs besides; by default two fp32 scales.
    optional: may be left without any component.

    Raises `ValueError` for values no matrix can have.
    """

    name: str
    effect: Tensor
    column_bytes: float
    dtype_bits: int = 16
    overhead_bytes: float = 8.0
    optional: bool = False

    def __post_init__(self) -> None:
        if self.effect.dim() != 1 or (not self.optional and self.effect.shape[0] == 0):
            raise ValueError(
                f"{self.name}: got effects of shape {list(self.effect.shape)}, expected [R] with R >= 1; "
                "a matrix that may have no component is optional=True"
            )
        if not bool((self.effect >= 0).all()) or not bool(self.effect.isfinite().all()):
            raise ValueError(f"{self.name}: got negative, NaN or infinite effects, expected numbers >= 0; clamp them")
        if not 0 < self.column_bytes < math.inf or not 0 <= self.overhead_bytes < math.inf:
            raise ValueError(
                f"{self.name}: got column_bytes={self.column_bytes} and overhead_bytes={self.overhead_bytes}, expected "
                "a number > 0 and one >= 0; column_bytes is (N + H * D) / 8"
            )
        if self.dtype_bits not in (16, 32):
            raise ValueError(f"{self.name}: got dtype_bits={self.dtype_bits}, expected 16 or 32, as the model's dtype")

    def bytes(self, bits: int) -> float:
        """What one component costs at `bits` bits."""
        return self.column_bytes * bits + (self.overhead_bytes if 0 < bits < self.dtype_bits else 0)

    def error(self, bits: int) -> float:
        """The share of a component's effect that `bits` bits leave."""
        return 1.0 if bits == 0 else 0.0 if bits == self.dtype_bits else ERROR[bits]


@dataclass(frozen=True)
class Allocation:
    """Bits for the components of every matrix.

    blocks: by name, in order of components, `(columns, bits)` with falling bits: at most four, the last components
        without any. bits = dtype_bits means as it is.
    error: the sum of effects that are left, in units of the effects.
    bytes: of all blocks.
    """

    blocks: dict[str, tuple[tuple[int, int], ...]]
    error: float
    bytes: float


def allocate(matrices: Sequence[Matrix], budget: float) -> Allocation:
    """The least error within `budget` bytes, up to the last upgrade; never more with a larger budget.

    Every matrix that is not optional keeps one component, at the first bits that are worth their bytes. Raises
    `ValueError` if that alone is beyond the budget, or if two matrices have one name.
    """
    upgrades = _Upgrades(matrices)
    if not budget >= upgrades.least:
        raise ValueError(
            f"budget: got {budget} bytes, expected at least {upgrades.least:g}, what one component of every matrix "
            "costs; raise the budget, or mark matrices as optional"
        )
    return upgrades.allocation(upgrades.filled(budget))


def allocate_for_error(matrices: Sequence[Matrix], max_error: float) -> Allocation:
    """The fewest bytes whose error is at most `max_error`, up to the last upgrade; never fewer for a smaller error.

    Every matrix that is not optional keeps one component. Raises `ValueError` for `max_error` < 0, or if two matrices
    have one name.
    """
    if not max_error >= 0:
        raise ValueError(f"max_error: got {max_error}, expected a number >= 0; 0 keeps every component as it is")
    upgrades = _Upgrades(matrices)
    number = upgrades.number_for(max_error)
    found = upgrades.allocation(upgrades.finished(max(number - 1, 0), max_error))
    while found.error > max_error:  # by rounding
        found = upgrades.allocation(upgrades.components(number))
        number += 1
    return found


@dataclass(frozen=True)
class _Chain:
    """The upgrades of one matrix's components to `bits`, from the rung below, in order of components."""

    matrix: int
    bits: int
    first: int  # component: 1 where component 0 has these bits from the start
    follows: bool  # the chain before this one is the same matrix's, and has to be ahead
    cost: float  # bytes a component
    saving: float  # share of its effect
    mean: Tensor  # of the effects of each pool, non-increasing
    size: Tensor  # components of each pool


class _Upgrades:
    """All upgrades of all matrices, by falling gain per byte. A state is how many components every chain has upgraded.

    Sorting keeps each chain behind the one it follows: means do not rise along a chain, gains per byte fall from chain
    to chain, and ties go by chain.
    """

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        names = [matrix.name for matrix in matrices]
        if len(set(names)) < len(names):
            raise ValueError(f"matrices: got the names {names}, expected no name twice; rename one")
        self.matrices = matrices
        self.effects = [matrix.effect.detach().to("cpu", torch.float64) for matrix in matrices]
        self.chains = [chain for index in range(len(matrices)) for chain in self._chains(index)]
        self.least = sum(matrix.bytes(_hull(matrix)[0]) for matrix in matrices if not matrix.optional)

        empty = torch.zeros(0, dtype=torch.float64)
        self.size = torch.cat([empty.long(), *(chain.size for chain in self.chains)])
        cost = torch.cat([empty, *(chain.size * chain.cost for chain in self.chains)])
        gain = torch.cat([empty, *(chain.size * chain.mean * chain.saving for chain in self.chains)])
        ratio = torch.cat([empty, *(chain.mean * (chain.saving / chain.cost) for chain in self.chains)])
        pools = torch.tensor([len(chain.size) for chain in self.chains], dtype=torch.long)
        self.start = (pools.cumsum(0) - pools).tolist()
        self.before = torch.cat([torch.zeros(1, dtype=torch.long), self.size.cumsum(0)])
        ratio, self.order = ratio.sort(descending=True, stable=True)
        self.order = self.order[: int((ratio > 0).sum())]  # what changes nothing is left out
        self.chain_of = torch.repeat_interleave(torch.arange(len(pools)), pools)[self.order]
        self.spent = cost[self.order].cumsum(0)
        #: Error after so many upgrades, from the end, where it is exactly 0.
        self.left = torch.cat([gain[self.order].flip(0).cumsum(0).flip(0), empty.new_zeros(1)])

    def _chains(self, index: int) -> list[_Chain]:
        matrix, effect = self.matrices[index], self.effects[index]
        whole, rest = _pools(effect)
        chains, below = [], 0
        for bits in _hull(matrix):
            kept = below == 0 and not matrix.optional
            mean, size = rest if kept else whole
            cost, saving = matrix.bytes(bits) - matrix.bytes(below), matrix.error(below) - matrix.error(bits)
            chains.append(_Chain(index, bits, int(kept), below > 0, cost, saving, mean, size))
            below = bits
        return chains

    @cached_property
    def position(self) -> Tensor:
        """Of every upgrade in the order; those that are not in it have its length."""
        position = torch.full_like(self.size, len(self.order))
        position[self.order] = torch.arange(len(self.order))
        return position

    @cached_property
    def cumulative(self) -> list[Tensor]:
        zero = torch.zeros(1, dtype=torch.float64)
        return [torch.cat([zero, effect.cumsum(0)]) for effect in self.effects]

    def pools(self, number: int) -> list[int]:
        """Pools that each chain has upgraded after the first `number` upgrades of the order."""
        return torch.bincount(self.chain_of[:number], minlength=len(self.chains)).tolist()

    def components(self, number: int) -> list[int]:
        """The state after the first `number` upgrades of the order."""
        ends = torch.tensor(self.start, dtype=torch.long) + torch.tensor(self.pools(number), dtype=torch.long)
        sizes = self.before[ends] - self.before[torch.tensor(self.start, dtype=torch.long)]
        return [chain.first + size for chain, size in zip(self.chains, sizes.tolist(), strict=True)]

    def number_for(self, error: float) -> int:
        """Upgrades of the order until at most `error` is left."""
        return int((self.left > error).sum())

    def filled(self, budget: float) -> list[int]:
        """The state within the budget: upgrades in order while they fit, and of what is left the best use below.

        Either takes no more gain per byte than the first upgrade that did not fit would have, so that one more upgrade
        in order is always better, and the error never rises with the budget.
        """
        room = budget - self.least
        number = int(torch.searchsorted(self.spent, room, right=True))
        left = room - (float(self.spent[number - 1]) if number else 0.0)
        return max(
            self._with_others(number, left),
            self._with_part(number, left),
            key=lambda state: -self.allocation(state).error,
        )

    def _with_others(self, number: int, left: float) -> list[int]:
        """The first `number` upgrades, and in order those after them that fit into the bytes left."""
        pools, done = self.pools(number), self.components(number)
        waiting: list[tuple[int, int]] = []
        queued: set[int] = set()

        def queue(chain: int) -> None:
            """Chains that were passed over stay in `queued`."""
            if chain < len(self.chains) and chain not in queued:
                size = self._next_pool(chain, pools[chain])
                if 0 < size <= self._ahead(chain, done):
                    heapq.heappush(waiting, (int(self.position[self.start[chain] + pools[chain]]), chain))
                    queued.add(chain)

        for chain in range(len(self.chains)):
            queue(chain)
        while waiting:
            _, chain = heapq.heappop(waiting)
            size = self._next_pool(chain, pools[chain])
            cost = size * self.chains[chain].cost
            if cost <= left:
                left -= cost
                pools[chain] += 1
                done[chain] += size
                queued.discard(chain)
                queue(chain)
                queue(chain + 1)
        return done

    def _with_part(self, number: int, left: float) -> list[int]:
        """The first `number` upgrades, and of one chain's next pool as many components as fit into the bytes left."""
        pools, done = self.pools(number), self.components(number)
        best, choice = 0.0, (0, 0)
        for chain, limit in self._heads(pools, done):
            count = min(limit, int(left // self.chains[chain].cost))
            gain = float(self._gains(chain, done, count)[-1])
            if gain > best:
                best, choice = gain, (chain, count)
        if best > 0:
            done[choice[0]] += choice[1]
        return done

    def finished(self, number: int, max_error: float) -> list[int]:
        """The state after `number` upgrades and the cheapest single one that brings the error within `max_error`."""
        pools, done = self.pools(number), self.components(number)
        needed = self.allocation(done).error - max_error
        least, choice = math.inf, (0, 0)
        for chain, limit in self._heads(pools, done) if needed > 0 else ():
            gains = self._gains(chain, done, limit)
            count = int(torch.searchsorted(gains, needed))
            if count <= limit and count * self.chains[chain].cost < least:
                least, choice = count * self.chains[chain].cost, (chain, count)
        if least < math.inf:
            done[choice[0]] += choice[1]
        return done

    def allocation(self, done: list[int]) -> Allocation:
        """What a state means."""
        blocks: list[list[tuple[int, int]]] = [[] for _ in self.matrices]
        above = 0
        for index in reversed(range(len(self.chains))):
            chain = self.chains[index]
            if done[index] > above:
                blocks[chain.matrix].append((done[index] - above, chain.bits))
            above = done[index] if chain.follows else 0
        error = size = 0.0
        for matrix, cumulative, own in zip(self.matrices, self.cumulative, blocks, strict=True):
            start = 0
            for columns, bits in own:
                error += float(cumulative[start + columns] - cumulative[start]) * matrix.error(bits)
                size += columns * matrix.bytes(bits)
                start += columns
            error += float(cumulative[-1] - cumulative[start])
        return Allocation({m.name: tuple(own) for m, own in zip(self.matrices, blocks, strict=True)}, error, size)

    def _next_pool(self, chain: int, pools: int) -> int:
        """Components of the chain's next pool that gains anything, 0 if there is none."""
        place = self.start[chain] + pools
        if pools == len(self.chains[chain].size) or int(self.position[place]) == len(self.order):
            return 0
        return int(self.size[place])

    def _ahead(self, chain: int, done: list[int]) -> int:
        """Components the chain can upgrade before the one it follows has to."""
        if self.chains[chain].follows:
            return done[chain - 1] - done[chain]
        return len(self.effects[self.chains[chain].matrix]) - done[chain]

    def _heads(self, pools: list[int], done: list[int]) -> list[tuple[int, int]]:
        """Chains, and how many components of their next pool can be upgraded."""
        heads = []
        for chain in range(len(self.chains)):
            limit = min(self._next_pool(chain, pools[chain]), self._ahead(chain, done))
            if limit > 0:
                heads.append((chain, limit))
        return heads

    def _gains(self, chain: int, done: list[int], limit: int) -> Tensor:
        """Error saved by upgrading the chain's next 0 .. `limit` components."""
        cumulative = self.cumulative[self.chains[chain].matrix]
        return (cumulative[done[chain] : done[chain] + limit + 1] - cumulative[done[chain]]) * self.chains[chain].saving


def _hull(matrix: Matrix) -> list[int]:
    """The bits on the lower convex hull of a component's (bytes, error) from nothing on, rising."""
    ladder = [*(bits for bits in ERROR if bits < matrix.dtype_bits), matrix.dtype_bits]
    hull = [0]

    def slope(low: int, high: int) -> float:
        return (matrix.error(low) - matrix.error(high)) / (matrix.bytes(high) - matrix.bytes(low))

    for bits in sorted(ladder, key=lambda bits: (matrix.bytes(bits), matrix.error(bits))):
        if matrix.error(bits) >= matrix.error(hull[-1]):
            continue
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], bits):
            hull.pop()
        hull.append(bits)
    return hull[1:]


def _pools(effect: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Means (fp64) and sizes of neighbours pooled until means do not rise: of all, and of all but the first."""
    if bool((effect[1:] <= effect[:-1]).all()):
        ones = torch.ones(len(effect), dtype=torch.long)
        return (effect, ones), (effect[1:], ones[1:])
    means: list[float] = []
    sizes: list[int] = []

    def pooled() -> tuple[Tensor, Tensor]:
        return torch.tensor(means[::-1], dtype=torch.float64), torch.tensor(sizes[::-1], dtype=torch.long)

    # From the last on, so that what stands before the first is added is the answer without it.
    values = effect.tolist()
    for place in range(len(values) - 1, -1, -1):
        if place == 0:
            rest = pooled()
        mean, size = values[place], 1
        while means and means[-1] > mean:
            other, count = means.pop(), sizes.pop()
            mean = min((mean * size + other * count) / (size + count), other)
            size += count
        means.append(mean)
        sizes.append(size)
    return pooled(), rest
