"""One contender with one batch, in a process of its own: the time of decode steps, then their peak memory."""

import gc
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from attnpack_fx import cache_bytes, hf
from benchmarks import measure
from benchmarks.speed import allocator
from benchmarks.speed.case import Case
from benchmarks.speed.contenders import CONTENDERS, model_of

#: Steps before anything is measured: what is compiled for the first, second and third length.
_WARM_UP = 3
_WATCHED = 2


def measured(name: str, batch: int, case: Case, threads: int | None) -> dict[str, Any]:
    """`run` in a new process; `{"skipped": reason}` where a package is missing, `{"failed": reason}` where it died."""
    context = multiprocessing.get_context("forkserver")  # One process imports all that is needed, and forks.
    context.set_forkserver_preload([__name__])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, name, batch, case, threads), daemon=True)
    process.start()
    there.close()
    try:
        found: dict[str, Any] = here.recv()
    except EOFError:  # It was killed, most likely for want of memory.
        process.join()
        return {"failed": f"the process ended with exit code {process.exitcode}"}
    process.join()
    return found


def _answer(there: Connection, name: str, batch: int, case: Case, threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
    torch._inductor.config.compile_threads = 1  # To start processes for it would take longer than it saves.
    try:
        there.send(run(name, batch, case))
    except ImportError as error:
        there.send({"skipped": " ".join(str(error).split())})
    except (RuntimeError, MemoryError) as error:
        there.send({"failed": f"{type(error).__name__}: {error}"})


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
    _tidy()
    step()  # Not timed: it takes back what was released.
    measure.forget_peak()
    samples = [step() for _ in range(case.steps)]
    timed_peak = measure.resident(peak=True)
    allocator.give_back()
    step()
    _tidy()
    measure.forget_peak()
    for _ in range(_WATCHED):
        step()
    peak = measure.resident(peak=True)
    held = cache_bytes(cache)
    # What is left without a cache is the model, and code: the cache is dropped last, so that nothing else changes.
    cache = None
    _tidy()
    rest = measure.resident()
    if peak - rest < held:
        raise RuntimeError(f"{name}: got a peak of {peak - rest} bytes, expected at least the cache's {held}")
    return {
        "cache_bytes": held,
        "peak_bytes": peak - rest,
        "timed_peak_bytes": timed_peak - rest,
        "samples": samples,
    }


def _tidy() -> None:
    gc.collect()
    measure.release_free_memory()
