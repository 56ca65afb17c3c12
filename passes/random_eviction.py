"""Random eviction: what any rule must be better than."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnpack_fx.passes.eviction import Budgeted, Tokens, amount_with, newest_and_best, several
from attnpack_fx.passes.fields import checked_amount, checked_count, checked_recent


@dataclass(frozen=True)
class RandomEviction(Budgeted):
    """A control: tokens stay by lot, but for the newest.

    Every token draws a number once, from the seed, its layer, its row of the batch (or head) and its position; the
    highest stay. So the same call keeps the same tokens on every device, and of a prompt, all but its newest tokens, a
    uniform sample stays.

    Every rule it is a control of keeps the newest tokens whatever they score, so that one that dropped them would be
    worse for another reason than its lots: it would forget the end of the question. 10 of them are what Scissorhands
    keeps, the least of the published rules: H2O keeps half of its budget, StreamingLLM a window of hundreds.

    budget: tokens that stay: a share of the tokens seen, padding not counted, as a float in (0, 1], rounded up and no
        less than `recent`; or their number, an int. 1.0 keeps all.
    every: a full cache loses so many tokens at once, at most an eighth of the budget and one, and no recent ones.
    recent: newest tokens that stay without a lot; 0 for lots alone. A smaller number as the budget is refused.
    """

    budget: float | int
    seed: int = 0
    every: int = 16
    recent: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_amount(self.name, "budget", self.budget)
        checked_count(self.name, "seed", self.seed)
        checked_count(self.name, "every", self.every, 1)
        checked_recent(self.name, self.budget, self.recent)

    def limit(self, seen: int) -> int:
        return amount_with(self.budget, seen, self.recent)

    def at_once(self, limit: int) -> int:
        return min(several(self.every, limit), limit - self.recent + 1)

    def chosen(self, tokens: Tokens, subject: Tensor, count: int) -> Tensor:
        row = torch.arange(tokens.position.shape[0], device=tokens.position.device)[:, None]
        layer = -1 if tokens.layer is None else tokens.layer
        lots = torch.full_like(row, self.seed % (1 << 63))
        for part in (torch.full_like(row, layer), row, tokens.position):
            lots = _scattered(lots + _scattered(part))
        return newest_and_best(tokens, (lots >> 40).float(), subject, count, self.recent)


def _scattered(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014): int64 to int64, one to one, bits well mixed."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ x >> 30 & (1 << 34) - 1) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ x >> 27 & (1 << 37) - 1) * _signed(0x94D049BB133111EB)
    return x ^ x >> 31 & (1 << 33) - 1


def _signed(constant: int) -> int:
    """Of 64 bits, as a tensor holds them."""
    return constant - (1 << 64)
