"""Compile what Inductor would launch; print a table of the kernels, and what a decode step launches and allocates.

python -m benchmarks.ahead                                  # every case, capabilities 8.0, 9.0 and 10.0
python -m benchmarks.ahead --only "7B LLaVA, bfloat16" --capability 90
python -m benchmarks.ahead --only tiny --capability 120 gfx942
python -m benchmarks.ahead --json kernels.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ahead.cases import cases
from benchmarks.ahead.compiled import LIMITS, USUAL, capability_of
from benchmarks.ahead.survey import survey
from benchmarks.ahead.tables import as_json, table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases of these names, or whose name holds one")
    parser.add_argument("--capability", type=capability_of, choices=LIMITS, nargs="+", default=USUAL)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the facts")
    parser.add_argument("--workers", type=int, default=2, help="processes, of cases and then of kernels (2)")
    given = parser.parse_args(arguments)
    names = {case.name for case in cases()}
    chosen = [
        case
        for case in cases()
        if not given.only or any(text == case.name or (text in case.name and text not in names) for text in given.only)
    ]
    if not chosen:
        parser.error(f"--only: got {given.only}, expected part of a case's name, e.g. {next(cases()).name!r}")
    rows, steps = survey(chosen, given.capability, given.workers)
    counted = (f"{case}, a decode step: {step}" for case, step in steps.items())
    sys.stdout.write("\n".join([table(rows), *counted]) + "\n")
    if given.json:
        given.json.write_text(as_json(rows, steps))
    failed = [facts for _, facts in rows if facts.error]
    sys.stdout.write(f"{len(rows)} compiled, {len(failed)} of them failed\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
