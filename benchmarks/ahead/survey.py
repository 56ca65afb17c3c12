"""All kernels that Inductor would launch in the chosen cases, each compiled once, in processes of their own."""

import re
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

import attnpack_fx
from attnpack_fx.kernels.triton import KERNELS
from benchmarks.ahead.cases import Case
from benchmarks.ahead.compiled import Capability, Facts, compiled
from benchmarks.ahead.emitted import Emitted, recorded
from benchmarks.ahead.steps import Step, step_of

#: Enough for a tail to be packed, coded and folded, and for tokens to be evicted.
_TOKENS = 40
_NAMES = frozenset(kernel.__name__ for kernel in KERNELS)


class Found(NamedTuple):
    """Of one case: sources and names of our kernels, and what a decode step does; error: why nothing was found."""

    kernels: dict[str, str]
    step: Step | None
    error: str = ""


def survey(
    chosen: Sequence[Case], capabilities: Sequence[Capability], workers: int
) -> tuple[list[tuple[str, Facts]], dict[str, Step]]:
    """Every kernel of ours that Inductor writes, once, with the first case that has it, for each capability; and what a
    decode step does, by case.
    """
    rows, steps = [], {}
    # Not forked: the parent's threads would be missing in the child.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        unlike: dict[str, tuple[str, str, str]] = {}
        for case, found in zip(chosen, pool.map(found_in, chosen), strict=True):
            if found.error:
                rows.append((case.name, Facts("graph", 0, found.error)))
            if found.step:
                steps[case.name] = found.step
            for source, name in found.kernels.items():
                # What differs in the name of a launch alone is the same code.
                alike = re.sub(r"'kernel_name': '\w+'", "", source)
                unlike.setdefault(alike, (case.name, name, source))
        for capability in capabilities:
            names, kernels, sources = zip(*unlike.values(), strict=True) if unlike else ((), (), ())
            rows += zip(names, pool.map(compiled, kernels, sources, [capability] * len(names)), strict=True)
    return rows, steps


def found_in(case: Case) -> Found:
    """What Inductor writes while a case generates."""
    try:
        found = emitted(case)
    except Exception as error:  # whatever it is, the other cases are of interest
        return Found({}, None, f"{type(error).__name__}: {' '.join(traceback.format_exc().split())[-400:]}")
    ours = {source: name for source, name in found.kernels.items() if name in _NAMES}
    return Found(ours, step_of(found.wrappers))


def emitted(case: Case) -> Emitted:
    """What Inductor writes for a GPU while a case generates."""
    torch._dynamo.reset()
    kernel_side_table.reset_table()  # PyTorch 2.11 goes through all kernels of the process for every graph
    model, inputs = case.model(), case.inputs()
    with recorded() as found:
        attnpack_fx.compile(model, policy=case.policy())
        model.generate(**inputs, max_new_tokens=_TOKENS, min_new_tokens=_TOKENS, do_sample=False)  # type: ignore[operator]
    return found
