"""Arguments that several commands take, and what their text means."""

import argparse
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnpack_fx.policy import PackPolicy, Rank, RankSpec

DTYPES = ("float32", "bfloat16", "float16")


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """`--image` and `--prompt`."""
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture for the prompt; may be repeated",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="the question to the model")


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """`--dtype`, `--vision-rank` and `--text-rank`; `ranks_of` reads the latter two."""
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (float32)")
    told = "R, or KEYS,VALUES; 'full' is lossless, 'none' leaves it dense, 'auto' is the package's default"
    parser.add_argument(
        "--vision-rank",
        type=rank,
        default=argparse.SUPPRESS,
        metavar="R",
        help=f"rank of vision tokens: {told}",
    )
    parser.add_argument(
        "--text-rank", type=rank, default=argparse.SUPPRESS, metavar="R", help="rank of all other tokens"
    )


def ranks_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, by the names of a policy's fields."""
    return {name: getattr(arguments, name) for name in ("vision_rank", "text_rank") if hasattr(arguments, name)}


def policy_of(arguments: argparse.Namespace, **defaults: Any) -> "PackPolicy":
    from attnpack_fx.policy import PackPolicy

    return PackPolicy(**defaults | ranks_of(arguments))


def settle() -> None:
    """Keep what libraries have to say to developers off the terminal, unless it is asked for."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1 on")
    return int(text)


def rank(text: str) -> "RankSpec":
    if text == "none":
        return None
    if text == "auto":
        return "auto"
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 2 or not all(part == "full" or (part.isdecimal() and int(part) >= 1) for part in parts):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a rank such as 64, KEYS,VALUES such as 64,16, 'full', 'none' or 'auto'"
        )
    ranks: list[Rank] = ["full" if part == "full" else int(part) for part in parts]
    return ranks[0] if len(ranks) == 1 else (ranks[0], ranks[1])
