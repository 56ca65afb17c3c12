"""The short table, for a README or another document."""

import html
import re

from benchmarks.report import words
from benchmarks.report.analysis import claims, main_rows
from benchmarks.report.data import Quality, Results
from benchmarks.report.markup import NOTHING, Html, interval, nats, number, points, ratio, share

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
    parts = [f"{_marked(words.summary(results.qualities))}\n"] if results.qualities else []
    parts += [_model(quality) for quality in results.qualities]
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
