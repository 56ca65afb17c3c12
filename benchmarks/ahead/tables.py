"""What is known of compiled kernels, as a table for people and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType

from benchmarks.ahead.compiled import Facts
from benchmarks.ahead.steps import Step


def as_json(rows: Sequence[tuple[str, Facts]], steps: Mapping[str, Step] = MappingProxyType({})) -> str:
    """`kernels`: the facts, each with the `case` it was met in; `steps`: by case."""
    kernels = [{"case": case} | asdict(facts) for case, facts in rows]
    counts = {case: step._asdict() for case, step in steps.items()}
    return json.dumps({"kernels": kernels, "steps": counts}, indent=1) + "\n"


def table(rows: Sequence[tuple[str, Facts]]) -> str:
    header = ("case", "kernel", "gpu", "threads", "registers", "spilled", "shared", "occupancy", "matrix", "warpgroup")
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
