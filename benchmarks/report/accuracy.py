"""Accuracy against bytes, all methods of one or more models."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.report.analysis import front_of, parted
from benchmarks.report.data import Quality, Row, is_ours
from benchmarks.report.drawing import INK, MUTED, OURS_COLOURS, PAPER, canvas, label, legend_below, style
from benchmarks.report.published import REFERENCES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Losses up to so many points lie on a linear scale, larger ones on a logarithmic one.
_LINEAR = 1.0
_REFERENCE: dict[str, Any] = {
    "color": MUTED,
    "marker": "x",
    "linestyle": "",
    "markersize": 8,
    "markeredgewidth": 1.8,
    "zorder": 5,
}
_TICKS = (5, 2, 1, 0.5, 0, -0.5, -1, -2, -5, -10, -20, -50, -100)


def accuracy(qualities: Sequence[Quality], columns: int = 2) -> "Figure":
    """One panel a model: accuracy minus the dense cache's over the ratio of bytes, with intervals and fronts."""
    columns = min(columns, len(qualities))
    rows = math.ceil(len(qualities) / columns)
    width = 10.0 if columns > 1 else 8.6
    figure, axes = canvas(width, 4.2 * rows + 1.1, rows, columns, sharex=True, sharey=True)
    groups = list(dict.fromkeys(group for quality in qualities for group in quality.groups))
    groups.sort(key=lambda name: not is_ours(name))
    for axis, quality in zip(axes, qualities, strict=False):
        _panel(axis, quality, groups)
    for axis in axes[len(qualities) :]:
        axis.remove()
    for number, axis in enumerate(axes[: len(qualities)]):
        if number % columns == 0:
            axis.set_ylabel("accuracy minus dense, points")
        axis.set_xlabel("dense bytes / counted bytes")
        axis.xaxis.set_tick_params(labelbottom=True)
    _scales(axes[0], qualities)
    legend_below(figure, _legend(groups), 4 if columns > 1 else 3)
    return figure


def _panel(axis: Any, quality: Quality, groups: list[str]) -> None:
    dense = quality.dense.get("accuracy")
    axis.set_title(f"{quality.model}: dense {100 * dense:.1f} %" if dense is not None else quality.model, loc="left")
    axis.axhline(0, color=INK, linewidth=1, zorder=2)
    axis.annotate("dense", (0.005, 0), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  color=INK, fontsize=8.5)  # fmt: skip
    for _, ratio, points in REFERENCES:
        axis.plot(ratio, points, **_REFERENCE)
        label(axis, f"{ratio:.3g}x", (ratio, points), (7, -3), color=MUTED)
    ours, others = parted(quality.rows)
    _front(axis, front_of(ours), OURS_COLOURS[0], "-")
    _front(axis, front_of(others), MUTED, "--")
    for group in groups:
        members = [row for row in quality.rows if row.group == group]
        if members:
            _group(axis, members, style(group, groups))


def _group(axis: Any, rows: list[Row], look: dict[str, Any]) -> None:
    ratios = [row.ratio for row in rows]
    points = [100 * row.difference for row in rows]
    ends = [row.difference_interval or (row.difference, row.difference) for row in rows]
    # An estimate may lie outside of its bootstrap interval by rounding.
    bars = [
        [max(0.0, point - 100 * low) for point, (low, _) in zip(points, ends, strict=True)],
        [max(0.0, 100 * high - point) for point, (_, high) in zip(points, ends, strict=True)],
    ]
    axis.errorbar(ratios, points, bars, fmt="none", ecolor=look["color"], alpha=0.45, elinewidth=1, zorder=2.5)
    axis.plot(ratios, points, linestyle="", markersize=6, markeredgecolor=PAPER, markeredgewidth=0.5, **look)


def _front(axis: Any, rows: list[Row], colour: str, dashes: str) -> None:
    """As a step: at a ratio, the best accuracy of all rows with at least that ratio."""
    if rows:
        axis.step([row.ratio for row in rows], [100 * row.difference for row in rows], where="pre",
                  color=colour, linestyle=dashes, linewidth=1.4, alpha=0.8, zorder=2.2)  # fmt: skip


def _scales(axis: Any, qualities: Sequence[Quality]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    rows = [row for quality in qualities for row in quality.rows]
    ratios = [row.ratio for row in rows] + [ratio for _, ratio, _ in REFERENCES]
    ends = [end for row in rows for end in row.difference_interval or (row.difference,)]
    points = [100 * end for end in ends] + [points for *_, points in REFERENCES] + [0.5]
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(1.0, *ratios) * 0.92, max(ratios) * 1.15)
    axis.xaxis.set_major_locator(
        FixedLocator([2.0**power for power in range(-1, math.ceil(math.log2(max(ratios))) + 1)])
    )
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_yscale("symlog", linthresh=_LINEAR, linscale=0.9)
    axis.set_ylim(1.12 * min(points) - 0.1, max(points) + 0.6)
    axis.yaxis.set_major_locator(FixedLocator(_TICKS))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0")


def _legend(groups: list[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        *(Line2D([], [], linestyle="", markersize=6, label=group, **style(group, groups)) for group in groups),
        Line2D([], [], color=OURS_COLOURS[0], linewidth=1.4, label="best of ours"),
        Line2D([], [], color=MUTED, linewidth=1.4, linestyle="--", label="best of all others"),
        Line2D([], [], label="the paper, on its own model", **_REFERENCE),
    ]
