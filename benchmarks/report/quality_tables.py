"""Tables of accuracy: the main rows, all rows, and rows by task."""

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.report.analysis import BEHIND, CLAIMS, Comparison, comparisons, front_of, main_rows
from benchmarks.report.data import Quality, Record, Row
from benchmarks.report.markup import (
    NOTHING,
    Cell,
    Html,
    element,
    interval,
    nats,
    number,
    points,
    ratio,
    share,
    table,
    text,
    with_interval,
)

_HEAD = ("accuracy, %", "minus dense, points [95 %]", "ROUGE-L, %", "exact, %", "KL, nats", "perplexity")
_MEASURES = (
    "accuracy, %",
    "minus dense, points [95 %]",
    "exact, %",
    "ROUGE-L, %",
    "KL, nats",
    "agree, %",
    "diverges at",
)


def main_table(qualities: Sequence[Quality], speeds: Mapping[str, float]) -> Html:
    """The rows of `main_rows`, model by model. speeds: tokens a second over the fastest dense contender's, by name."""
    shown = [row for quality in qualities for row in main_rows(quality)]
    timed = any(row.name in speeds for row in shown)
    head = ["method", "reduction", *(["tokens/s over dense"] if timed else []), *_HEAD]
    bodies = []
    for quality in qualities:
        rows = [_dense(quality, timed)]
        for row in main_rows(quality):
            speed = [ratio(speeds.get(row.name))] if timed else []
            rows.append(("ours" if row.ours else "", [_name(row), ratio(row.ratio), *speed, *_scores(row)]))
        bodies.append((f"{quality.model}, measured here", rows))
    return table("Measured here, in the shape of the paper's tables", head, bodies)


def full_table(quality: Quality) -> Html:
    """Every row of one model, group by group; those that no other row beats are marked."""
    best = set(map(id, front_of(quality.rows)))
    head = ("method", "reduction", "of vision", *_HEAD, "agree, %", "long text: diverges at", "reduction at its end",
            "contexts")  # fmt: skip
    bodies: list[tuple[str, Iterable[tuple[str, Sequence[Cell]]]]] = [("", [_dense(quality, True, 4)])]
    for group, members in _by_group(quality):
        bodies.append((group, [("front" if id(row) in best else "", _full(row)) for row in members]))
    return table(f"{quality.model}: every method", head, bodies)


def task_table(quality: Quality) -> Html:
    """Accuracy and its difference from dense, a column a task."""
    tasks = quality.tasks
    dense = quality.dense.get("tasks") or {}
    first = ["dense", ratio(1.0), *(share((dense.get(task) or {}).get("accuracy")) for task in tasks)]
    bodies: list[tuple[str, Iterable[tuple[str, Sequence[Cell]]]]] = [("", [("dense", first)])]
    for group, members in _by_group(quality):
        rows = [
            ("", [row.name, ratio(row.ratio), *(_by_task(row.tasks.get(task)) for task in tasks)]) for row in members
        ]
        bodies.append((group, rows))
    return table(f"{quality.model}: accuracy by task, %, and minus dense in points [95 %]",
                 ("method", "reduction", *tasks), bodies)  # fmt: skip


def measures_table(quality: Quality, task: str) -> Html:
    """Every measure of one task."""
    bodies = []
    for group, members in _by_group(quality):
        rows = [("", [row.name, ratio(row.ratio), *_measures(row.tasks[task])]) for row in members if task in row.tasks]
        if rows:
            bodies.append((group, rows))
    return table(f"{quality.model}: {task}", ("method", "reduction", *_MEASURES), bodies)


def equal_bytes_table(quality: Quality) -> Html:
    """The best of ours and the best of all others at every ratio asked for; where ours is not ahead, a mark."""
    head = ("at least", "ours is", "ours, best", "reduction", "minus dense, points [95 %]", "others, best", "reduction",
            "minus dense, points [95 %]")  # fmt: skip
    rows = [("behind" if each.verdict in BEHIND else "", _compared(each)) for each in comparisons(quality)]
    return table(f"{quality.model}: the best at equal bytes", head, [("", rows)])


def _by_group(quality: Quality) -> Iterable[tuple[str, list[Row]]]:
    """Groups, and their rows by rising ratio."""
    for group in quality.groups:
        yield group, sorted((row for row in quality.rows if row.group == group), key=lambda row: row.ratio)


def _compared(each: Comparison) -> list[Cell]:
    sides: list[Cell] = []
    for row in (each.ours, each.other):
        cells: list[Cell] = [NOTHING] * 3 if row is None else [_name(row), ratio(row.ratio), _difference(row)]
        sides += cells
    verdict: Cell = element("strong", each.verdict) if each.verdict in BEHIND else each.verdict
    return [f"{each.ratio:g}x", verdict, *sides]


def _dense(quality: Quality, wide: bool, further: int = 0) -> tuple[str, list[Cell]]:
    tasks = (quality.dense.get("tasks") or {}).values()
    long = quality.dense.get("long") or {}
    cells: list[Cell] = [
        "dense",
        ratio(1.0),
        *([ratio(1.0)] if wide else []),
        share(quality.dense.get("accuracy")),
        NOTHING,
        share(_mean(tasks, "rouge_l")),
        share(_mean(tasks, "exact")),
        NOTHING,
        number(long.get("perplexity"), 3),
        *[NOTHING] * further,
    ]
    return "dense", cells


def _mean(records: Iterable[Record], name: str) -> float | None:
    found = [record[name] for record in records if record.get(name) is not None]
    return sum(found) / len(found) if found else None


def _full(row: Row) -> list[Cell]:
    return [
        row.name,
        ratio(row.ratio),
        ratio(row.vision_ratio),
        *_scores(row),
        share(row.agree),
        number(row.long.get("first_divergence"), 0),
        ratio(row.long.get("ratio")),
        f"{row.contexts:,}",
    ]


def _scores(row: Row) -> list[Cell]:
    return [
        share(row.accuracy),
        _difference(row),
        share(row.rouge_l),
        share(row.exact),
        nats(row.kl),
        number(row.long.get("perplexity"), 3),
    ]


def _measures(found: Record) -> list[Cell]:
    return [
        share(found.get("accuracy")),
        with_interval(found.get("difference"), found.get("difference_interval")),
        share(found.get("exact")),
        share(found.get("rouge_l")),
        nats(found.get("kl")),
        share(found.get("agree")),
        number(found.get("first_divergence"), 1),
    ]


def _difference(row: Row) -> Html:
    return _two(points(row.difference), interval(row.difference_interval))


def _by_task(found: Record | None) -> Cell:
    if found is None:
        return NOTHING
    return _two(share(found.get("accuracy")), with_interval(found.get("difference"), found.get("difference_interval")))


def _two(first: str, second: str) -> Html:
    return Html(f"{text(first)} {element('small', second)}") if second else text(first)


def _name(row: Row) -> Html:
    return Html(f"{text(row.name)} {element('small', row.group)}")


def selection() -> str:
    """How `main_rows` chooses, in words."""
    return (
        "Of ours, every row that none of ours beats in both bytes and accuracy; of every other group, the one of the "
        f"largest reduction that loses at most {100 * CLAIMS[-1][1]:g} points, or, where none does, its most accurate."
    )
