"""`attnpack serve`: its arguments and their checks."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

from attnpack_cli.arguments import above_zero, add_ranks, positive, ranks_of
from attnpack_cli.errors import UserError, require
from attnpack_cli.models import check_model
from attnpack_cli.policies import check_policy_file

#: Addresses that this machine alone can reach.
LOOPBACK = ("127.0.0.1", "localhost")
#: Of a request, and of an image, as `attnpack_serve.images.ImageLimits` has them.
_IMAGES, _PIXELS = 16, 16 * 2**20
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
#: A name, or an address without its scheme.
_HOST = re.compile(r"\.?[\w-]+(\.[\w-]+)*(:\d{1,5})?")


def add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer clients of OpenAI's chat completions",
        description="Serve a vision-language model from a packed cache: /v1/chat/completions with images and "
        "streaming, /v1/models, /metrics, /health, and a page to try it at /.",
    )
    parser.add_argument("model", metavar="ID_OR_PATH")
    parser.add_argument("--policy", type=Path, metavar="FILE.json", help="what PackPolicy.save wrote")
    add_ranks(parser)
    parser.add_argument("--name", metavar="NAME", help="of the model, as clients ask for it (the folder's)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="to listen on (8000)")
    parser.add_argument("--device", metavar="DEVICE", help="of the model, such as cuda:1 (a GPU, where there is one)")
    safety = parser.add_argument_group("who may ask, and for what")
    safety.add_argument("--api-key", metavar="KEY", help="that clients send; or set ATTNPACK_API_KEY")
    safety.add_argument(
        "--allow-urls", nargs="+", type=_host, default=[], metavar="HOST",
        help="hosts that images may be fetched from (none: images come in the request)",
    )  # fmt: skip
    safety.add_argument("--timeout", type=above_zero, default=300.0, metavar="S", help="seconds of a request (300)")
    safety.add_argument("--max-body", type=_bytes, default=64 * 2**20, metavar="BYTES", help="of a request (64 MiB)")
    safety.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="of an answer (512)")
    safety.add_argument("--queue", type=positive, default=64, metavar="N", help="requests that may wait (64)")
    sizes = parser.add_argument_group("memory")
    sizes.add_argument("--memory", type=_bytes, metavar="BYTES", help="for everything, e.g. 40G (what is free)")
    sizes.add_argument("--prefixes", type=_bytes, metavar="BYTES", help="for prompts that are kept (an eighth), or 0")
    sizes.add_argument("--batch", type=positive, default=8, metavar="N", help="prompts at once, at most (8)")
    sizes.add_argument("--images", type=positive, default=1, metavar="N", help="of the prompt that is measured (1)")
    sizes.add_argument(
        "--size", type=_size, default=(448, 448), metavar="WxH", help="of the images that are measured (448x448)"
    )
    parser.set_defaults(check=_check, run="attnpack_serve.command:run")


def _check(arguments: argparse.Namespace) -> None:
    ranks = ranks_of(arguments)
    if arguments.policy:
        if ranks:
            raise UserError("--policy has ranks of its own: leave --vision-rank, --text-rank out")
        check_policy_file(arguments.policy)
    if arguments.api_key is not None and not arguments.api_key.strip():
        raise UserError("--api-key: got an empty one, expected a key; leave it out to let all of this machine in")
    if arguments.images > _IMAGES:
        raise UserError(f"--images {arguments.images}: expected at most {_IMAGES}, as many as a request may have")
    if arguments.size[0] * arguments.size[1] > _PIXELS:
        raise UserError(f"--size: expected at most {_PIXELS} pixels, as many as an image of a request may have")
    if arguments.host == "::1":
        raise UserError("--host ::1: listen on 127.0.0.1 instead")
    known = arguments.api_key or os.environ.get("ATTNPACK_API_KEY")
    if arguments.host not in LOOPBACK and not known:
        raise UserError(f"--host {arguments.host}: others can reach it; give --api-key KEY, or ATTNPACK_API_KEY")
    check_model(arguments.model, (), ranks)
    require("transformers", "PIL", "fastapi", "uvicorn", "h11", "prometheus_client", extra="serve")


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a port from 1 to 65535")
    return int(text)


def _host(text: str) -> str:
    _, _, port = text.partition(":")
    if not _HOST.fullmatch(text) or not text.isascii() or not 0 < int(port or 1) < 65536:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected the name of a host, without http:// and path")
    return text.lower()


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.upper())
    if not found:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected bytes, such as 80G or 500M")
    return int(float(found[1]) * _UNITS[found[2]])


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not found or not int(found[1]) or not int(found[2]):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected width x height in pixels, such as 448x448")
    return int(found[1]), int(found[2])
