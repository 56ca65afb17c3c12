"""The short table, for a README or another document."""

import html
import re

from benchmarks.report import words
from benchmarks.report.analysis import claims, main_rows
from benchmarks.report.data import Quality, Results, Row
from benchmarks.report.markup import NOTHING, Html, nats, number, ratio, share, with_interval

#: Of the ratio asked for: what comes this near is not told apart.
_NEAR = 0.01
_HEAD = (
    "method",
    "group",
    "reduction",
    "accuracy, %",
    "minus dense, points [95 %]",
    "exact, %",
    "KL, nats",
    "perplexity",
)
#: Rows of the brief table: what they are called there; group, name and target in the results.
_BRIEF: dict[str, tuple[str, str, int | None]] = {
    **{f"calibrated, {ratio}x smaller": ("ours, calibrated", f"1/{ratio}", ratio) for ratio in (8, 16, 32, 48, 64)},
    "AttentionPack, as released, rank 16": ("AttentionPack, as released", "rank 16", None),
    "AttentionPack, as published, rank 16": ("AttentionPack, as published", "rank 16", None),
    "KIVI, 2 bits": ("quantization", "KIVI, 2 bit", None),
    "MiniCache": ("merging", "MiniCache", None),
    "H2O": ("eviction", "H2O", 8),
}


def markdown(results: Results) -> str:
    """The claims, the brief table, and `main_rows` of every model; missing parts are named."""
    parts = [f"{_marked(words.summary(results.qualities))}\n"] if results.qualities else []
    parts += [f"{brief(results)}\n", *map(_model, results.qualities)]
    parts += [f"{what}: not measured (`{file}`).\n" for file, what in results.missing.items()]
    return "\n".join(parts)


def brief(results: Results) -> str:
    """Few rows, a column a model: points from dense accuracy, 95 % intervals, and the ratio where none was asked."""
    lines = [("cache, bytes counted", *(f"{quality.model}, points from dense" for quality in results.qualities))]
    lines.append(("---",) * len(lines[0]))
    for label, identity in _BRIEF.items():
        known = [_find(quality, *identity) for quality in results.qualities]
        if any(known):
            lines.append((label, *map(_brief, known)))
    return "\n".join(map(_line, lines))


def _find(quality: Quality, group: str, name: str, target: int | None) -> Row | None:
    return next((row for row in quality.rows if (row.group, row.name, row.target) == (group, name, target)), None)


def _brief(row: Row | None) -> str:
    if row is None:
        return NOTHING
    reached = row.target is not None and abs(row.ratio / row.target - 1) < _NEAR
    return with_interval(row.difference, row.difference_interval) + ("" if reached else f" at {ratio(row.ratio)}")


def _model(quality: Quality) -> str:
    dense = quality.dense
    long = dense.get("long") or {}
    first = ("dense", "", ratio(1.0), share(dense.get("accuracy")), NOTHING, NOTHING, NOTHING,
             number(long.get("perplexity"), 3))  # fmt: skip
    rows = [first]
    for row in main_rows(quality):
        rows.append((
            row.name,
            row.group,
            ratio(row.ratio),
            share(row.accuracy),
            with_interval(row.difference, row.difference_interval),
            share(row.exact),
            nats(row.kl),
            number(row.long.get("perplexity"), 3),
        ))  # fmt: skip
    lines = [f"- {_marked(words.claim(quality, found))}" for found in claims(quality)]
    lines += ["", _line(_HEAD), _line(["---"] * len(_HEAD)), *map(_line, rows)]
    return "\n".join(lines) + f"\n\n{quality.model}: {words.sample(quality)}.\n"


def _marked(written: Html) -> str:
    """Markdown of a sentence of `words`, whose only markup is bold."""
    return html.unescape(re.sub(r"<[^>]*>", "**", written))


def _line(cells: tuple[str, ...] | list[str]) -> str:
    # A bar would end the cell.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
