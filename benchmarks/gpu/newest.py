"""Operators that tell the newest queries of a call apart, on the device against the float64 reference."""

from typing import Any

import torch
from torch import Tensor

from attnpack_fx.kernels import ops_newest, reference
from attnpack_fx.kernels.parts import NEWEST
from benchmarks.gpu.judging import attended, judge
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.problems import attention_problems, on, poison, prompts
from tests.kernels.inputs import TOLERANCE, operands, relative_error


def check_attention_each(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    for number, arguments, here, what in attention_problems(machine, dtype, seed):
        poison(machine)
        out, weights = ops_newest.attention_each(*operands(here))
        attended(errors, f"attention_each {what}", out, reference.attention(**arguments), dtype, seed + number)
        expected = _each(arguments)
        error = relative_error(weights.cpu(), expected)
        judge(errors, f"attention_each, weights {what}", error, TOLERANCE[dtype], seed + number)
    return errors


def _each(arguments: dict[str, Any]) -> Tensor:
    """Weights of older queries, summed, and of each of the newest: one query at a time."""
    query, mask = arguments["query"], arguments["mask"]
    queries = query.shape[2]
    rows = []
    for row in range(queries):
        seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, row : row + 1]
        alone = {**arguments, "query": query[:, :, row : row + 1], "mask": seen}
        rows.append(reference.attention_weights(**alone)[1])
    weights = torch.stack(rows, 1)
    older = queries - min(queries, NEWEST)
    return torch.cat([weights[:, :older].sum(1, keepdim=True), weights[:, older:]], 1)


def check_observe_newest(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    for which, _, given in prompts(machine, dtype, seed):
        weights, sight = reference.observed(*given, None)
        here = on(machine, given)
        for together in (False, True):
            what = f"observe_newest {which}, together {together}"
            rows, seen = (each[:, :, -NEWEST:] for each in (weights, sight))
            if together:
                rows, seen = rows.mean(1, keepdim=True), seen.amax(1, keepdim=True)
            poison(machine)
            found = ops_newest.observe_newest(*here, False, together).cpu()
            judge(errors, f"{what}, sum", relative_error(found, rows), TOLERANCE[torch.float32], seed)
            poison(machine)
            counts = ops_newest.observe_newest(*here, True, together).cpu()
            # Weights of 1 / t within rounding may count or not.
            odds = rows * seen[..., None]
            least, most = (odds >= 1 + margin for margin in (1e-4, -1e-4))
            outside = ((counts < least.float()) | (counts > most.float())).sum()
            judge(errors, f"{what}, pivotal", float(outside), 0.0, seed)
    return errors
