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
        for case, kernels in zip(chosen, pool.map(kernels_of, chosen), strict=True):
            for source, name in kernels.items():
                # What differs in the name of a launch alone is the same code.
                alike = re.sub(r"'kernel_name': '\w+'", "", source)
                found.setdefault(alike, (case.name, name, source))
        jobs = [(*each, capability) for each in found.values() for capability in capabilities]
        names, *rest = zip(*jobs, strict=True)
        yield from zip(names, pool.map(compiled, *rest), strict=True)


def kernels_of(case: Case) -> dict[str, str]:
    """Sources and names of our kernels in what Inductor writes while a case generates."""
    try:
        found = emitted(case)
    except Exception as error:
        # Dynamo's own errors do not pass between processes.
        raise RuntimeError(f"{case.name}: {error!r}\n{traceback.format_exc()}") from None
    return {source: name for source, name in found.kernels.items() if name in _NAMES}


def emitted(case: Case) -> Emitted:
    """What Inductor writes for a GPU while a case generates."""
    torch._dynamo.reset()
    model, inputs = case.model(), case.inputs()
    with recorded() as found:
        attnpack_fx.compile(model, policy=case.policy())
        model.generate(**inputs, max_new_tokens=_TOKENS, min_new_tokens=_TOKENS, do_sample=False)  # type: ignore[operator]
    return found
