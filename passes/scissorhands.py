"""Scissorhands: tokens that queries have often found important stay, and the newest."""

from dataclasses import dataclass

from torch import Tensor

from attnpack_fx.passes.eviction import Budgeted, Tokens, amount_with, newest_and_best
from attnpack_fx.passes.fields import checked_amount, checked_count, checked_recent, checked_share, share_of
from attnpack_fx.passes.method import Observation


@dataclass(frozen=True)
class Scissorhands(Budgeted):
    """Persistence of importance (Liu et al., NeurIPS 2023, arXiv 2305.17118).

    A query finds a token pivotal when it gives it at least the mean weight, 1 / t with t tokens in sight. When the
    budget B is full, the `drop` B tokens that the fewest queries found pivotal leave; the `recent` newest always stay.

    This is the paper's rule, with its history of 400 queries, 10 recent tokens and half the budget dropped. The
    released code is another one: it masks, while a prompt is read, tokens that none of the last 100 queries gave a
    weight among the row's highest tenth, and has no budget. A prompt longer than the budget is cut to the budget, not
    below.

    budget: tokens that stay at most: a share of the tokens seen, padding not counted, as a float in (0, 1], rounded up
        and no less than `recent`; or their number, an int. 1.0 keeps all. AttentionPack compares with 0.5.
    window: prompt queries that count, the last so many, and every later one.
    recent: newest tokens that stay whatever their count; a smaller number as the budget is refused.
    drop: share of the budget that leaves at once, rounded up.
    """

    budget: float | int = 0.5
    window: int = 400
    recent: int = 10
    drop: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_amount(self.name, "budget", self.budget)
        checked_count(self.name, "window", self.window, 1)
        checked_share(self.name, "drop", self.drop, open=True)
        checked_recent(self.name, self.budget, self.recent)

    @property
    def observes(self) -> Observation:  # type: ignore[override]  # its window is the method's
        return Observation("pivotal", window=self.window)

    def limit(self, seen: int) -> int:
        return amount_with(self.budget, seen, self.recent)

    def at_once(self, limit: int) -> int:
        return min(share_of(self.drop, limit), limit - self.recent + 1)

    def chosen(self, tokens: Tokens, subject: Tensor, count: int) -> Tensor:
        return newest_and_best(tokens, tokens.score, subject, count, self.recent)
