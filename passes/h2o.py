"""H2O: the tokens that got most attention so far, and the newest."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnpack_fx.passes.eviction import Budgeted, Tokens, amount, newest_and_best, several
from attnpack_fx.passes.fields import checked_amount, checked_count, checked_share, share_of
from attnpack_fx.passes.method import Observation


@dataclass(frozen=True)
class H2O(Budgeted):
    """Heavy-Hitter Oracle (Zhang et al., NeurIPS 2023, arXiv 2306.14048).

    Of the budget, the newest tokens take one part; the other goes to those of the rest with the largest sum of
    attention weights over all queries so far, prompt and steps. Logical positions stay as they are.

    Defaults are the paper's ratios: heavy hitters 0.1 and newest 0.1 of all tokens. `heads="apart"` is the paper's
    cache, a choice of tokens for every head.

    budget: tokens that stay: a share of the tokens seen, padding not counted, as a float in (0, 1], rounded up; or
        their number, an int. 1.0 keeps all.
    heavy: share of what stays for heavy hitters, rounded up, but for the newest token, which always stays; 0 keeps the
        newest alone.
    every: a full cache loses so many tokens at once, at most an eighth of the budget and one; 1: the paper's.
    """

    observes: ClassVar[Observation | None] = Observation("sum")

    budget: float | int = 0.2
    heavy: float = 0.5
    every: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_amount(self.name, "budget", self.budget)
        checked_share(self.name, "heavy", self.heavy)
        checked_count(self.name, "every", self.every, 1)

    def limit(self, seen: int) -> int:
        return amount(self.budget, seen)

    def at_once(self, limit: int) -> int:
        return several(self.every, limit)

    def chosen(self, tokens: Tokens, subject: Tensor, count: int) -> Tensor:
        return heavy_and_newest(tokens, subject, count, self.heavy)


def heavy_and_newest(tokens: Tokens, subject: Tensor, count: int, heavy: float) -> Tensor:
    """Of subject, bool `[B', n]`, the `count` tokens that stay: the newest, one at least, and the heaviest others."""
    recent = max(1, count - share_of(heavy, count))
    return newest_and_best(tokens, tokens.score, subject, count, recent)
