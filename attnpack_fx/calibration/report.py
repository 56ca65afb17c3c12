"""What a calibration found, printable."""

from dataclasses import dataclass

from attnpack_fx.notebook import ShownAsText
from attnpack_fx.passes.storage import Columns, LayerPlan


@dataclass(frozen=True)
class Candidate:
    """A policy that was tried on the samples.

    divergence: mean Kullback-Leibler divergence of next-token probabilities from the dense model's, in nats;
    error: expected, relative to the attention outputs; bytes: of factors and scales at the mean number of tokens.
    """

    name: str
    divergence: float
    error: float
    bytes: int


@dataclass(frozen=True)
class Calibration(ShownAsText):
    """What `calibrate` found.

    layers: the plan; errors: what it is expected to change each layer's attention output by, relative to its norm
        (None where nothing is packed), root mean square over queries.
    error: the same over all packed layers.
    candidates: all that were tried, best first; chosen: the name of the one returned.
    bytes, dense_bytes: of packed tokens, at their mean number over samples: factors and scales against dense rows.
    shared_bytes: what un-rotated keys take besides, once for all layers: cos and sin of the packed tokens.
    samples, queries: how many prompts were seen, and how many decode steps.
    notes: what was not as it should be.
    """

    layers: tuple[LayerPlan, ...]
    errors: tuple[float | None, ...]
    error: float
    candidates: tuple[Candidate, ...]
    chosen: str
    bytes: int
    dense_bytes: int
    shared_bytes: int
    samples: int
    queries: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"  {'layer':>5}  {'keys':<10} {'error':>8}  columns x bits (16 or 32 stand as 'all')"]
        for number, (plan, error) in enumerate(zip(self.layers, self.errors, strict=True)):
            shown = "-" if error is None else f"{error:.4f}"
            lines.append(f"  {number:>5}  {plan.key_space:<10} {shown:>8}  {_columns(plan)}")
        lines.append("")
        lines.append(f"  {'candidate':<48} {'KL':>10} {'error':>8} {'bytes':>12}")
        for each in self.candidates:
            mark = "*" if each.name == self.chosen else " "
            lines.append(f"{mark} {each.name:<48} {each.divergence:>10.3g} {each.error:>8.4f} {each.bytes:>12,}")
        lines.append("")
        lines.append(
            f"  {self.dense_bytes:,} bytes dense, {self.bytes:,} packed, {self.dense_bytes / self.bytes:.1f}x smaller; "
            f"{self.shared_bytes:,} more for rotary embedding, shared by all layers"
        )
        lines.append(f"  {self.samples} samples, {self.queries} decode steps; expected relative error {self.error:.4f}")
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)


def _columns(plan: LayerPlan) -> str:
    shown = []
    for name, stored in (("vision", plan.vision), ("text", plan.text)):
        if stored is not None:
            shown.append(f"{name} k {_blocks(stored.key)}  v {_blocks(stored.value)}")
    return ", ".join(shown) or "dense"


def _blocks(columns: Columns) -> str:
    return "+".join(f"{count}x{bits or 'all'}" for count, bits in columns.blocks)
