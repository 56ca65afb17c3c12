"""`attnpack demo`: its arguments and their checks."""

import argparse
from pathlib import Path
from typing import Any

from attnpack_cli.arguments import add_prompt, add_ranks, positive, ranks_of
from attnpack_cli.errors import UserError, require
from attnpack_cli.files import check_new_file, check_pictures
from attnpack_cli.models import check_model, trained_model


def add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="answer questions about images, dense and packed, side by side",
        description="Answer questions about images with a dense and with a packed cache; print answers, accuracy, "
        "memory, speed and error, each as soon as it is there, and draw a picture. Without --model: on the small "
        "trained model of the repository.",
    )
    add_prompt(parser)
    add_ranks(parser)
    parser.add_argument("--model", metavar="ID_OR_PATH", help="a transformers model of yours")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("attnpack-demo.png"),
        metavar="FILE.png",
        help="the picture (%(default)s)",
    )
    trained = parser.add_argument_group("without --model")
    trained.add_argument("--questions", type=positive, metavar="N", help="questions of each task and number of images")
    trained.add_argument(
        "--images", type=_counts, metavar="N,N,...", help="numbers of images in a prompt, 1 to 16 (1,4,16)"
    )
    trained.add_argument("--quick", action="store_true", help="fewer of everything")
    own = parser.add_argument_group("with --model")
    own.add_argument("--max-new-tokens", type=positive, metavar="N", help="length of the answer (64)")
    parser.set_defaults(check=_check, run="attnpack_fx.demo.command:demo")


def _check(arguments: argparse.Namespace) -> None:
    if arguments.model is None:
        _refuse(arguments, "needs --model, or leave it out", "image", "prompt", "dtype", "max_new_tokens")
    else:
        _refuse(arguments, "is for the trained model, not for --model: leave it out", "questions", "images", "quick")
        if arguments.prompt is None:
            raise UserError("--model needs a question: --prompt TEXT")
    check_new_file("--out", arguments.out, (".png", ".pdf", ".svg"))
    require("transformers", "matplotlib", "PIL", "tqdm", *(() if arguments.model else ("sklearn",)))
    check_pictures(arguments.image)
    check_model(arguments.model or str(trained_model()), arguments.image, ranks_of(arguments))


def _refuse(arguments: argparse.Namespace, reason: str, *names: str) -> None:
    for name in names:
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} {reason}")


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(sorted({positive(part.strip()) for part in text.split(",")}))
    if counts[-1] > 16:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers from 1 to 16, e.g. 1,4,16")
    return counts
