"""Random eviction: what any rule must be better than."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnpack_fx.passes.eviction import Budgeted, Tokens, amount, best, several
from attnpack_fx.passes.fields import checked_amount, checked_count


@dataclass(frozen=True)
class RandomEviction(Budgeted):
    """A control: tokens stay by lot.

    Every token draws a number once, from the seed, its layer, its row of the batch (or head) and its position; the
    highest stay. So the same call keeps the same tokens on every device, and of a prompt a uniform sample stays.

    budget: tokens that stay: a share of the tokens seen, padding not counted, as a float in (0, 1], rounded up; or
        their number, an int. 1.0 keeps all.
    every: a full cache loses so many tokens at once, at most an eighth of the budget and one.
    """

    budget: float | int
    seed: int = 0
    every: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_amount(self.name, "budget", self.budget)
        checked_count(self.name, "seed", self.seed)
        checked_count(self.name, "every", self.every, 1)

    def limit(self, seen: int) -> int:
        return amount(self.budget, seen)

    def at_once(self, limit: int) -> int:
        return several(self.every, limit)

    def chosen(self, tokens: Tokens, subject: Tensor, count: int) -> Tensor:
        row = torch.arange(tokens.position.shape[0], device=tokens.position.device)[:, None]
        layer = -1 if tokens.layer is None else tokens.layer
        lots = torch.full_like(row, self.seed % (1 << 63))
        for part in (torch.full_like(row, layer), row, tokens.position):
            lots = _scattered(lots + _scattered(part))
        return best((lots >> 40).float(), tokens.position, subject, count)


def _scattered(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014): int64 to int64, one to one, bits well mixed."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ x >> 30 & (1 << 34) - 1) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ x >> 27 & (1 << 37) - 1) * _signed(0x94D049BB133111EB)
    return x ^ x >> 31 & (1 << 33) - 1


def _signed(constant: int) -> int:
    """Of 64 bits, as a tensor holds them."""
    return constant - (1 << 64)
