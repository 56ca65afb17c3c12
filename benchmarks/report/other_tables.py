"""Tables of everything but accuracy: the paper's figures, speed, memory, counted bytes, spectra, what was skipped."""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.report.data import Quality, Record, Results, is_dense, is_ours, measured, rows_of
from benchmarks.report.markup import NOTHING, Cell, Html, megabytes, number, ratio, share, table
from benchmarks.report.published import FIGURES, Figure


def paper_table() -> Html:
    """AttentionPack's own figures, a body a model."""
    names = list(dict.fromkeys(name for figure in FIGURES for name, _ in figure.scores))
    head = ("method", "reduction", "MB", "throughput", *(f"{name}, %" for name in names))
    bodies = []
    for model in dict.fromkeys(figure.model for figure in FIGURES):
        rows = [("", _published(figure, names)) for figure in FIGURES if figure.model == model]
        bodies.append((f"{model}, figures of the paper", rows))
    return table("Figures of the paper, on its own models: none was measured here", head, bodies)


def _published(figure: Figure, names: Sequence[str]) -> list[Cell]:
    scores = dict(figure.scores)
    return [
        figure.method,
        ratio(figure.reduction),
        number(figure.megabytes, 1),
        NOTHING if figure.throughput is None else f"{figure.throughput:+g} %",
        *(_score(scores.get(name), figure.differences.get(name)) for name in names),
    ]


def _score(score: float | None, difference: float | None) -> str:
    if score is None or not difference:
        return number(score)
    return f"{number(score)} ({number(difference, sign=True)})"


def speeds(speed: Record | None) -> dict[str, float]:
    """Tokens a second of each contender's largest batch, over those of the fastest dense contender."""
    best = largest(speed)
    dense = [row["tokens_per_second"] for name, row in best.items() if is_dense(name)]
    return {name: row["tokens_per_second"] / max(dense) for name, row in best.items()} if dense else {}


def largest(speed: Record | None) -> Mapping[str, Record]:
    """The largest batch of each contender, as the file says."""
    found: Mapping[str, Record] = (speed or {}).get("summary", {}).get("best", {})
    return found


def speed_table(speed: Record) -> Html:
    over = speeds(speed)
    rows = []
    for name, best in largest(speed).items():
        row = next((row for row in measured(speed) if (row["contender"], row["batch"]) == (name, best["batch"])), best)
        rates = sorted(row["batch"] / sample for sample in row.get("samples", ()))
        cells: list[Cell] = [
            name,
            f"{best['batch']:,}",
            number(best["tokens_per_second"], 1),
            f"{number(rates[0], 1)} to {number(rates[-1], 1)}" if rates else NOTHING,
            ratio(over.get(name)),
            megabytes(row.get("cache_bytes")),
            megabytes(row.get("peak_bytes")),
        ]
        rows.append(("ours" if is_ours(name) else "", cells))
    head = ("contender", "largest batch", "tokens/s", "slowest to fastest sample", "over the fastest dense",
            "cache, MB", "peak, MB")  # fmt: skip
    return table("The largest batch that fits the cap", head, [("", rows)])


def memory_table(long: Record) -> Html:
    found = measured(long)
    dense = next((row["bytes"][-1] for row in found if is_dense(row["name"])), None)
    rows: list[tuple[str, list[Cell]]] = []
    for row in found:
        sizes = row["bytes"]
        over = NOTHING if dense is None or not sizes[-1] else ratio(dense / sizes[-1])
        rows.append(("", [row["name"], f"{row['steps'][-1]:,}", megabytes(sizes[0]), megabytes(sizes[-1]), over]))
    head = ("policy", "generated tokens", "at first, MB", "at the end, MB", "dense over it, at the end")
    return table("Bytes of the cache", head, [("", rows)])


def counted_table(counted: Record) -> Html:
    rows = measured(counted)
    bodies = []
    for model in dict.fromkeys(row["model"] for row in rows):
        bodies.append((model, [("", _counted(row)) for row in rows if row["model"] == model]))
    head = ("cache", "vision tokens", "text tokens", "published", "counted, MB", "counted, reduction",
            "closed form, MB", "counted minus closed form")  # fmt: skip
    return table("Bytes counted of caches with published models' shapes", head, bodies)


def _counted(row: Record) -> list[Cell]:
    published = row.get("paper")
    if published is None:
        said = NOTHING
    else:
        said = f"{published:g} MB" if row.get("paper_unit") == "MB" else f"{published:g}x"
    return [
        row["name"],
        f"{row['vision_tokens']:,}",
        f"{row['text_tokens']:,}",
        said,
        megabytes(row["counted"]),
        ratio(row["ratio"]),
        megabytes(row.get("closed_form")),
        f"{number(row.get('difference_per_cent'), 2, sign=True)} %",
    ]


def spectra_table(quality: Quality) -> Html:
    """Medians over layers: the rank of 99 % of the energy, and the error that ranks leave."""
    ranks = sorted({rank for each in quality.spectra for rank in each.get("error") or ()}, key=int)
    rows = []
    for kind in dict.fromkeys(each["kind"] for each in quality.spectra):
        found = [each for each in quality.spectra if each["kind"] == kind]
        errors = [[each["error"][rank] for each in found if rank in (each.get("error") or ())] for rank in ranks]
        ninety_nine = [each["rank_of_99_percent"] for each in found if each.get("rank_of_99_percent") is not None]
        cells = [kind, number(statistics.median(ninety_nine), 0) if ninety_nine else NOTHING]
        rows.append(("", [*cells, *(share(statistics.median(error)) if error else NOTHING for error in errors)]))
    head = ("matrix", "rank of 99 % of the energy", *(f"error at rank {rank}, %" for rank in ranks))
    return table(f"{quality.model}: medians over layers", head, [("", rows)])


def skipped_table(results: Results) -> Html | None:
    """Methods and contenders that were not measured, with the reason; None where all were."""
    bodies: list[tuple[str, list[tuple[str, Sequence[Cell]]]]] = []
    for quality in results.qualities:
        rows: list[tuple[str, Sequence[Cell]]] = [
            ("", [each.name, each.group, "" if each.target is None else f"{each.target:g}x", each.reason])
            for each in quality.skipped
        ]
        bodies.append((quality.model, rows))
    others: list[tuple[str, Sequence[Cell]]] = []
    for record in (results.speed, results.long, results.counted):
        for row in rows_of(record):
            reason = row.get("skipped") or row.get("failed")
            if reason:
                batch = f"batch {row['batch']:,}" if "batch" in row else ""
                others.append(("", [row.get("contender") or row.get("name") or "", batch, "", str(reason)]))
    bodies.append(("Throughput, memory", others))
    bodies = [(heading, rows) for heading, rows in bodies if rows]
    if not bodies:
        return None
    return table("Not measured", ("method", "group", "asked for", "reason"), bodies, words=True)
