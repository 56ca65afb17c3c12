"""Reading part of what is stored: decode steps attend to a core of the vision tokens, and now and then to all.

A method of this family may also evict (`Eviction.keep`), before it selects. Both are pure functions; gathering the core
is done elsewhere, once for all methods.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from attnpack_fx.passes.eviction import Eviction, Tokens
from attnpack_fx.passes.method import Stage


@dataclass(frozen=True)
class Selection(Eviction):
    """A rule for what decode steps read.

    heads: a step reads the same tokens for all heads of a layer, so they are kept together too.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.EVICT, Stage.SELECT})

    heads: Literal["apart", "together", "auto"] = field(default="together", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads != "together":
            raise ValueError(
                f"{self.name}(heads={self.heads!r}): expected 'together', as a step reads the same tokens for all "
                f"heads of a layer; leave heads out"
            )

    def core_of(self, tokens: Tokens) -> Tensor:
        """Which of the stored tokens the next steps read: bool `[B', n]`, text always, filler never.

        Called after prefill, and after every step that read all of them, so that all scores are of the same query.
        Tokens that come later are read until the next call.
        """
        raise NotImplementedError

    def rereads(self, step: int) -> bool:
        """Whether decode step number `step`, 1 for the first after prefill, reads everything that is stored."""
        raise NotImplementedError
