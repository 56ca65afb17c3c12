"""What a result on the device is held to: an error, by the input it came of, or an end of the check."""

import torch
from torch import Tensor

from benchmarks.gpu.part import WrongResultError
from tests.kernels.inputs import ATTENTION_FLOOR, TOLERANCE, relative_error


def judge(errors: dict[str, float], what: str, error: float, limit: float, seed: int) -> None:
    # Written so that NaN is refused.
    if not error <= limit:
        raise WrongResultError(f"{what}, seed {seed}: error {error:.2e}, expected at most {limit:.1e}")
    errors[f"{what} {seed}"] = error


def same(errors: dict[str, float], what: str, actual: Tensor, expected: Tensor, seed: int) -> None:
    equal = actual.shape == expected.shape and torch.equal(actual.cpu(), expected)
    judge(errors, what, 0.0 if equal else float("inf"), 0.0, seed)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attended(errors: dict[str, float], what: str, out: Tensor, expected: Tensor, dtype: torch.dtype, seed: int) -> None:
    if out.dtype != dtype:
        raise WrongResultError(f"{what} returns {out.dtype}, expected {dtype}")
    judge(errors, what, relative_error(out.cpu(), expected, ATTENTION_FLOOR), TOLERANCE[dtype], seed)
