"""Token eviction, whatever the rule: what a method is shown, and what it answers.

The rule is a pure function from stored tokens to a mask; freeing them is done elsewhere, once for all rules.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from attnpack_fx.passes.method import Method, Stage


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
    """

    position: Tensor
    score: Tensor | None
    vision: Tensor | None
    seen: int
    real: Tensor
    prefill: bool
    layer: int | None


@dataclass(frozen=True)
class Eviction(Method):
    """A rule that evicts whole tokens, to free their bytes; logical positions stay as they are.

    heads: `"apart"`: every KV head keeps tokens of its own, which needs a layer without low-rank factors; `"together"`:
        heads keep the same tokens; `"auto"`: apart where the layer holds no factors.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.EVICT})

    heads: Literal["apart", "together", "auto"] = "auto"

    def keep(self, tokens: Tokens) -> Tensor | None:
        """Which tokens stay: bool `[B', n]`, or None for all.

        Called after prefill and after every decode step, the tokens of that step being the newest.
        """
        raise NotImplementedError
