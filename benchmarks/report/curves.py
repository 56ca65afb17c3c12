"""The other figures: memory over a long generation, tokens a second at a memory cap, singular values."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from itertools import cycle
from typing import TYPE_CHECKING, Any

from benchmarks.report.data import Quality, Record, is_dense, is_ours, measured
from benchmarks.report.drawing import COLOURS, INK, MARKERS, MUTED, OURS_COLOURS, PAPER, canvas, label, legend_below

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LARGE_RANGE = 12
#: Smaller singular values are rounding errors.
_SMALLEST = 1e-5


def memory(long: Record) -> "Figure":
    """Bytes of the cache over the steps of one generation, a line a policy."""
    rows = measured(long)
    figure, (axis,) = canvas(8.6, 4.4)
    looks = _looks(row["name"] for row in rows)
    for row in rows:
        look = looks[row["name"]] | {"marker": ""}
        sizes = [size / 1e6 for size in row["bytes"]]
        axis.plot(row["steps"], sizes, **look, label=row["name"], linewidth=1.8)
        label(axis, f"{sizes[-1]:.3g}", (row["steps"][-1], sizes[-1]), (4, -3), color=look["color"])
    held = [size for row in rows for size in row["bytes"] if size]
    if held and max(held) > _LARGE_RANGE * min(held):
        axis.set_yscale("log")
        _plain(axis.yaxis)
    axis.set_xlabel("generated tokens")
    axis.set_ylabel("bytes of the cache, MB")
    legend_below(figure, axis.get_legend_handles_labels()[0], 3)
    return figure


def throughput(speed: Record) -> "Figure":
    """Tokens a second over the batch, a line a contender; hollow where the batch does not fit the cap."""
    contenders: dict[str, list[Record]] = defaultdict(list)
    for row in measured(speed):
        if row.get("tokens_per_second") is not None:
            contenders[row["contender"]].append(row)
    figure, (axis,) = canvas(8.6, 4.8)
    looks = _looks(contenders)
    for name, rows in contenders.items():
        rows.sort(key=lambda row: row["batch"])
        look = looks[name]
        fits, others = ([row for row in rows if bool(row["fits"]) is fitting] for fitting in (True, False))
        axis.plot(*_batches(fits), **look, linewidth=1.6, markersize=6, label=name)
        axis.plot(*_batches(others), **look | {"linestyle": ""}, markersize=6, markerfacecolor=PAPER)
        if fits and others:
            axis.plot(*_batches([fits[-1], others[0]]), color=look["color"], linestyle=":", linewidth=1.2)
        if fits:
            x, y = _batches(fits[-1:])
            axis.plot(x, y, marker="o", markersize=13, markerfacecolor="none", markeredgewidth=1.4, color=look["color"])
            label(axis, f"{y[0]:,.0f}", (x[0], y[0]), (0, 9), ha="center", color=INK)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_yscale("log")
    axis.margins(y=0.12)
    _plain(axis.yaxis)
    axis.set_xlabel("batch")
    axis.set_ylabel("tokens per second")
    legend_below(figure, axis.get_legend_handles_labels()[0], 3)
    return figure


def spectra(quality: Quality) -> "Figure":
    """Singular values of keys and values, a panel a kind, a line a layer; the largest is 1."""
    from matplotlib import colormaps

    kinds = list(dict.fromkeys(each["kind"] for each in quality.spectra))
    layers = sorted({each["layer"] for each in quality.spectra})
    # Neither end of the map, which would vanish on black or on white.
    shades = {
        layer: colormaps["viridis"](0.2 + 0.6 * place / max(1, len(layers) - 1)) for place, layer in enumerate(layers)
    }
    figure, axes = canvas(10, 3.6, 1, len(kinds), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        found = [each for each in quality.spectra if each["kind"] == kind]
        for each in found:
            energy = [value for value in each["energy"] if value > 0]
            axis.plot(range(1, len(energy) + 1), energy, color=shades[each["layer"]], linewidth=1.4,
                      label=f"layer {each['layer']}")  # fmt: skip
        ranks = [each["rank_of_99_percent"] for each in found if each.get("rank_of_99_percent") is not None]
        if ranks:
            median = statistics.median(ranks)
            axis.axvline(median, color=MUTED, linestyle="--", linewidth=1)
            axis.text(0.04, 0.05, f"99 % of the energy:\nrank {median:.0f}", color=MUTED, fontsize=9,
                      transform=axis.transAxes)  # fmt: skip
        axis.set_title(kind, loc="left")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("singular value number")
    axes[0].set_ylabel("over the largest")
    axes[0].set_ylim(max(axes[0].get_ylim()[0], _SMALLEST), 1.6)
    if len(layers) > 1:
        legend_below(figure, axes[0].get_legend_handles_labels()[0], min(8, len(layers)))
    return figure


def _looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes by name: what is dense is grey, what is ours has the colours of ours."""
    palettes = {"dense": cycle([MUTED]), "ours": cycle(OURS_COLOURS), "others": cycle(COLOURS)}
    found = {}
    for name, marker in zip(names, cycle(MARKERS), strict=False):
        kind = "dense" if is_dense(name) else "ours" if is_ours(name) else "others"
        dashes = "--" if kind == "dense" else "-"
        found[name] = {"color": next(palettes[kind]), "marker": marker, "linestyle": dashes}
    return found


def _batches(rows: list[Record]) -> tuple[list[float], list[float]]:
    return [row["batch"] for row in rows], [row["tokens_per_second"] for row in rows]


def _plain(axis: Any) -> None:
    """Numbers as such on a logarithmic axis, at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(NullFormatter())
