"""`attnpack explain`: its arguments and their checks."""

import argparse
from typing import Any

from attnpack_cli.arguments import add_prompt, add_ranks, ranks_of
from attnpack_cli.errors import require
from attnpack_cli.files import check_pictures
from attnpack_cli.models import check_model


def add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="say what would be packed in a model, and what not and why",
        description="Run one prefill and two decode steps of a transformers model, dense and packed, and report every "
        "attention site.",
    )
    parser.add_argument("model", metavar="ID_OR_PATH")
    add_prompt(parser)
    add_ranks(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(check=_check, run="attnpack_fx.demo.command:explain")


def _check(arguments: argparse.Namespace) -> None:
    require("transformers", "PIL", "tqdm")
    check_pictures(arguments.image)
    check_model(arguments.model, arguments.image, ranks_of(arguments))
