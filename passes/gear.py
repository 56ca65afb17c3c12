"""GEAR: few bits, the outermost numbers as they are, and a low-rank matrix for the rest of the error (2403.05527)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from attnpack_fx.kernels.aten.residual import with_residual
from attnpack_fx.kernels.aten.row_codes import Grouping, extremes, keep_outliers, uniform
from attnpack_fx.kernels.parts import Rows
from attnpack_fx.passes.row_coding import Kind, RowCoding
from attnpack_fx.passes.row_options import check_bits, check_count, check_share, steps


@dataclass(frozen=True)
class GEAR(RowCoding):
    """X ~ integers + outliers + left right, keys per channel and values per token.

    bits: 2, 4 or 8 of the integers, asymmetric.
    group: with `backbone="kivi"`, tokens of a key group, channels of a value group. `"kcvt"` has one group for a
        channel of all keys coded at once, and one for a head of a value; `group` then says nothing.
    outliers: share of a vector, half of it from either end, that is kept as it is: of a key channel over all tokens
        coded at once, of a value token over all heads. It is `outliers` of that vector however long (rounded to pairs);
        GEAR's code takes the number from the heads' channels for keys too, whatever the number of tokens. 0 is GEAR-L.
    rank, flush_rank: of the residual of each head, at prefill and of later blocks; 0 for none. Factors of later blocks
        are zero-padded to `rank` columns.
    residual: the whole prompt is coded at prefill, later tokens in blocks of so many; until then they stay dense.

    GEAR replaces outliers by the mean of their vector before the others are coded; here ranges leave them out, which is
    the same but where a mean lies outside what is left. A value group is one of a head, as is every group of channels.

    Raises `ValueError` for other values.
    """

    bits: int = 2
    group: int = 64
    outliers: float = 0.02
    rank: int = 4
    flush_rank: int = 2
    residual: int = 64
    backbone: Literal["kivi", "kcvt"] = "kivi"

    def __post_init__(self) -> None:
        check_bits("GEAR", self.bits)
        check_share("GEAR", "outliers", self.outliers)
        for name, least in (("group", 1), ("rank", 0), ("flush_rank", 0), ("residual", 1)):
            check_count("GEAR", name, getattr(self, name), least)
        if self.flush_rank > self.rank:
            raise ValueError(
                f"GEAR: flush_rank: got {self.flush_rank}, expected at most rank={self.rank}, for which there are "
                "columns; raise rank or lower flush_rank"
            )
        if self.backbone not in ("kivi", "kcvt"):
            raise ValueError(f"GEAR: backbone: got {self.backbone!r}, expected 'kivi' or 'kcvt'")

    def due(self, kind: Kind, rows: int, prefill: bool) -> int:
        return rows if prefill else steps(rows, self.residual)

    def encode(self, rows: Tensor, kind: Kind, layer: int | None, prefill: bool) -> Rows[Tensor]:
        channel = kind == "key"
        grouping = Grouping(self._group(rows, channel), channel)
        left_out = extremes(rows, self.outliers, channel) if self.outliers else None
        coded = uniform(rows, self.bits, grouping, left_out)
        if left_out is not None:
            coded = keep_outliers(coded, rows, left_out)
        if not self.rank:
            return coded
        return with_residual(coded, rows, self.rank if prefill else self.flush_rank, self.rank)

    def _group(self, rows: Tensor, channel: bool) -> int:
        if self.backbone == "kivi":
            return self.group
        return max(1, rows.shape[1 if channel else 3])
