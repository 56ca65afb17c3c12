"""`attnpack run`: its arguments and their checks."""

import argparse
from pathlib import Path
from typing import Any

from attnpack_cli.arguments import above_zero, add_prompt, positive, share
from attnpack_cli.errors import UserError, require
from attnpack_cli.export import MANIFEST
from attnpack_cli.files import check_pictures, read_json

_EXPECTED = "a folder that attnpack export wrote"


def add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="generate with an artefact",
        description="Answer a prompt with an artefact of `attnpack export`; the text is printed as it comes.",
    )
    parser.add_argument("artefact", type=Path, metavar="FOLDER")
    add_prompt(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="length of the answer (64)")
    parser.add_argument("--threads", type=positive, metavar="N", help="of ONNX Runtime (as many as it likes)")
    sampling = parser.add_argument_group("sampling", "greedy without --sample")
    sampling.add_argument("--sample", action="store_true", help="draw tokens by their probability")
    sampling.add_argument("--temperature", type=above_zero, metavar="T", help="above 0 (1)")
    sampling.add_argument("--top-k", type=positive, metavar="K", help="of the K most likely tokens (all)")
    sampling.add_argument("--top-p", type=share, metavar="P", help="of those that are P likely together (1)")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same tokens every time")
    parser.set_defaults(check=_check, run="attnpack_fx.export.command:run")


def _check(arguments: argparse.Namespace) -> None:
    if arguments.prompt is None:
        raise UserError("needs a question: --prompt TEXT")
    if not arguments.sample:
        for name in ("temperature", "top_k", "top_p", "seed"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} needs --sample: without it the likeliest token is taken")
    _check_artefact(arguments.artefact)
    require("transformers", "PIL")
    check_pictures(arguments.image)


def _check_artefact(folder: Path) -> None:
    """Raise `UserError` unless the files that the manifest names are there; what is in them is verified when read."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; expected {_EXPECTED}")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: no {MANIFEST} there; expected {_EXPECTED}")
    content = read_json("the artefact's", folder / MANIFEST, "what attnpack export wrote; export the model again")
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise UserError(f"{folder / MANIFEST}: names no files; expected {_EXPECTED}")
    # Where `attnpack_fx.export` puts what tells text to tokens.
    if not (folder / "processor").is_dir():
        raise UserError(f"{folder}: holds no processor; export again with one, or use PackedGenerator")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: missing {', '.join(missing)}; copy the whole folder, or export the model again")
