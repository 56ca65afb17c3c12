"""One contender with one batch, in a process of its own: the time of decode steps, then their peak memory."""

import time
from typing import Any

import torch

from attnpack_fx import cache_bytes, hf
from benchmarks import allocator, measure
from benchmarks.speed.case import Case
from benchmarks.speed.contenders import CONTENDERS, model_of

#: Steps before anything is measured: what is compiled for the first, second and third length.
_WARM_UP = 3
_WATCHED = 2
#: Bytes by which resident memory may be off: pages that small objects share with what is freed.
_SLACK = 4 << 20


@torch.no_grad()
def run(name: str, batch: int, case: Case) -> dict[str, Any]:
    """Counted bytes of the cache after the last step, peak bytes beyond the model, and seconds of each timed step.

    peak_bytes: with an allocator that gives freed memory back. timed_peak_bytes: with the one that is timed.
    """
    contender = CONTENDERS[name]
    allocator.keep()
    model = model_of(case)
    cache = contender.cache(model, case, batch)
    contender.compiles(model)
    token = torch.ones(batch, 1, dtype=torch.int64)

    def step() -> float:
        began = time.perf_counter()
        model(input_ids=token, use_cache=True, **hf.cache_argument(cache))
        return time.perf_counter() - began

    for _ in range(_WARM_UP):
        step()
    measure.tidy()
    step()  # Not timed: it takes back what was released.
    measure.forget_peak()
    samples = [step() for _ in range(case.steps)]
    timed_peak = measure.resident(peak=True)
    allocator.give_back()
    step()
    measure.tidy()
    measure.forget_peak()
    for _ in range(_WATCHED):
        step()
    peak = measure.resident(peak=True)
    held = cache_bytes(cache)
    # What is left without a cache is the model, and code: the cache is dropped last, so that nothing else changes.
    cache = None
    measure.tidy()
    rest = measure.resident()
    if peak - rest < held - _SLACK:
        raise RuntimeError(f"{name}: got a peak of {peak - rest} bytes, expected at least the cache's {held}")
    return {
        "cache_bytes": held,
        "peak_bytes": peak - rest,
        "timed_peak_bytes": timed_peak - rest,
        "samples": samples,
    }
