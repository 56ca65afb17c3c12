"""Whether a run, quick or on another machine, finds what an earlier one found: row by row, within their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def identity(row: Row) -> tuple[Any, ...]:
    """What rows of one method in two files have alike."""
    return row["group"], row["name"], row["target"]


def agrees(row: Row, earlier: Row) -> bool:
    """Whether either difference from dense lies in the 95 % interval of the other, to a hundredth of a point.

    Of two runs of few contexts, one may be without any spread.
    """
    return _within(row, earlier) or _within(earlier, row)


def _within(row: Row, other: Row) -> bool:
    low, high = other["difference_interval"]
    return bool(low - 1e-4 <= row["difference"] <= high + 1e-4)


def compared(rows: Sequence[Row], earlier: Sequence[Row]) -> str:
    """A line for every row that both runs measured, and how many of them agree."""
    known = {identity(row): row for row in earlier if "skipped" not in row}
    pairs = [(row, known[identity(row)]) for row in rows if "skipped" not in row and identity(row) in known]
    lines = [f"{'points from dense [95 %]':68}{'here':>26}{'before':>26}"]
    for row, old in pairs:
        target = f"1/{row['target']}"
        name = row["name"] if target in row["name"] or not row["target"] else f"{row['name']}, {target}"
        agree = "" if agrees(row, old) else "  DIFFERENT"
        lines.append(f"{row['group']}: {name}".ljust(68) + f"{_points(row):>26}{_points(old):>26}{agree}")
    lines.append(f"{sum(agrees(*pair) for pair in pairs)} of {len(pairs)} rows within the intervals")
    return "\n".join(lines)


def _points(row: Row) -> str:
    low, high = row["difference_interval"]
    return f"{100 * row['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
