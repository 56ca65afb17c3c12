"""Arguments that several commands take, and what their text means."""

import argparse
import math
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")

Rank = int | str


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """`--image` and `--prompt`."""
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture for the prompt; may be repeated",
    )
    parser.add_argument("--prompt", type=words, metavar="TEXT", help="the question to the model")


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


def words(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a question, e.g. --prompt 'What is this?'")
    return text


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1 on")
    return int(text)


def above_zero(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0, e.g. 0.7")
    return value


def share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a share above 0 and up to 1, e.g. 0.9")
    return value


def rank(text: str) -> Rank | tuple[Rank, Rank] | None:
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


def _number(text: str) -> float:
    """NaN, which no comparison lets through, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan
