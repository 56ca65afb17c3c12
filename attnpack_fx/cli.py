"""The command line: `attnpack demo`, `attnpack explain`, `attnpack bench`, and commands of other packages.

Those are entry points of the group `attnpack_fx.commands`: functions that add a parser to the commands, and set `run`
to what it runs. Heavy imports happen inside the commands, so that help and wrong arguments are answered at once.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING

from attnpack_fx.arguments import add_prompt, add_ranks, policy_of, positive, settle
from attnpack_fx.bench import add_bench
from attnpack_fx.demo.errors import UserError, require

if TYPE_CHECKING:
    from tqdm import tqdm

_TEXT = "Explain in a few sentences how a key/value cache makes the generation of text faster."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for what the user can put right."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"attnpack {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnpack", description="Generate from a packed key/value cache through torch.compile."
    )
    parser.add_argument("--version", action="version", version=f"attnpack-fx {version('attnpack-fx')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="answer questions about images, dense and packed, side by side",
        description="Answer questions about images with a dense and with a packed cache; print answers, accuracy, "
        "memory, speed and error, and draw a picture. Without --model: on the small trained model of the "
        "repository.",
    )
    add_prompt(demo)
    add_ranks(demo)
    demo.add_argument("--model", metavar="ID_OR_PATH", help="a transformers model of yours")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("attnpack-demo.png"),
        metavar="FILE.png",
        help="the picture (%(default)s)",
    )
    trained = demo.add_argument_group("without --model")
    trained.add_argument("--questions", type=positive, metavar="N", help="questions of each task and number of images")
    trained.add_argument(
        "--images", type=_counts, metavar="N,N,...", help="numbers of images in a prompt, 1 to 16 (1,4,16)"
    )
    trained.add_argument("--quick", action="store_true", help="fewer of everything")
    own = demo.add_argument_group("with --model")
    own.add_argument("--max-new-tokens", type=positive, metavar="N", help="length of the answer (64)")

    explain = commands.add_parser(
        "explain",
        help="say what would be packed in a model, and what not and why",
        description="Run one prefill and two decode steps of a transformers model, dense and packed, and report every "
        "attention site.",
    )
    explain.add_argument("model", metavar="ID_OR_PATH")
    add_prompt(explain)
    add_ranks(explain)
    explain.add_argument("--json", action="store_true", help="print the report as JSON")
    demo.set_defaults(run=_demo)
    explain.set_defaults(run=_explain)
    add_bench(commands)
    for entry in sorted(entry_points(group="attnpack_fx.commands"), key=lambda entry: entry.name):
        entry.load()(commands)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.model is None:
        _refuse(arguments, "needs --model", "image", "prompt", "dtype", "max_new_tokens")
    else:
        _refuse(arguments, "is for the trained model, not for --model", "questions", "images", "quick")
        if arguments.prompt is None:
            raise UserError("--model needs a question: --prompt TEXT")
    if not arguments.out.parent.is_dir():
        raise UserError(f"--out {arguments.out}: there is no folder {arguments.out.parent}")
    if arguments.out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {arguments.out}: expected a name that ends in .png, .pdf or .svg")
    require("transformers", "matplotlib", "PIL", "tqdm", *(() if arguments.model else ("sklearn",)))
    settle()
    from tqdm import tqdm

    with tqdm(unit="step", leave=False, file=sys.stderr) as progress:
        text = _own(arguments, progress) if arguments.model else _trained(arguments, progress)
    print(text)


def _trained(arguments: argparse.Namespace, progress: "tqdm") -> str:
    from dataclasses import replace

    from attnpack_fx.demo import trained
    from attnpack_fx.demo.load import load, trained_model
    from attnpack_fx.policy import PolicyError

    settings = trained.QUICK if arguments.quick else trained.Settings()
    given = {name: value for name in ("questions", "images") if (value := getattr(arguments, name)) is not None}
    try:
        policy = policy_of(arguments, vision_rank=trained.VISION_RANK)
        return trained.run(load(str(trained_model())), replace(settings, **given), policy, arguments.out, progress)
    except PolicyError as error:
        raise UserError(str(error)) from error


def _own(arguments: argparse.Namespace, progress: "tqdm") -> str:
    from attnpack_fx.demo import own
    from attnpack_fx.demo.load import load, open_images
    from attnpack_fx.policy import PolicyError

    images = open_images(arguments.image)
    try:
        policy = policy_of(arguments)
        loaded = load(arguments.model, arguments.dtype or "float32")
        return own.run(
            loaded, arguments.prompt, images, arguments.max_new_tokens or 64, policy, arguments.out, progress
        )
    except PolicyError as error:
        raise UserError(str(error)) from error


def _explain(arguments: argparse.Namespace) -> None:
    require("transformers", "PIL")
    settle()
    from attnpack_fx.demo.generation import explained
    from attnpack_fx.demo.load import load, model_inputs, open_images
    from attnpack_fx.policy import PolicyError

    images = open_images(arguments.image)
    try:
        policy = policy_of(arguments)
        loaded = load(arguments.model, arguments.dtype or "float32")
        report = explained(loaded, model_inputs(loaded, arguments.prompt or _TEXT, images), policy)
    except PolicyError as error:
        raise UserError(str(error)) from error
    print(json.dumps(report, indent=2) if arguments.json else report)


def _refuse(arguments: argparse.Namespace, reason: str, *names: str) -> None:
    for name in names:
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} {reason}")


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(sorted({positive(part.strip()) for part in text.split(",")}))
    if counts[-1] > 16:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers from 1 to 16, e.g. 1,4,16")
    return counts


if __name__ == "__main__":
    sys.exit(main())
