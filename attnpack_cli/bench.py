"""`attnpack bench`: the evaluation, which is part of a clone of the repository and not of the installed package."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from attnpack_cli.errors import UserError

PARTS = ("quality", "memory", "speed", "report", "all")


def add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure quality, memory and speed of every method, and write the report",
        description="Measure every method on the trained models of the repository, in a clone of it. Results are JSON "
        "and are continued where they exist. `attnpack bench PART --help` shows a part's options.",
    )
    parser.add_argument("part", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="--quick, --full, and other options")
    parser.set_defaults(check=lambda _: _root(), run=_bench)


def _root() -> Path:
    """The clone of the repository. Raises `UserError` where there is none."""
    places = [Path(__file__).resolve().parents[1], Path.cwd()]
    root = next((place for place in places if (place / "benchmarks" / "__main__.py").is_file()), None)
    if root is None:
        raise UserError(
            "the benchmarks are not installed with the package; looked in "
            f"{' and in '.join(map(str, places))}. Run from a clone of the repository"
        )
    return root


def _bench(arguments: argparse.Namespace) -> int:
    root = _root()
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A process of its own: measuring sets how memory is allocated, which is read when a process starts.
    command = [sys.executable, "-m", "benchmarks", arguments.part, *arguments.arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
