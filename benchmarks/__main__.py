"""The evaluation: `attnpack bench PART`, or `python -m benchmarks PART` in a clone of the repository."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from attnpack_cli.bench import PARTS
from benchmarks import measure, results_file
from benchmarks.report.command import FOLDER as REPORT


def quality(given: argparse.Namespace, rest: Sequence[str]) -> None:
    from benchmarks.quality.command import main

    main([*_amount(given), "--out", str(given.out), *rest])


def memory(given: argparse.Namespace, rest: Sequence[str]) -> None:
    from benchmarks import memory as counted
    from benchmarks.long.command import main

    main([*_amount(given), "--out", str(given.out / "long.json"), *rest])
    few = ["--only", "AttentionPack"] if given.quick else []
    counted.main(["--out", str(given.out / "counted.json"), *few])


def speed(given: argparse.Namespace, rest: Sequence[str]) -> None:
    from benchmarks.speed.command import main

    main([*_amount(given), "--out", str(given.out / "speed.json"), *rest])


def report(given: argparse.Namespace, rest: Sequence[str]) -> None:
    from benchmarks.report.command import main

    main(["--results", str(given.out), "--out", str(given.page), *rest])


_RUN: dict[str, Callable[[argparse.Namespace, Sequence[str]], None]] = {
    "quality": quality,
    "memory": memory,
    "speed": speed,
    "report": report,
}


def _amount(given: argparse.Namespace) -> list[str]:
    amount = [f"--{name}" for name in ("quick", "full") if getattr(given, name)]
    return amount + ([f"--threads={given.threads}"] if given.threads else [])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part, or all of them in turn; options that are not of all parts go to the one part."""
    parser = argparse.ArgumentParser(prog="attnpack bench", description=__doc__, add_help=False)
    parser.add_argument("part", choices=PARTS)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help="a small part of everything, in minutes")
    amount.add_argument("--full", action="store_true", help="everything")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results, which are continued (%(default)s)")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="of the report (docs/evaluation; of --out: there)")
    parser.add_argument("--threads", type=int, help="CPU threads (as PyTorch chooses)")
    given, rest = parser.parse_known_args(arguments)
    if given.out is None:
        # What is committed was measured in full.
        given.out = Path("evaluation-quick") if given.quick else results_file.FOLDER
    if given.page is None:
        given.page = REPORT if given.out.resolve() == results_file.FOLDER else given.out
    if given.part == "all":
        if rest:
            parser.error(f"got {' '.join(rest)} for all parts, expected options of one; name the part")
        for run in _RUN.values():
            run(given, [])
    else:
        _RUN[given.part](given, rest)


if __name__ == "__main__":
    measure.restart_with_malloc_settings()
    sys.exit(main())
