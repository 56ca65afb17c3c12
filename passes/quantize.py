"""Low-rank factors and dense tokens in integers or floats of few bits."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnpack_fx.kernels.aten.row_codes import INTEGERS, Grouping, float8, symmetric, uniform
from attnpack_fx.kernels.parts import E4M3, E5M2, Rows
from attnpack_fx.passes.method import Stage
from attnpack_fx.passes.row_coding import Kind, RowCoding
from attnpack_fx.passes.row_options import check_count, steps
from attnpack_fx.passes.storage import Stored

#: Eight bits in floating point, by name.
FLOATS = {"e4m3": E4M3, "e5m2": E5M2}
TARGETS = ("coefficients", "bases", "tail")
#: Tokens of the tail coded at once after prefill.
STEP = 32

Bits = int | str
#: Columns in a format of their own; the last count may be None, for all others.
Mixed = tuple[tuple[int | None, Bits], ...]

_BITS = "8, 4, 2, 'e4m3' or 'e5m2'"


@dataclass(frozen=True)
class Quantize(RowCoding):
    """Fewer bits for the factors of packed tokens, for the dense tokens beside them, or both.

    bits: 8, 4, 2, `"e4m3"` or `"e5m2"`. For factors also `(columns, bits)` pairs, most significant columns first, e.g.
        `((16, 8), (None, 4))`; None stands for all others, and may come last; columns beyond the last pair stay as they
        are, as do those with bits 0.
    group: channels of one token and head that share a scale in the tail. A component of a factor has one scale for its
        column of coefficients and one for its basis row, whatever this says.
    target: any of `"coefficients"`, `"bases"` and `"tail"`, or one of them. The tail is what is dense: all tokens where
        nothing else packs any, which is the usual integer cache.
    symmetric: whether integers are without zero points.
    recent: the newest tokens that stay dense in the tail; at prefill exactly so many, later up to 31 more, since 32
        are coded at once.

    Raises `ValueError` for other values.
    """

    bits: Bits | Mixed = 4
    group: int = 32
    target: str | tuple[str, ...] = ("coefficients", "bases")
    symmetric: bool = True
    recent: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", _checked_targets(self.target))
        if isinstance(self.bits, (tuple, list)):
            object.__setattr__(self, "bits", _checked_mixed(self.bits))
        else:
            _format(self.bits)
        check_count("Quantize", "group", self.group)
        check_count("Quantize", "recent", self.recent, least=0)
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"Quantize: symmetric: got {self.symmetric!r}, expected True or False")
        if isinstance(self.bits, tuple) and "tail" in self.target:
            raise ValueError(
                f"Quantize: bits: got {self.bits!r} for the tail, whose tokens have no columns, expected one of "
                f"{_BITS}; leave 'tail' out of target"
            )
        if not self.symmetric and not all(each in (0, *INTEGERS) for each in self._bits):
            raise ValueError(
                f"Quantize: symmetric: got False with bits={self.bits!r}, expected True, since floats have a sign of "
                "their own; use integers or symmetric=True"
            )

    @property
    def stages(self) -> frozenset[Stage]:
        """`FACTORS`, `ROWS` or both, by `target`."""
        factors = {"coefficients", "bases"} & set(self.target)
        return frozenset([Stage.FACTORS] * bool(factors) + [Stage.ROWS] * ("tail" in self.target))

    @property
    def factor_bits(self) -> tuple[tuple[int | None, int, int], ...]:
        """`(columns, format of coefficients, format of basis)` of the factors, as `kernels.parts.Block` has formats.

        Most significant columns first; the last number of columns is None, for all others. No entry without a factor
        among the targets.
        """
        if Stage.FACTORS not in self.stages:
            return ()
        pairs: Mixed = self.bits if isinstance(self.bits, tuple) else ((None, self.bits),)
        if pairs[-1][0] is not None:
            pairs = (*pairs, (None, 0))
        coefficients, bases = "coefficients" in self.target, "bases" in self.target
        formats = ((columns, _format(bits) if bits else 0) for columns, bits in pairs)
        return tuple((columns, form * coefficients, form * bases) for columns, form in formats)

    def formats(self) -> tuple[int, int]:
        """Formats of coefficients and basis, 0 for as they are. Raises `ValueError` where columns have several."""
        found = {(coefficient, basis) for _, coefficient, basis in self.factor_bits} or {(0, 0)}
        if len(found) > 1:
            raise ValueError(f"formats: got columns in several formats, {self.bits!r}; take factor_bits")
        return found.pop()

    def stored(self, how: Stored) -> Stored:
        """A layer's factors in these formats; ranks are numbers."""
        coded = (columns.coded(self.factor_bits, not self.symmetric) for columns in (how.key, how.value))
        return Stored(*coded)

    def due(self, kind: Kind, rows: int, prefill: bool) -> int:
        return steps(rows - self.recent, 1 if prefill else STEP) if Stage.ROWS in self.stages else 0

    def encode(self, rows: Tensor, kind: Kind, layer: int | None, prefill: bool) -> Rows[Tensor]:
        (bits,) = self._bits
        grouping = Grouping(self.group)
        if bits in FLOATS:
            return float8(rows, _format(bits), grouping)
        return (symmetric if self.symmetric else uniform)(rows, _format(bits), grouping)

    @property
    def _bits(self) -> tuple[Bits, ...]:
        return tuple(bits for _, bits in self.bits) if isinstance(self.bits, tuple) else (self.bits,)


def _format(bits: Any) -> int:
    """As `kernels.parts.Block` has it. Raises `ValueError` for what is no format."""
    if isinstance(bits, str) and bits in FLOATS:
        return FLOATS[bits]
    if isinstance(bits, int) and bits in INTEGERS:
        return bits
    raise ValueError(f"Quantize: bits: got {bits!r}, expected {_BITS}, or (columns, bits) pairs; e.g. Quantize(bits=4)")


def _checked_targets(target: Any) -> tuple[str, ...]:
    targets = (target,) if isinstance(target, str) else target
    valid = isinstance(targets, (tuple, list)) and targets and all(each in TARGETS for each in targets)
    if not valid or len(set(targets)) < len(targets):
        raise ValueError(
            f"Quantize: target: got {target!r}, expected some of {', '.join(map(repr, TARGETS))}, each once; "
            "e.g. Quantize(target=('coefficients', 'bases'))"
        )
    return tuple(targets)


def _checked_mixed(pairs: Any) -> Mixed:
    checked = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"Quantize: bits: got {pair!r} in {pairs!r}, expected (columns, bits) pairs")
        columns, bits = pair
        last = columns is None and number == len(pairs) - 1
        if not last and (not isinstance(columns, int) or isinstance(columns, bool) or columns < 1):
            raise ValueError(
                f"Quantize: bits: got {columns!r} columns in {pairs!r}, expected an int >= 1, or None in the last pair "
                "for all others; e.g. ((16, 8), (None, 4))"
            )
        if bits != 0:
            _format(bits)
        checked.append((columns, bits))
    if not checked:
        raise ValueError(f"Quantize: bits: got no pairs, expected {_BITS}, or (columns, bits) pairs")
    return tuple(checked)
