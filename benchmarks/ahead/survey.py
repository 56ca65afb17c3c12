"""All kernels that Inductor would launch in the chosen cases, each compiled once, in processes of their own."""

import re
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

import attnpack_fx
from attnpack_fx.kernels.triton import KERNELS
from benchmarks.ahead.cases import Case
from benchmarks.ahead.compiled import Facts, compiled
from benchmarks.ahead.emitted import Emitted, recorded

#: Enough for a tail to be packed, coded and folded, and for tokens to be evicted.
_TOKENS = 40
_NAMES = frozenset(kernel.__name__ for kernel in KERNELS)


def survey(chosen: Sequence[Case], capabilities: Sequence[int], workers: int) -> Iterator[tuple[str, Facts]]:
    """Every kernel of ours that Inductor writes, once, with the first case that has it; for each capability."""
    # Not forked: the parent's threads would be missing in the child.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        found: dict[str, tuple[str, str, str]] = {}
        for case, (kernels, error) in zip(chosen, pool.map(kernels_of, chosen), strict=True):
            if error:
                yield case.name, Facts("graph", 0, error)
            for source, name in kernels.items():
                # What differs in the name of a launch alone is the same code.
                alike = re.sub(r"'kernel_name': '\w+'", "", source)
                found.setdefault(alike, (case.name, name, source))
        for capability in capabilities:
            names, kernels, sources = zip(*found.values(), strict=True) if found else ((), (), ())
            yield from zip(names, pool.map(compiled, kernels, sources, [capability] * len(names)), strict=True)


def kernels_of(case: Case) -> tuple[dict[str, str], str]:
    """Sources and names of our kernels in what Inductor writes while a case generates, and why it failed, if it did."""
    try:
        found = emitted(case)
    except Exception as error:  # whatever it is, the other cases are of interest
        return {}, f"{type(error).__name__}: {' '.join(traceback.format_exc().split())[-400:]}"
    return {source: name for source, name in found.kernels.items() if name in _NAMES}, ""


def emitted(case: Case) -> Emitted:
    """What Inductor writes for a GPU while a case generates."""
    torch._dynamo.reset()
    model, inputs = case.model(), case.inputs()
    with recorded() as found:
        attnpack_fx.compile(model, policy=case.policy())
        model.generate(**inputs, max_new_tokens=_TOKENS, min_new_tokens=_TOKENS, do_sample=False)  # type: ignore[operator]
    return found
