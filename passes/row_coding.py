"""Dense tokens in fewer bits, whatever the code: what a method is asked, and what it answers.

Older tokens of the dense tail become a segment of `Rows` that attention reads as they are; the newest stay dense until
more have come. Keys and values may be coded at different times.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from attnpack_fx.kernels.parts import Rows
from attnpack_fx.passes.method import Method, Stage

Kind = Literal["key", "value"]


@dataclass(frozen=True)
class RowCoding(Method):
    """A code for dense tokens."""

    #: Whether keys are coded before rotary embedding, where it is recognised.
    unrotated: ClassVar[bool] = False

    @property
    def stages(self) -> frozenset[Stage]:
        return frozenset({Stage.ROWS})

    def due(self, kind: Kind, rows: int, prefill: bool) -> int:
        """How many of the oldest of `rows` dense tokens are to be coded now."""
        raise NotImplementedError

    def encode(self, rows: Tensor, kind: Kind, layer: int | None, prefill: bool) -> Rows[Tensor]:
        """Code dense tokens `[B, n, H, D]`, oldest first, filler rows zero. Always of the same `RowForm`."""
        raise NotImplementedError
