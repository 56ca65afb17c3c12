"""One attention layer's cache between two calls: what methods act on after prefill and after every decode step."""

from dataclasses import dataclass

from torch import Tensor

from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.storage import Stored


@dataclass
class CachedLayer:
    """Keys and values of one layer, replaced as methods act.

    number: of the decoder layer, where the graph shows it; added: how many tokens this call appended.
    prefill: whether the layer has just been packed; skipped: whether the policy leaves it alone.
    text: how the layer stores text, where tokens may be folded into it.
    observed: what this call's attention told: after a decode step how much it attended to every slot, fp32
        `[B', slots]`; after several tokens `[B', 1 + n, slots]`, the sum over older queries, then each of the newest n;
        after prefill what `Observation` asks, of every logical position, fp32 `[1 or 2, B', T]`, the second of tokens
        that are no vision tokens. None where nothing was asked.
    newest: after prefill what each of the newest n queries added to that (of the newest alone: its row), fp32
        `[B', n, T]`, or `[B, n, T]` of samples; None as before.
    """

    number: int | None
    key: PackedTensor
    value: PackedTensor
    added: int
    prefill: bool
    skipped: bool = False
    text: Stored | None = None
    observed: Tensor | None = None
    newest: Tensor | None = None

    @property
    def slots(self) -> int:
        """How many slots hold tokens or filler; keys and values have the same."""
        return self.key.slots
