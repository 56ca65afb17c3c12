"""Sentences that are computed from results, for the page and for the Markdown table alike; and what does not change."""

from collections.abc import Sequence

from benchmarks.report.analysis import ALLOWANCE, CLAIMS, Claim, claims
from benchmarks.report.data import Quality, Record, Row, commit, machine
from benchmarks.report.markup import Html, element, interval, megabytes, points, ratio, text

TASKS = {
    "read": "the digits of one named image, asked first",
    "dialogue": "a second question, asked once the cache was packed and the first answer folded into it",
    "cell": "the digit in one cell of one named image",
    "count": "how often a digit stands in one named image",
    "needle": "which of all images is marked with a line, and its digits",
    "long": "512 tokens of a reference text: perplexity and accuracy by token",
}
LIMITS = (
    "The models are small ones, trained for this repository on images of handwritten digits. They have the "
    "architectures named, and neither the size nor the data of published models: ratios at a given loss need not carry "
    "over.",
    "Reductions are bytes of the dense cache over bytes that are really held after the prompt, with scales, indices, "
    "bases and placement. The dense cache has the dtype of the run.",
    "Intervals are 95 % bootstrap intervals over contexts; differences are paired with the dense cache, context by "
    "context. They say nothing of other models or other kinds of images.",
    "The best of many rows, chosen by the same contexts that measured it, looks a little better than it is. That "
    "favours whichever side has more rows; the tables have them all.",
    f"“At equal bytes” allows {100 * ALLOWANCE:g} % more bytes than the ratio says, to every side alike: few "
    "configurations meet a ratio exactly.",
    "Baselines run in this library, as their papers describe them; their own code, and their kernels, were not run.",
    "Throughput is measured on a decoder of other shapes than the models whose accuracy is measured, with random "
    "contents, and without the prefill.",
    "The paper's figures are quoted, from its tables and published notes on them. They are of other models and data "
    "sets, and stand beside what was measured here for orientation only.",
)


def made(record: Record) -> str:
    """On what, and from which commit."""
    return f"Measured on {machine(record)}; commit {commit(record)}"


def sample(quality: Quality) -> str:
    """How many contexts, of how many images, on what."""
    images = f" of {quality.images} images" if quality.images else ""
    counts = {row.contexts for row in quality.rows} or {quality.contexts}
    contexts = " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))
    return f"{contexts} contexts{images}. {made(quality.made)}"


def run(quality: Quality) -> str:
    """All that is known of one model's measurement."""
    held = quality.dense.get("bytes_per_context")
    dense = f" The dense cache of a context holds {megabytes(held)} MB." if held is not None else ""
    return (
        f"{quality.model} ({quality.architecture}), {sample(quality)}, seed {quality.made.get('seed', 'not given')}."
        f"{dense}"
    )


def summary(qualities: Sequence[Quality]) -> Html:
    """The largest reductions of ours, of all models, in one sentence."""
    losses = " and ".join(f"{100 * loss:g}" for _, loss in CLAIMS)
    found = []
    for quality in qualities:
        reached = (ratio(each.best.ratio) if each.best else "none" for each in claims(quality))
        found.append(f"{element('b', quality.model)} {' and '.join(reached)}")
    start = f"Ours, the largest measured reduction of the cache within {losses} points of the dense cache's accuracy: "
    return Html(f"{text(start)}{'; '.join(found)}.")


def claim(quality: Quality, found: Claim) -> Html:
    """Whether a claim holds on a model, by the estimate and by its interval, and how far all others come."""
    loss = f"{100 * found.loss:g} points"
    asked = f"On {quality.model} the claim of {found.ratio:g}x fewer bytes at a loss of {loss} or less "
    verdict = element("strong", "holds" if found.holds else "does not hold", class_="holds" if found.holds else "fails")
    if found.best is None:
        reason = f": nothing of ours was measured within {loss} of dense accuracy."
    else:
        reason = f": the largest reduction within it is {ratio(found.best.ratio)} ({_difference(found.best)})."
        if found.certain is None:
            reason += " No row of ours has its whole 95 % interval within it."
        elif found.certain is not found.best:
            reason += f" With the whole 95 % interval within it, {_named(found.certain)}."
    if found.other is None:
        others = f" No other method comes within {loss} at any measured size."
    else:
        others = f" The most that any other method reaches is {_named(found.other)}."
    return Html(f"{text(asked)}{verdict}{text(reason + others)}")


def _difference(row: Row) -> str:
    bounds = interval(row.difference_interval)
    return f"{row.name}: {points(row.difference)} points{f', 95 % interval {bounds}' if bounds else ''}"


def _named(row: Row) -> str:
    return f"{ratio(row.ratio)} ({row.name})"
