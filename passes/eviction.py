"""Token eviction, whatever the rule: what a method is shown, and what it answers.

The rule is a pure function from stored tokens to a mask; freeing them is done elsewhere, once for all rules.

Most rules keep a budget (`Budgeted`). Papers evict one token with every step; here that would copy the cache with every
step, so a rule lets it grow up to the budget, then evicts several tokens at once. The budget is never exceeded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attnpack_fx.passes.fields import checked_choice, share_of
from attnpack_fx.passes.method import Method, Stage

#: Which tokens a budget is for; those of the other modality all stay, and do not count.
Target = Literal["all", "vision", "text"]


@dataclass(frozen=True)
class Tokens:
    """The stored tokens of one layer, in slot order.

    B' counts samples, or where every KV head keeps tokens of its own, (sample, head) pairs, heads of a sample in turn.

    position: int64 `[B', n]`, logical positions, not sorted; -1 for filler, which must not be kept.
    score: fp32 `[B', n]`, what `Method.observes` asked for; None where it asked for nothing.
    vision: bool `[B', n]`; None where no modality is known.
    seen: how many logical tokens there have been, padding and evicted ones included.
    real: int64 `[B']`, how many of those were no padding.
    prefill: whether the prompt has just been stored.
    layer: number of the decoder layer, or None where the graph does not show it.
    vision_seen: int64 `[B']`, how many of the real tokens were vision tokens; None where that is not known.
    """

    position: Tensor
    score: Tensor | None
    vision: Tensor | None
    seen: int
    real: Tensor
    prefill: bool
    layer: int | None
    vision_seen: Tensor | None = None


@dataclass(frozen=True)
class Eviction(Method):
    """A rule that evicts whole tokens, to free their bytes; logical positions stay as they are.

    heads: `"apart"`: every KV head keeps tokens of its own, which needs a layer without low-rank factors; `"together"`:
        heads keep the same tokens; `"auto"`: apart where the layer holds no factors.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.EVICT})

    heads: Literal["apart", "together", "auto"] = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        checked_choice(self.name, "heads", self.heads, ("auto", "apart", "together"))

    def spares(self, slots: int, seen: int) -> bool:
        """Whether a decode step surely evicts nothing of so many slots; then no token is looked at.

        seen: how many tokens there have been in the sample with most, padding not counted.
        """
        return False

    def keep(self, tokens: Tokens) -> Tensor | None:
        """Which tokens stay: bool `[B', n]`, or None for all.

        Called after prefill and after every decode step, the tokens of that step being the newest.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Budgeted(Eviction):
    """A rule that keeps as many tokens as a budget says, the same number for every sample that has so many.

    At prefill exactly the budget stays. Later it may fill up again before tokens leave, `at_once` of them.

    target: tokens that the budget is for. Where no modality is known all tokens are text.
    """

    target: Target = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_choice(self.name, "target", self.target, ("all", "vision", "text"))

    def limit(self, seen: int) -> int:
        """The budget in tokens where there have been `seen` of them, in the sample with most; never falls with it."""
        raise NotImplementedError

    def at_once(self, limit: int) -> int:
        """How many tokens leave at once when one too many has come; at least 1, at most `limit`."""
        raise NotImplementedError

    def chosen(self, tokens: Tokens, subject: Tensor, count: int) -> Tensor:
        """The `count` tokens of subject, bool `[B', n]`, that stay in every sample; all of a sample with fewer."""
        raise NotImplementedError

    def spares(self, slots: int, seen: int) -> bool:
        # Of the tokens of one modality it is not known here how many there have been.
        return slots <= self.limit(seen if self.target == "all" else 0)

    def keep(self, tokens: Tokens) -> Tensor | None:
        subject = subject_of(tokens, self.target)
        count = staying(tokens, subject, self.limit, self.at_once)
        if count is None:
            return None
        return (tokens.position >= 0) & ~subject | self.chosen(tokens, subject, count)


def subject_of(tokens: Tokens, target: Target) -> Tensor:
    """Stored tokens, filler apart, that a budget is for: bool `[B', n]`."""
    stored = tokens.position >= 0
    if target == "all":
        return stored
    if tokens.vision is None:
        return stored if target == "text" else torch.zeros_like(stored)
    return stored & (tokens.vision if target == "vision" else ~tokens.vision)


def staying(
    tokens: Tokens,
    subject: Tensor,
    limit: Callable[[int], int],
    at_once: Callable[[int], int],
    seen: Tensor | None = None,
) -> int | None:
    """How many tokens of subject are to stay in a sample, or None where none holds more than the budget.

    limit, at_once: as in `Budgeted`. seen: int64 `[B']`, how many tokens of subject there have been; None: all others
    are stored, so that it is what they leave of `tokens.real`.
    """
    if subject.shape[1] <= limit(0):
        return None  # decided without asking the device
    stored = subject.sum(1)
    if seen is None:
        seen = tokens.real.to(stored.device) - ((tokens.position >= 0).sum(1) - stored)
    most_stored, most_seen = torch.stack([stored.amax(), seen.amax()]).tolist()
    number = limit(most_seen)
    if most_stored <= number:
        return None
    return number if tokens.prefill else number - at_once(number) + 1


def amount(budget: float | int, seen: int) -> int:
    """A budget in tokens: an int is one; a float is a share of the tokens seen, rounded up, at least 1."""
    return budget if isinstance(budget, int) else max(1, share_of(budget, seen))


def amount_with(budget: float | int, seen: int, recent: int) -> int:
    """`amount`, where a share of few tokens is no less than the `recent` newest, which always stay."""
    return amount(budget, seen) if isinstance(budget, int) else max(amount(budget, seen), recent)


def several(every: int, limit: int) -> int:
    """Tokens that leave at once: `every`, but no more than an eighth of the budget and one."""
    return min(every, 1 + limit // 8)


def best(score: Tensor | None, position: Tensor, among: Tensor, count: int | Tensor) -> Tensor:
    """The `count` tokens with the highest score, the newer one where scores are equal; without scores the newest.

    score fp32 `[B', n]`, position int64 `[B', n]`, among and result bool `[B', n]`; count may be int64 `[B', 1]`.
    Where fewer are among, they all are.
    """
    rank = position if score is None else _ordered(score) << 32 | position
    rank = rank.masked_fill(~among, torch.iinfo(torch.int64).min)
    if isinstance(count, int):
        chosen = rank.topk(min(count, rank.shape[1])).indices
        return torch.zeros_like(among).scatter_(-1, chosen, True) & among
    order = rank.argsort(-1, descending=True)
    place = torch.arange(rank.shape[1], device=rank.device).expand_as(order)
    return torch.zeros_like(among).scatter_(-1, order, place < count) & among


def newest_and_best(tokens: Tokens, score: Tensor | None, among: Tensor, count: int, recent: int) -> Tensor:
    """Of those among, bool `[B', n]`, `count` tokens: the `recent` newest, and of the others those `best` by score."""
    newest = best(None, tokens.position, among, min(recent, count))
    return newest | best(score, tokens.position, among & ~newest, count - min(recent, count))


def _ordered(score: Tensor) -> Tensor:
    """Int64 numbers of 32 bits in the order of floats: their bits, those of negative ones turned round."""
    bits = (score.float() + 0.0).view(torch.int32)  # of the two zeros the positive one
    return (bits ^ bits >> 31 & 0x7FFFFFFF).long()
