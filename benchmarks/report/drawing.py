"""How figures look, and their two forms: PNG on white, and SVG that takes the colours of the page it stands in."""

import html
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report.data import is_ours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: In PNG as they are; in SVG they become the page's own, so that one drawing is legible in light and in dark.
INK, MUTED, PAPER = "#1b1f23", "#6a737c", "#fefefe"
_ON_PAGE = {INK: "var(--ink)", MUTED: "var(--muted)", PAPER: "var(--paper)"}

#: Colour and marker by group. Colours keep apart in the common kinds of colour blindness, and stand out on white and
#: on black alike; markers say the same once more.
_STYLES = {
    "ours, calibrated": ("#d55e00", "o"),
    "ours, composed": ("#c98500", "D"),
    "AttentionPack, as published": ("#0072b2", "s"),
    "AttentionPack, as released": ("#3a9bdc", "p"),
    "low rank x bits": ("#009e73", "^"),
    "quantization": ("#c8639f", "v"),
    "eviction": ("#7b61c4", "<"),
    "token pruning": ("#a3703a", ">"),
    "merging": ("#5f8a1f", "P"),
    "pairs": ("#b04a4a", "X"),
    "control": ("#7a7f85", "d"),
}
_FURTHER = (("#d98236", "h"), ("#2f8f9d", "8"), ("#8a8f3c", "*"), ("#9a6fb0", "H"))
#: For lines of no group, such as contenders of a measurement of speed.
COLOURS = ("#0072b2", "#009e73", "#c8639f", "#7b61c4", "#a3703a", "#3a9bdc", "#5f8a1f")
OURS_COLOURS = ("#d55e00", "#c98500", "#b04a4a")
MARKERS = ("o", "s", "^", "v", "D", "<", "p", ">", "P", "X")
_FONT = {
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "grid.alpha": 0.25,
    "grid.color": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def style(group: str, groups: list[str]) -> dict[str, Any]:
    """Colour and marker of a group; a group that is new here gets its own by its place among `groups`."""
    further = [each for each in groups if each not in _STYLES]
    colour, marker = _STYLES.get(group) or _FURTHER[further.index(group) % len(_FURTHER)]
    return {"color": colour, "marker": marker, "zorder": 4 if is_ours(group) else 3}


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple["Figure", list[Any]]:
    """A figure, sizes in inches, and its axes in one list. Raises RuntimeError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("figures need matplotlib; pip install 'attnpack-fx[demo]'") from error
    with matplotlib.rc_context(_FONT):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def label(axis: Any, text: str, at: tuple[float, float], offset: tuple[float, float], **options: Any) -> None:
    """Small text beside a point of the data, `offset` in points, legible over lines."""
    from matplotlib.patheffects import withStroke

    halo = withStroke(linewidth=2.5, foreground=PAPER)
    axis.annotate(text, at, offset, textcoords="offset points", fontsize=8.5, path_effects=[halo], zorder=6, **options)


def legend_below(figure: "Figure", handles: list[Any], columns: int) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK, fontsize=9)


def save_png(figure: "Figure", file: Path, dpi: int = 166) -> None:
    """Write `figure` on white; 10 inches make 1,660 pixels."""
    figure.savefig(file, dpi=dpi, facecolor=PAPER)


def svg(figure: "Figure", name: str, description: str) -> str:
    """An `<svg>` to stand in an HTML page. name: apart from that of other figures there, as ids begin with it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_FONT):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    # Of matplotlib's style sheet, which would hold for the whole page: the page's own has its rule for figures.
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    for colour, own in _ON_PAGE.items():
        text = text.replace(colour, own)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None, "matplotlib writes a viewBox"
    body = text[text.index(">") + 1 :]
    label = html.escape(description)
    return f'<svg role="img" aria-label="{label}" {view[0]}>{body}'.strip()
