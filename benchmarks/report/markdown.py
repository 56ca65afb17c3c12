"""The short table, for a README or another document."""

import html
import re

from benchmarks.report import words
from benchmarks.report.analysis import main_rows
from benchmarks.report.data import Quality, Results
from benchmarks.report.markup import NOTHING, interval, number, points, ratio, share, small

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


def markdown(results: Results) -> str:
    """The claims and `main_rows` of every model; missing parts are named."""
    parts = [_model(quality) for quality in results.qualities]
    parts += [f"{what}: not measured (`{file}`).\n" for file, what in results.missing.items()]
    return "\n".join(parts)


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
            f"{points(row.difference)} {interval(row.difference_interval)}".strip(),
            share(row.exact),
            small(row.kl),
            number(row.long.get("perplexity"), 3),
        ))  # fmt: skip
    said = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"</?(?:strong|b)[^>]*>", "**", words.summary(quality))))
    lines = [f"{said}\n", _line(_HEAD), _line(["---"] * len(_HEAD)), *map(_line, rows)]
    return "\n".join(lines) + f"\n\n{quality.model}: {words.sample(quality)}.\n"


def _line(cells: tuple[str, ...] | list[str]) -> str:
    # A bar would end the cell.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
