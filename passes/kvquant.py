"""KVQuant: codebooks, keys per channel before rotary embedding, outliers as they are (arXiv 2401.18079)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnpack_fx.kernels.aten.codebook import normal_levels
from attnpack_fx.kernels.aten.row_codes import Grouping, bounds, by_codebook, extremes, keep_outliers, real
from attnpack_fx.kernels.parts import Rows
from attnpack_fx.passes import codebook_file
from attnpack_fx.passes.codebook_file import Codebooks
from attnpack_fx.passes.method import Method, Stage
from attnpack_fx.passes.row_coding import Kind, RowCoding
from attnpack_fx.passes.row_options import check_bits, check_count, check_share, steps


@dataclass(frozen=True)
class KVQuant(RowCoding):
    """Levels of a codebook between thresholds: those of a channel for keys, of a token and head for values.

    bits: 2, 4 or 8; the paper has 2, 3 and 4, and no field of a byte has 3.
    outliers: share of numbers beyond thresholds, half on either side, that are kept as they are: of a key channel over
        all tokens, of a value token over all heads (rounded to pairs of one such vector). 0 for none.
    residual: the whole prompt is coded at prefill, later tokens in blocks of so many; until then they stay dense. The
        paper codes every token at once, but each block stores its thresholds here.
    codebooks: a file that `attnpack_fx.calibration.codebooks.calibrate_codebooks` writes: a codebook for the keys and
        one for the values of every layer, by k-means weighted with Fisher information, and thresholds of key channels.
        Keys beyond them are outliers however many there are, or with `outliers=0` clipped to them.
        None is a variant without calibration, which is not the paper's: thresholds of keys are those of the tokens
        coded at once, and the codebook is that of a normal distribution (`kernels/aten/codebook.py`), fixed because
        tokens coded later must have the same.

    Value thresholds are found as tokens are coded, as in the paper, but for each head of a token apart.

    Raises `ValueError` for other values, and for a file that is none or has other bits.
    """

    unrotated: ClassVar[bool] = True

    bits: int = 4
    outliers: float = 0.01
    residual: int = 128
    codebooks: str | None = None

    def __post_init__(self) -> None:
        check_bits("KVQuant", self.bits)
        check_share("KVQuant", "outliers", self.outliers)
        check_count("KVQuant", "residual", self.residual)
        if self.codebooks is None:
            return
        if not isinstance(self.codebooks, str):
            raise ValueError(f"KVQuant: codebooks: got {self.codebooks!r}, expected a path as a str, or None")
        for number, own in codebook_file.read(self.codebooks).items():
            if own.key.shape != (2**self.bits,) or own.value.shape != (2**self.bits,):
                raise ValueError(
                    f"KVQuant: codebooks: got {self.codebooks} with {own.key.shape[0]} levels in layer {number}, "
                    f"expected 2^bits = {2**self.bits}; calibrate it with bits={self.bits}"
                )

    def refuses(self, other: Method) -> str | None:
        if Stage.MERGE in other.stages:
            return (
                f"{self.name} with {other.name}: keys are coded before rotary embedding, and layers merge them after "
                "it; use KIVI, GEAR or Quantize beside it"
            )
        return super().refuses(other)

    def due(self, kind: Kind, rows: int, prefill: bool) -> int:
        return rows if prefill else steps(rows, self.residual)

    def encode(self, rows: Tensor, kind: Kind, layer: int | None, prefill: bool) -> Rows[Tensor]:
        channel = kind == "key"
        own = None if self.codebooks is None else codebook_file.load(self.codebooks, layer)
        if own is None or not channel:
            left_out, low, high = thresholds(rows, self.outliers, channel)
        else:
            left_out, low, high = _given(rows, own)
        if own is None:
            levels = fixed_levels(rows, self.bits, self.outliers, channel)
        else:
            levels = own.key if channel else own.value
        coded = by_codebook(rows, levels, low, high, vectors(rows, channel))
        return keep_outliers(coded, rows, left_out) if self.outliers else coded


def vectors(rows: Tensor, channel: bool) -> Grouping:
    """What has thresholds of its own: a channel over all tokens, or a head of a token."""
    return Grouping(max(1, rows.shape[1 if channel else 3]), channel)


def fixed_levels(rows: Tensor, bits: int, share: float, channel: bool) -> Tensor:
    """A codebook without calibration, the same for all blocks of tokens: fp32 `[2^bits]`.

    The few numbers of a value's head seldom reach as far as thresholds of `share` say. Of normal ones, errors are least
    with a normal distribution cut where 2 of D lie beyond on either side, for D 64 as for 128.
    """
    return normal_levels(bits, share if channel else max(share, 4 / rows.shape[3]))


def thresholds(rows: Tensor, share: float, channel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outliers of rows `[B, n, H, D]`, bool alike, and the range of the others: shaped as `Rows.scale`."""
    left_out = extremes(rows, share, channel)
    return left_out, *bounds(rows, vectors(rows, channel), left_out)


def _given(rows: Tensor, own: Codebooks) -> tuple[Tensor, Tensor, Tensor]:
    """As `thresholds`, of keys, from a calibration."""
    batch, n, *shape = rows.shape
    if list(own.low.shape) != shape:
        raise ValueError(
            f"codebooks: got thresholds of {list(own.low.shape)} heads and channels, expected {shape} as the keys; "
            "calibrate them for this model"
        )
    low, high = own.low.to(rows.device), own.high.to(rows.device)
    left_out = ((rows < low) | (rows > high)) & real(rows)
    groups = batch, min(n, 1), *shape
    return left_out, low.expand(groups), high.expand(groups)
