"""Arguments that several benchmarks take."""

import argparse


def positive(text: str) -> int:
    """An int from 1 on. Raises argparse's error for anything else."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected at least 1")
    return number


def part(name: str, description: str | None, quick: str) -> argparse.ArgumentParser:
    """The parser of one part of `attnpack bench`. quick: what a quick run measures."""
    parser = argparse.ArgumentParser(prog=f"attnpack bench {name}", description=description)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help=quick)
    amount.add_argument("--full", action="store_true", help="everything; the default")
    parser.add_argument("--threads", type=positive, help="CPU threads (as PyTorch chooses)")
    return parser
