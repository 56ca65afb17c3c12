"""KIVI: keys in few bits per channel, values per token, the newest tokens as they are (arXiv 2402.02750)."""

from dataclasses import dataclass

from torch import Tensor

from attnpack_fx.kernels.aten.row_codes import Grouping, uniform
from attnpack_fx.kernels.parts import Rows
from attnpack_fx.passes.row_coding import Kind, RowCoding
from attnpack_fx.passes.row_options import check_bits, check_count, steps


@dataclass(frozen=True)
class KIVI(RowCoding):
    """Asymmetric integers: keys per channel in groups of tokens, values per token in groups of channels.

    bits: 2, 4 or 8 (the paper has the first two). group: tokens of a key group, channels of a value group.
    residual: keys are coded in whole blocks of so many tokens, a multiple of `group`: at prefill the oldest
        `floor(T / residual) residual`, later whenever so many have come. Of values the newest `residual` stay dense.

    Values are coded `group` tokens at a time once there are so many too many, where the paper codes one at every step:
    between `residual` and `residual + group - 1` of them stay dense. Keys are coded as they are attended to, after
    rotary embedding. With a scale and a zero point of 16 bits for 32 numbers, 2 bits are 3, and 4 are 5.

    Raises `ValueError` for other values.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        check_bits("KIVI", self.bits)
        check_count("KIVI", "group", self.group)
        check_count("KIVI", "residual", self.residual)
        if self.residual % self.group:
            raise ValueError(
                f"KIVI: residual: got {self.residual}, expected a multiple of group={self.group}, so that blocks of "
                f"keys are whole groups; e.g. residual={4 * self.group}"
            )

    def due(self, kind: Kind, rows: int, prefill: bool) -> int:
        if kind == "key":
            return steps(rows, self.residual)
        return steps(rows - self.residual, 1 if prefill else self.group)

    def encode(self, rows: Tensor, kind: Kind, layer: int | None, prefill: bool) -> Rows[Tensor]:
        return uniform(rows, self.bits, Grouping(self.group, channel=kind == "key"))
