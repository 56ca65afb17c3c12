"""`attnpack batch`: its arguments and their checks."""

import argparse
import re
import socket
from pathlib import Path
from typing import Any

from attnpack_cli.arguments import DTYPES, positive, words
from attnpack_cli.errors import UserError, require
from attnpack_cli.files import check_new_file
from attnpack_cli.models import check_model
from attnpack_cli.policies import check_policy_file
from attnpack_cli.rows import read_answers, read_rows

_ADDRESS = re.compile(r"(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")
_PATIENCE = 1.0


def add_batch(commands: Any) -> None:
    parser = commands.add_parser(
        "batch",
        help="answer many prompts, on several workers of Ray, into a file",
        description="Answer one question about every picture in a folder, or the rows of a JSONL file, each "
        '{"id": ..., "images": [paths], "prompt": text}, on workers of Ray that each hold a compiled model. Answers '
        "are written as they come; the same command continues a file, asks again what failed, and nothing twice.",
    )
    parser.add_argument("source", type=Path, metavar="DIR_OR_JSONL", help="pictures, or rows")
    parser.add_argument("--model", required=True, metavar="ID_OR_PATH", help="a transformers model")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl", help="answers; continued if it exists")
    parser.add_argument("--prompt", type=words, metavar="TEXT", help="the question about every picture of a folder")
    parser.add_argument("--policy", type=Path, metavar="FILE.json", help="what PackPolicy.save wrote")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (%(default)s)")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="length of an answer (64)")
    parser.add_argument("--batch", type=positive, metavar="N", help="prompts at once in each worker (8)")
    parser.add_argument(
        "--memory", type=positive, metavar="BYTES", help="of each worker, weights included: the batch is what fits"
    )
    parser.add_argument("--workers", type=positive, metavar="N", help="how many (one for each GPU, or one)")
    parser.add_argument("--address", metavar="HOST:PORT", help="of a cluster of Ray, or auto (this machine alone)")
    parser.set_defaults(check=_check, run="attnpack_fx.batch_command:batch")


def _check(arguments: argparse.Namespace) -> None:
    """Raise `UserError` for what is wrong; leave what was read as `rows` and `kept`."""
    if arguments.batch is not None and arguments.memory is not None:
        raise UserError("--memory finds the batch that fits, and --batch states it: leave one of them out")
    if arguments.policy is not None:
        check_policy_file(arguments.policy)
    check_new_file("--out", arguments.out, (".jsonl", ".ndjson"))
    arguments.rows = read_rows(arguments.source, arguments.prompt)
    if arguments.out.exists() and arguments.out.samefile(arguments.source):
        raise UserError(f"--out {arguments.out}: holds the rows that are asked for; choose another place")
    arguments.kept = read_answers(arguments.out)
    require("transformers", "PIL", "tqdm", "ray", "pandas", "pyarrow", extra="ray")
    _check_address(arguments.address)
    images = next((row.images for row in arguments.rows if row.images), ())
    check_model(arguments.model, images, {}, "leave images out of the rows")


def _check_address(address: str | None) -> None:
    """Raise `UserError` for what is no address, and where nothing listens there."""
    if address is None or address == "auto":
        return
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise UserError(
            f"--address {address}: expected HOST:PORT of a cluster's head, e.g. 10.0.0.1:6379, or auto on one of its "
            "machines; leave it out for this machine alone"
        )
    try:
        socket.create_connection((found["host"].strip("[]"), int(found["port"])), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--address {address}: nothing listens there ({getattr(error, 'strerror', None) or error}); expected the "
            "head of a cluster of Ray: start one with ray start --head"
        ) from None
