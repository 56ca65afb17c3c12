"""What the page claims, computed from rows: fronts, the largest ratio within a loss, who is ahead at equal bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.report.data import Quality, Row

#: Ratio that is claimed, and the loss of accuracy it is claimed within.
CLAIMS = ((16.0, 0.001), (48.0, 0.005))
#: Rows count as of a ratio's bytes with so many more: configurations come in steps, and few meet a ratio exactly.
ALLOWANCE = 0.02
_ROUNDING = 1e-9


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other one is better than, by rising first number; of equal points, one.

    Both numbers are better the larger they are.
    """
    found: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: points[place], reverse=True):
        if not found or points[place][1] > points[found[-1]][1]:
            found.append(place)
    return found[::-1]


def front_of(rows: Sequence[Row]) -> list[Row]:
    """Rows that none has both a larger ratio and a better accuracy than, by rising ratio.

    Accuracy, here and below, is its difference from dense: not all rows are of the same contexts.
    """
    return [rows[place] for place in front([(row.ratio, row.difference) for row in rows])]


def within(rows: Sequence[Row], loss: float) -> Row | None:
    """The row of the largest ratio that loses at most `loss` of accuracy."""
    fitting = [row for row in rows if row.difference >= -loss - _ROUNDING]
    return max(fitting, key=lambda row: (row.ratio, row.difference), default=None)


def best_at(rows: Sequence[Row], ratio: float) -> Row | None:
    """The most accurate row of at least this ratio, but for `ALLOWANCE`; of equals, the one with fewer bytes."""
    fitting = [row for row in rows if row.ratio * (1 + ALLOWANCE) >= ratio]
    return max(fitting, key=lambda row: (row.difference, row.ratio), default=None)


@dataclass(frozen=True)
class Claim:
    """A claim against the rows.

    best: of ours, the row of the largest ratio within `loss`. certain: the same, the whole interval of the difference
    within it. other: as `best`, of all other groups.
    """

    ratio: float
    loss: float
    best: Row | None
    certain: Row | None
    other: Row | None

    @property
    def holds(self) -> bool:
        return self.best is not None and self.best.ratio * (1 + _ROUNDING) >= self.ratio


def claims(quality: Quality) -> list[Claim]:
    ours, others = parted(quality.rows)
    found = []
    for ratio, loss in CLAIMS:
        sure = [row for row in ours if row.difference_interval and row.difference_interval[0] >= -loss - _ROUNDING]
        found.append(Claim(ratio, loss, within(ours, loss), within(sure, loss), within(others, loss)))
    return found


Verdict = Literal[
    "ahead",
    "ahead, intervals overlap",
    "level",
    "not ahead, intervals overlap",
    "not ahead",
    "ours not measured",
    "unopposed",
]
#: Verdicts that are marked on the page.
BEHIND: tuple[Verdict, ...] = ("level", "not ahead, intervals overlap", "not ahead", "ours not measured")


@dataclass(frozen=True)
class Comparison:
    """The best of ours and the best of all others in at most the bytes of `ratio`."""

    ratio: float
    ours: Row | None
    other: Row | None

    @property
    def verdict(self) -> Verdict:
        if self.ours is None:
            return "ours not measured"
        if self.other is None:
            return "unopposed"
        if self.ours.difference == self.other.difference:
            return "level"
        ahead = self.ours.difference > self.other.difference
        better, worse = (self.ours, self.other) if ahead else (self.other, self.ours)
        high, low = better.difference_interval, worse.difference_interval
        if high and low and high[0] > low[1]:
            return "ahead" if ahead else "not ahead"
        return "ahead, intervals overlap" if ahead else "not ahead, intervals overlap"


def comparisons(quality: Quality) -> list[Comparison]:
    """One for every ratio that any row was asked for."""
    ours, others = parted(quality.rows)
    targets = sorted({row.target for row in quality.rows if row.target is not None})
    found = [Comparison(ratio, best_at(ours, ratio), best_at(others, ratio)) for ratio in targets]
    return [each for each in found if each.ours or each.other]


def main_rows(quality: Quality) -> list[Row]:
    """Rows for a short table: the front of ours, and one row of every other group.

    Of another group, the one of the largest ratio that loses half a point at most, or else its most accurate.
    """
    ours, others = parted(quality.rows)
    found = front_of(ours)
    for group in quality.groups:
        members = [row for row in others if row.group == group]
        if members:
            found.append(within(members, CLAIMS[-1][1]) or max(members, key=lambda row: (row.difference, row.ratio)))
    return found


def parted(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Ours, and all others."""
    return [row for row in rows if row.ours], [row for row in rows if not row.ours]
