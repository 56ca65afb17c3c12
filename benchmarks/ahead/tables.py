"""What is known of compiled kernels, as a table for people and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.ahead.compiled import Facts


def as_json(rows: Sequence[tuple[str, Facts]]) -> str:
    """A list of the facts, each with the `case` it was met in."""
    return json.dumps([{"case": case} | asdict(facts) for case, facts in rows], indent=1) + "\n"


def table(rows: Sequence[tuple[str, Facts]]) -> str:
    header = ("case", "kernel", "sm", "threads", "registers", "spilled", "shared", "occupancy", "matrix", "warpgroup")
    cells = [header, *(_cells(case, facts) for case, facts in rows)]
    widths = [max(map(len, column)) for column in zip(*(row[: len(header)] for row in cells), strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, [*widths, 0], strict=False))
        ).rstrip()
        for row in cells
    )


def _cells(case: str, facts: Facts) -> tuple[str, ...]:
    numbers = facts.threads, facts.registers, facts.spilled, facts.shared
    kinds = facts.matrix, facts.warpgroup
    plain = (case, facts.kernel.removesuffix("_kernel"), str(facts.capability), *map(str, numbers))
    return *plain, f"{facts.occupancy:.0%}", *map(str, kinds), facts.error
