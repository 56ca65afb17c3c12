"""The command line: every contender looks for its largest batch in turn, then the largest are timed again in turn."""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import results_file
from benchmarks.arguments import part, positive
from benchmarks.child import in_child
from benchmarks.speed import case as cases
from benchmarks.speed import point
from benchmarks.speed.case import Case
from benchmarks.speed.contenders import CONTENDERS, FEW
from benchmarks.speed.search import next_batch
from benchmarks.speed.summary import peak, summarised, table, worked

#: The largest batch tried: beyond it the weights are multiplied as fast as they can be.
LIMIT = 512

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    threads = given.threads or torch.get_num_threads()
    torch.set_num_threads(threads)  # `measure.environment` says so
    record = results_file.begin(given.out, {"benchmark": "speed", "threads": threads, **given.case.to_dict()})
    rows: list[Row] = record["rows"]

    def keep(row: Row) -> None:
        results_file.replace_row(rows, _row(rows, row["contender"], row["batch"]), row)
        results_file.write(given.out, record)

    with tqdm(desc="speed", unit="point", file=sys.stderr) as bar:
        find(rows, given.contenders, given.case, threads, keep, bar)
        repeat(rows, given.contenders, given.case, threads, keep, bar)
    record["summary"] = summarised(rows)
    results_file.write(given.out, record)
    print(table(rows, given.case))


def find(
    rows: list[Row], names: Sequence[str], case: Case, threads: int, keep: Callable[[Row], None], bar: Any
) -> None:
    """Measure batches of each contender in turn until its largest that fits is known; what is in `rows` is not again.

    keep: called with every new row. Contenders that were skipped, since a package is missing, are tried anew.
    """
    looking, tried = list(names), set()
    while looking:
        for name in list(looking):
            own = [row for row in rows if row["contender"] == name]
            known = {row["batch"]: peak(row) for row in own if "skipped" not in row}
            batch = None if name in tried else next_batch(known, case.cap_bytes, LIMIT)
            if batch is None:
                looking.remove(name)
                continue
            bar.set_postfix_str(f"{name}, batch {batch}")
            row = {"contender": name, "kind": CONTENDERS[name].kind, "batch": batch, "cap_bytes": case.cap_bytes}
            row |= in_child(point.run, name, batch, case, threads=threads)
            if "skipped" in row:
                tried.add(name)
            keep(_rated(row))
            bar.update()


def repeat(
    rows: list[Row], names: Sequence[str], case: Case, threads: int, keep: Callable[[Row], None], bar: Any
) -> None:
    """Time the largest batch of each contender again, `case.rounds` times, contenders in turn."""
    for number, name in itertools.product(range(case.rounds), names):
        largest = summarised(rows)["best"].get(name)
        if largest is None:
            continue
        row = _row(rows, name, largest["batch"])
        assert row is not None
        if len(row["samples"]) > case.steps * (number + 1):
            continue
        bar.set_postfix_str(f"{name}, batch {row['batch']}, again")
        again = in_child(point.run, name, row["batch"], case, threads=threads)
        if worked(again):
            # The first peak stays: whether a batch fits must not change once its neighbours were tried.
            keep(_rated({**row, "samples": row["samples"] + again["samples"]}))
        bar.update()


def _rated(row: Row) -> Row:
    """With what follows from the samples; `fits` is False where a point could not run."""
    if not worked(row):
        return {**row, "fits": False}
    speed = row["batch"] / statistics.median(row["samples"])
    return {**row, "tokens_per_second": speed, "fits": row["peak_bytes"] <= row["cap_bytes"]}


def _row(rows: list[Row], name: str, batch: int) -> Row | None:
    return next((row for row in rows if (row["contender"], row["batch"]) == (name, batch)), None)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `case` and `contenders` say what it comes to."""
    what = "Tokens/s of the largest batch whose decoding fits a cap of memory."
    parser = part("speed", what, "a narrower model, a smaller cap, one contender of each kind")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="rows already in it are kept")
    parser.add_argument("--cap", type=positive, metavar="MB", help="of memory beyond the model (537; quick: 67)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(bfloat16)")
    parser.add_argument("--only", action="append", choices=CONTENDERS, metavar="NAME", help=", ".join(CONTENDERS))
    given = parser.parse_args(arguments)
    case = cases.QUICK if given.quick else cases.FULL
    cap = given.cap * 10**6 if given.cap else case.cap_bytes
    given.case = replace(case, dtype=given.dtype, cap_bytes=cap)
    given.contenders = tuple(given.only or (FEW if given.quick else CONTENDERS))
    return given
