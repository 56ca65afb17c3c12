"""`attnpack export`: its arguments and their checks."""

import argparse
from pathlib import Path
from typing import Any

from attnpack_cli.arguments import add_ranks, ranks_of
from attnpack_cli.errors import UserError, hint, installed, require
from attnpack_cli.files import check_new_folder, check_pictures
from attnpack_cli.models import check_model
from attnpack_cli.policies import check_policy_file

#: What marks a folder as an artefact, which may be replaced.
MANIFEST = "manifest.json"
#: What each runtime's exporter imports, and the extra that it comes with.
_NEEDS = {"onnx": ("onnx", "onnxscript", "onnx_ir"), "tensorrt": ("onnx", "onnxscript", "onnx_ir"), "aoti": ()}
#: Dimensions and the smallest size that they may have; those of `attnpack_fx.export.program.RANGES`.
DIMS = {
    "batch_size": 1,
    "sequence_length": 1,
    "image_count": 1,
    "feature_length": 0,
    "vision_length": 0,
    "text_length": 0,
    "prompt_length": 0,
    "past_sequence_length": 0,
}


def add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a model and its packed cache for another runtime",
        description="Write a transformers model, its decode step over a packed cache and the prefill that packs it: an "
        "artefact that `attnpack run` and attnpack_fx.export.PackedGenerator load.",
    )
    parser.add_argument("model", metavar="ID_OR_PATH")
    parser.add_argument("--to", required=True, choices=tuple(_NEEDS), help="the runtime")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="what to write")
    parser.add_argument("--policy", type=Path, metavar="FILE.json", help="what PackPolicy.save wrote")
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), help="of coefficients and bases (as the weights)")
    add_ranks(parser)
    parser.add_argument(
        "--image", metavar="FILE", help="a picture of the size to export the vision tower for, where it takes one size"
    )
    parser.add_argument(
        "--dim",
        action="append",
        default=[],
        type=_dim,
        metavar="NAME=LEAST:MOST",
        help="the sizes that a dimension may have, e.g. batch_size=1:8; may be repeated",
    )
    parser.set_defaults(check=_check, run="attnpack_fx.export.command:export")


def _check(arguments: argparse.Namespace) -> None:
    ranks = ranks_of(arguments)
    if arguments.to != "aoti" and arguments.dtype == "bfloat16":
        raise UserError(f"--dtype bfloat16: --to {arguments.to} takes none; expected float32 or float16")
    for name, (least, most) in arguments.dim:
        if arguments.to == "aoti" and least < 1:
            raise UserError(f"--dim {name}={least}:{most}: --to aoti takes no empty tensors; expected sizes from 1 on")
    if arguments.policy is not None:
        if ranks or arguments.bits:
            raise UserError("--policy has ranks and bits of its own: leave --vision-rank, --text-rank, --bits out")
        check_policy_file(arguments.policy)
    if arguments.bits and ranks.get("vision_rank", "auto") is None and ranks.get("text_rank") is None:
        raise UserError(
            f"--bits {arguments.bits}: --vision-rank none leaves no coefficients and bases to store in so few; give a "
            "rank, or leave --bits out"
        )
    check_new_folder("--out", arguments.out, MANIFEST)
    require("transformers", "PIL", "tqdm")
    require(*_NEEDS[arguments.to], extra="export")
    if arguments.to == "tensorrt" and not installed("tensorrt"):
        require("tensorrt_rtx", extra="tensorrt-rtx")
    images = [arguments.image] if arguments.image is not None else []
    check_pictures(images)
    check_model(arguments.model, images, ranks)


def _dim(text: str) -> tuple[str, tuple[int, int]]:
    name, _, bounds = text.partition("=")
    least, _, most = bounds.partition(":")
    if not name or not least.isdecimal() or not most.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=LEAST:MOST, e.g. batch_size=1:8")
    if name not in DIMS:
        raise argparse.ArgumentTypeError(f"got {name!r}, expected one of {', '.join(DIMS)}{hint(name, DIMS)}")
    if not DIMS[name] <= int(least) < int(most):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a smallest and a larger largest size, from {DIMS[name]} on, e.g. {name}=1:8"
        )
    return name, (int(least), int(most))
