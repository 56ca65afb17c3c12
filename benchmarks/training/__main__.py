"""`python -m benchmarks.training FAMILY`."""

import argparse
import logging
import sys
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.training.families import FAMILIES
from benchmarks.training.run import Run


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description="Train a digits model.")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the trained model")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, metavar="FILE", help="save the run to it and resume it from there")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="go on from this trained model")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(given.threads)
    Run(given.family, given.out, given.minutes, given.seed, given.state, given.start).train()


if __name__ == "__main__":
    measure.restart_with_malloc_settings()
    main()
