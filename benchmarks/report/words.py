"""Sentences that are computed from results, for the page and for the Markdown table alike; and what does not change."""

from benchmarks.report.analysis import ALLOWANCE, Claim, claims
from benchmarks.report.data import Quality, Record, commit, machine
from benchmarks.report.markup import Html, element, interval, joined, number, points, ratio, text

TASKS = {
    "read": "the digits of one named image, asked first",
    "dialogue": "a second question, asked once the cache was packed and the first answer folded into it",
    "cell": "the digit in one cell of one named image",
    "count": "how often a digit stands in one named image",
    "needle": "which of all images holds a digit that no other does",
    "long": "512 tokens of a reference text, teacher-forced: perplexity and accuracy by token",
}
LIMITS = (
    "The models are small ones, trained for this repository on images of handwritten digits. They have the architectures "
    "named, and neither the size nor the data of published models: ratios at a given loss need not carry over.",
    "Reductions are bytes of the dense cache over bytes that are really held after the prompt, with scales, indices, "
    "bases and placement. The dense cache has the dtype of the run.",
    "Intervals are 95 % bootstrap intervals over contexts; differences are paired with the dense cache, context by "
    "context. They say nothing of other models or other kinds of images.",
    "The best of many rows, chosen by the same contexts that measured it, looks a little better than it is. That favours "
    "whichever side has more rows; the tables have them all.",
    f"“At equal bytes” allows {100 * ALLOWANCE:g} % more bytes than the ratio says, to every side alike: few "
    "configurations meet a ratio exactly.",
    "Baselines run in this library, as their papers describe them; their own code, and their kernels, were not run.",
    "Throughput is measured on a decoder of other shapes than the models whose accuracy is measured, with random contents, "
    "and without the prefill.",
    "The paper's figures are quoted, from its tables and published notes on them. They are of other models and data sets, "
    "and stand beside what was measured here for orientation only.",
)


def made(record: Record) -> str:
    """On what, and from which commit."""
    return f"{machine(record)}; commit {commit(record)}"


def sample(quality: Quality) -> str:
    """How many contexts, of how many images, on what."""
    images = f" of {quality.images} images" if quality.images else ""
    return f"{quality.contexts:,} contexts{images}, {made(quality.made)}"


def claim(found: Claim) -> Html:
    """One sentence or two: what was measured within the loss, whether the claim holds, how far the others come."""
    loss = f"{100 * found.loss:g} points"
    asked = f"{found.ratio:g}x at a loss of {loss} or less"
    if found.best is None:
        parts = [f"Nothing of ours was measured within {loss} of dense accuracy: the claim of {asked} "]
    else:
        bounds = interval(found.best.difference_interval)
        bounds = f", 95 % interval {bounds}" if bounds else ", no interval"
        parts = [
            f"{ratio(found.best.ratio)} is the largest measured reduction within {loss} of dense accuracy "
            f"({found.best.name}: {points(found.best.difference)} points{bounds}): the claim of {asked} "
        ]
    holds = element("strong", "holds" if found.holds else "does not hold", class_="holds" if found.holds else "fails")
    if found.holds and not found.certain:
        ending = ", though the interval does not exclude a larger loss."
    else:
        ending = "."
    if found.other is None:
        others = f" No other method comes within {loss} at any measured size."
    else:
        others = f" The most any other method reaches within it is {ratio(found.other.ratio)} ({found.other.name})."
    return joined([Html("".join((text(parts[0]), holds, text(ending + others))))])


def summary(quality: Quality) -> Html:
    """The claims against one model's rows, in one paragraph."""
    dense = quality.dense.get("accuracy")
    known = f" (dense accuracy {number(100 * dense, 1)} %)" if dense is not None else ""
    start = Html(f"On {element('b', quality.model)}{text(known)}: ")
    return Html(start + " ".join(claim(found) for found in claims(quality)))
