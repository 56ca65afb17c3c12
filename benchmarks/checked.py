"""Types of arguments that several benchmarks take."""

import argparse


def positive(text: str) -> int:
    """An int from 1 on. Raises argparse's error for anything else."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected at least 1")
    return number
