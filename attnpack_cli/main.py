"""`attnpack`: its commands, and the order in which one runs: arguments parsed, checked, and only then PyTorch imported.

A command is a function that adds a parser to the commands and sets `check`, which takes the parsed arguments and raises
`UserError`, and `run`, a function of the arguments or its name as `"module:function"`; what it returns is the exit
code. Other packages add theirs as entry points of the group `attnpack_fx.commands`, by the command's name; they are
loaded for every help text, and must not import anything heavy.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from pkgutil import resolve_name
from typing import Any, NoReturn

from attnpack_cli.batch import add_batch
from attnpack_cli.bench import add_bench
from attnpack_cli.demo import add_demo
from attnpack_cli.doctor import add_doctor
from attnpack_cli.errors import UserError
from attnpack_cli.explain import add_explain
from attnpack_cli.export import add_export
from attnpack_cli.run import add_run
from attnpack_cli.serve import add_serve


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit code: 0; 2 for what the user can put right; 1 where `doctor` finds a fault or rows of `batch` fail.
    """
    arguments = _parser().parse_args(argv)
    try:
        getattr(arguments, "check", lambda _: None)(arguments)
        # What transformers has to say to developers stays off the terminal, unless it is asked for.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # So does what Dynamo has: where a model's own graphs break. Backends warn by Python's warnings.
        os.environ.setdefault("TORCH_LOGS", "-dynamo")
        # Nor does PyTorch's profiler, which measures a prompt's memory, say when it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        run = resolve_name(arguments.run) if isinstance(arguments.run, str) else arguments.run
        return run(arguments) or 0
    except UserError as error:
        print(f"attnpack {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and where help is, without the usage of all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """Reads the version when it is asked for: looking for it takes time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"attnpack-fx {version('attnpack-fx')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="attnpack", description="Generate from a packed key/value cache through torch.compile.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_demo, add_explain, add_batch, add_serve, add_export, add_run, add_bench, add_doctor):
        add(commands)
    for entry in sorted(entry_points(group="attnpack_fx.commands"), key=lambda entry: entry.name):
        # An earlier release, of which metadata may be left, had commands of its own among them.
        if entry.name not in commands.choices:
            entry.load()(commands)
    return parser
