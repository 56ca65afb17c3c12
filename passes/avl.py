"""A-VL: fewer vision tokens stored, still fewer read at every step; text by heavy hitters."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnpack_fx.passes.eviction import Tokens, best, several, staying, subject_of
from attnpack_fx.passes.fields import checked_count, checked_share, share_of
from attnpack_fx.passes.h2o import heavy_and_newest
from attnpack_fx.passes.method import Observation
from attnpack_fx.passes.selection import Selection


@dataclass(frozen=True)
class AVL(Selection):
    """Adaptive attention for vision-language models (Zhang et al., AAAI 2025, arXiv 2409.14846).

    Vision, in every layer by the attention of the newest query, averaged over heads: after prefill the tokens with most
    of it stay, the others leave for good. The core among them is what decode steps read; every so many steps, one step
    reads all that stay and ranks them anew. Text: of a budget that grows with it, one part are the newest tokens, the
    other those with the largest sum of attention, as in H2O.

    Defaults are those of the released code, which the paper's headline of half the cache agrees with, but for two that
    are off there: its evaluation script ranks every 3 steps (the code: never) and, where it evicts text at all,
    `text_rate=0.4`. That script also has `core=0.3`. Dropping tokens inside prefill is another method, FastV.

    kept: share of the vision tokens of the prompt that stay, rounded up. 1.0 keeps all.
    core: share of them that steps read, of the same count; at most `kept`, which reads all that stay.
    every: every so many steps, one reads all that stay and ranks them; None: the ranking of prefill holds.
    text_rate: share of the text tokens seen that may be evicted; None keeps all.
    text_least: text tokens that stay in any case.
    text_heavy: share of the text that stays for heavy hitters, rounded up, but for the newest token.
    text_every: a full text budget loses so many tokens at once, at most an eighth of it and one; 1: the paper's.
    """

    observes: ClassVar[Observation | None] = Observation("last", text="sum")

    kept: float = 0.5
    core: float = 0.4
    every: int | None = 3
    text_rate: float | None = None
    text_least: int = 20
    text_heavy: float = 0.5
    text_every: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_share(self.name, "kept", self.kept, open=True)
        checked_share(self.name, "core", self.core, open=True)
        if self.core > self.kept:
            raise ValueError(
                f"{self.name}(kept={self.kept}, core={self.core}): expected core to be at most kept, both shares of "
                f"the vision tokens of a prompt; lower core to {self.kept}"
            )
        if self.every is not None:
            checked_count(self.name, "every", self.every, 1)
        if self.text_rate is not None:
            checked_share(self.name, "text_rate", self.text_rate)
        checked_count(self.name, "text_least", self.text_least, 1)
        checked_share(self.name, "text_heavy", self.text_heavy)
        checked_count(self.name, "text_every", self.text_every, 1)

    def spares(self, slots: int, seen: int) -> bool:
        return self.text_rate is None or slots <= self._text_limit(0)

    def keep(self, tokens: Tokens) -> Tensor | None:
        """Of the vision tokens of a prompt the share that stays; of text its budget, at prefill and later."""
        stored = tokens.position >= 0
        text, vision = subject_of(tokens, "text"), subject_of(tokens, "vision")
        kept = stored
        if tokens.prefill and self.kept < 1 and tokens.vision is not None:
            most = best(tokens.score, tokens.position, vision, _rounded_up(self.kept, vision.sum(1, keepdim=True)))
            kept = text | most
        count = None
        if self.text_rate is not None:
            # All vision tokens of a prompt are still there.
            images = vision.sum(1) if tokens.prefill else self._vision_seen(tokens, vision)
            seen = tokens.real.to(text.device) - images
            count = staying(tokens, text, self._text_limit, self._text_at_once, seen)
        if count is not None:
            kept = kept & (vision | heavy_and_newest(tokens, text, count, self.text_heavy))
        return None if kept is stored else kept

    def core_of(self, tokens: Tokens) -> Tensor:
        vision = subject_of(tokens, "vision")
        count = _rounded_up(self.core, self._vision_seen(tokens, vision)[:, None])
        return subject_of(tokens, "text") | best(tokens.score, tokens.position, vision, count)

    def rereads(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0

    def _vision_seen(self, tokens: Tokens, vision: Tensor) -> Tensor:
        """Int64 `[B']`; where nobody says, from those that stayed, which may be too many by less than `1 / kept`."""
        if tokens.vision_seen is not None:
            return tokens.vision_seen.to(vision.device)
        return (vision.sum(1).double() / self.kept).round(decimals=6).floor().long()

    def _text_limit(self, seen: int) -> int:
        return max(self.text_least, share_of(1 - (self.text_rate or 0.0), seen))

    def _text_at_once(self, limit: int) -> int:
        return several(self.text_every, limit)


def _rounded_up(share: float, count: Tensor) -> Tensor:
    """`share_of` for int64 tensors."""
    return (share * count.double()).round(decimals=6).ceil().long()
