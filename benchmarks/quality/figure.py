"""Accuracy against compression, every sweep in one figure."""

from collections import defaultdict
from pathlib import Path
from typing import Any

_COLOURS = {
    "uniform": "#4269d0",
    "linear": "#97bbf5",
    "partial": "#3ca951",
    "bits": "#ff725c",
    "bases": "#a463f2",
    "calibrated": "#efb118",
}
_MARKERS = {"rotated": "o", "unrotated": "s"}


def draw(record: dict[str, Any], out: Path) -> None:
    """Write the figure of a result file: accuracy of the main setting over the ratio of vision bytes, log scale."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("--figure needs matplotlib; pip install 'attnpack-fx[demo]'") from error
    setting = record["settings"][0]
    rows = [row for row in record["rows"] if row["setting"] == setting and "skipped" not in row]
    if not rows:
        raise ValueError(f"figure: no measured row of {setting!r}; run the sweeps first")
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharex=True)
    lines: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        lines[row["sweep"], _space(row)].append(row)
    for (sweep, space), members in sorted(lines.items()):
        members.sort(key=lambda row: row["vision_ratio"])
        ratios = [row["vision_ratio"] for row in members]
        style = {
            "color": _COLOURS[sweep],
            "marker": _MARKERS[space],
            "linestyle": ("-" if space == "unrotated" else "--") if sweep in ("uniform", "calibrated") else "",
            "markerfacecolor": _COLOURS[sweep] if space == "unrotated" else "white",
            "markersize": 5,
            "linewidth": 1.3,
            "label": f"{sweep}, keys {'before' if space == 'unrotated' else 'after'} RoPE",
        }
        axes[0].plot(ratios, [100 * row["accuracy"] for row in members], **style)
        axes[1].plot(ratios, [max(row["kl"], 1e-6) for row in members], **style)
    dense = 100 * rows[0]["dense_accuracy"]
    axes[0].axhline(dense, color="#666666", linewidth=0.8)
    axes[0].annotate("dense", (1, dense), xytext=(2, 3), textcoords="offset points", color="#666666", fontsize=8)
    axes[0].set_ylabel("right tokens, %")
    axes[1].set_ylabel("KL from the dense model, nats per token")
    axes[1].set_yscale("log")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.set_xlabel("vision keys and values: dense bytes over stored bytes")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False, loc="lower left")
    figure.suptitle(f"Digits model, {setting}, {rows[0]['questions']} held-out questions, {record['dtype']}")
    figure.savefig(out, dpi=110)


def _space(row: dict[str, Any]) -> str:
    policy = row["policy"]
    if policy["layers"]:
        spaces = {plan["key_space"] for plan in policy["layers"]}
        return "rotated" if spaces == {"rotated"} else "unrotated"
    return "rotated" if policy["key_space"] == "rotated" else "unrotated"
