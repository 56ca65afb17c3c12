"""Time on the device: the clock, CUDA graphs, and contenders in turn."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

#: How long one sample lasts at least, and all samples of one contender at most (but never fewer than `MIN_ROUNDS`).
SAMPLE_SECONDS, CONTENDER_SECONDS = 0.002, 0.03
MIN_ROUNDS, MAX_ROUNDS = 3, 15


class Clock:
    """Seconds of work on a device, by CUDA events; on a CPU by the host's clock. Nothing else tells the two apart."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def seconds(self, call: Callable[[], object], count: int = 1) -> float:
        """Seconds per call of `count` calls in a row, launches included."""
        if not self._cuda:
            began = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - began) / count
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """The same work as one CUDA graph, whose launches cost next to nothing; on a CPU the call itself.

        Raises RuntimeError where the work cannot be captured.
        """
        if not self._cuda:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


@dataclass(frozen=True)
class Contender:
    """One way to compute something.

    calls: the same work on one input set each; together they are larger than the cache, so that none is read from it.
    context: what must be entered around the calls, outside of the time that is taken.
    """

    calls: Sequence[Callable[[], object]]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def all_sets(self) -> None:
        for call in self.calls:
            call()


def compare(clock: Clock, contenders: Mapping[str, Contender], graphs: bool = True) -> dict[str, dict[str, Any]]:
    """Seconds per call of every contender: `eager`, and `graph`, or in `no_graph` why the work cannot be captured.

    `seconds` is the median that counts: that of the graph if there is one.
    """
    turns: dict[tuple[str, str], tuple[Callable[[], object], Contender]] = {}
    results: dict[str, dict[str, Any]] = {name: {} for name in contenders}
    for name, contender in contenders.items():
        turns[name, "eager"] = contender.all_sets, contender
        if graphs:
            try:
                with contender.context():
                    turns[name, "graph"] = clock.captured(contender.all_sets), contender
            except RuntimeError as error:  # How CUDA says that something in the work cannot be captured.
                results[name]["no_graph"] = first_line(error)
    for (name, how), samples in _in_turn(clock, turns).items():
        sets = len(contenders[name].calls)
        results[name][how] = spread([sample / sets for sample in samples])
    for result in results.values():
        result["seconds"] = result.get("graph", result["eager"])["median"]
    return results


def _in_turn(clock: Clock, turns: Mapping[Any, tuple[Callable[[], object], Contender]]) -> dict[Any, list[float]]:
    """Samples of each contender, A B C, B C A, ...: a slow moment falls on all of them. The slow ones sit out later
    rounds.
    """
    counts, rounds = {}, {}
    for key, (call, contender) in turns.items():
        with contender.context():
            clock.seconds(call)
            once = max(clock.seconds(call), 1e-7)
        counts[key] = max(1, round(SAMPLE_SECONDS / once))
        rounds[key] = min(MAX_ROUNDS, max(MIN_ROUNDS, int(CONTENDER_SECONDS / (counts[key] * once))))
    samples: dict[Any, list[float]] = {key: [] for key in turns}
    keys = list(turns)
    for number in range(max(rounds.values())):
        start = number % len(keys)
        for key in keys[start:] + keys[:start]:
            if number < rounds[key]:
                call, contender = turns[key]
                with contender.context():
                    samples[key].append(clock.seconds(call, counts[key]))
    return samples


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Seconds: minimum, median, maximum, and of how many samples."""
    return {
        "min": min(samples),
        "median": statistics.median(samples),
        "max": max(samples),
        "samples": len(samples),
    }


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"[:300]
