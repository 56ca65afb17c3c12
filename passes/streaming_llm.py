"""StreamingLLM: the first tokens, which soak up attention, and the newest."""

from dataclasses import dataclass

from torch import Tensor

from attnpack_fx.passes.eviction import Budgeted, Tokens, amount, best, several
from attnpack_fx.passes.fields import checked_amount, checked_count


@dataclass(frozen=True)
class StreamingLLM(Budgeted):
    """Attention sinks and a window (Xiao et al., ICLR 2024, arXiv 2309.17453).

    Which tokens stay depends on their positions alone. The authors number positions anew within the cache; here, as
    with every rule of eviction, tokens keep the positions they have.

    sinks: first tokens that always stay, padding not counted; 4 are the paper's.
    recent: newest tokens that stay beside them: their number, an int, or a share of the tokens seen as a float in
        (0, 1], rounded up. The authors' cache has 512 by default, other sizes in their experiments. After prefill all
        of them are stored; later as many, but for those that make room for the next ones (`every`).
    every: a full cache loses so many tokens at once, at most an eighth of the budget and one, and not all recent
        ones; 1: the paper's.
    """

    sinks: int = 4
    recent: float | int = 512
    every: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_count(self.name, "sinks", self.sinks)
        checked_amount(self.name, "recent", self.recent)
        checked_count(self.name, "every", self.every, 1)

    def limit(self, seen: int) -> int:
        return self.sinks + amount(self.recent, seen)

    def at_once(self, limit: int) -> int:
        return min(several(self.every, limit), limit - self.sinks)

    def chosen(self, tokens: Tokens, subject: Tensor, count: int) -> Tensor:
        first = best(-tokens.position.float(), tokens.position, subject, self.sinks)
        return first | best(None, tokens.position, subject & ~first, count - self.sinks)
