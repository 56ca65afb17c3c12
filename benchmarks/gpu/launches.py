"""Where one decode step's time goes: device work, or the host between launches. From a profiler's trace."""

import importlib.util
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import decoders
from benchmarks.gpu.decoders import CONTENDERS, EAGER, OURS, WARMUP, Decoder, Prompt
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.part import Failure, Part, Result, Run, attempt, left_out, markdown, measured, within_memory

#: Steps that are timed, and steps that are traced.
_TIMED, _TRACED = 16, 4
#: Most kernels the packed decode of a layer may launch beside its projections.
TARGET = 4
#: Names of the libraries' matrix product kernels, and of Triton's own.
_PRODUCT = re.compile(r"gemm|gemv|gemvx|cutlass|cublas|nvjet|xmma|splitk|triton_tem", re.IGNORECASE)
_DEVICE, _DRY_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"}), frozenset({"cpu_op"})
_RUNTIME = frozenset({"cuda_runtime", "cuda_driver"})


def cases(run: Run) -> Mapping[str, Callable[[], Result]]:
    if run.machine.dry:
        grid = product(decoders.DRY_DECODERS, (OURS, EAGER))
        prompt = decoders.DRY_PROMPTS[0]
    else:
        # One with a KV head for each query head, and one with groups.
        grid = product((decoders.DECODERS[0], decoders.DECODERS[3]), CONTENDERS)
        prompt = decoders.PROMPTS[0]
    return {f"{decoder.name}: {name}": partial(measure_case, run, decoder, prompt, name) for decoder, name in grid}


@torch.no_grad()
def measure_case(run: Run, decoder: Decoder, prompt: Prompt, name: str) -> Result:
    """One decode step at batch 1: wall time, device time in it, kernels and launches."""
    with decoders.alone(run.machine):
        call = partial(_measure, run.machine, decoder, prompt, name)
        outcome = within_memory(call) if name == OURS else attempt(call)
    return {"skipped": outcome.reason} if isinstance(outcome, Failure) else outcome


def _measure(machine: Machine, decoder: Decoder, prompt: Prompt, name: str) -> Result:
    model = decoders.build(decoder, machine.device)
    new = WARMUP + _TIMED + _TRACED
    ids = decoders.random_ids(model, 1, prompt.tokens + new, machine)
    contender = decoders.contenders(model, decoder, prompt, new, machine.dry)[name]()
    contender.prefill(ids[:, : prompt.tokens])
    start, end = prompt.tokens + WARMUP, prompt.tokens + WARMUP + _TIMED
    contender.decode(ids[:, prompt.tokens : start])
    wall = machine.clock.seconds(partial(contender.decode, ids[:, start:end])) / _TIMED
    activities = [ProfilerActivity.CPU] if machine.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as trace:
        contender.decode(ids[:, end:])
        machine.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    found = summary(events, _TRACED, _names(), _DRY_DEVICE if machine.dry else _DEVICE)
    return {
        "wall_seconds": wall,
        "busy_share": found["busy_seconds"] / wall,
        "layers": decoder.layers,
        **found,
    }


def summary(
    events: Sequence[Mapping[str, Any]], steps: int, packed: Sequence[str] = (), device: frozenset[str] = _DEVICE
) -> Result:
    """What a trace of `steps` decode steps holds, per step.

    events: of Chrome's trace format, times in microseconds. A kernel counts as the packed cache's when it has one of
    the names in `packed`, as compiled graphs launch them, or when its launch, which has the same correlation number,
    falls into the call of a packed operator.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in spans if event.get("cat") in device]
    launches = [event for event in spans if event.get("cat") in _RUNTIME and "Launch" in event["name"]]
    calls = [event for event in spans if event.get("cat") == "cpu_op" and event["name"].startswith("attnpack::")]
    inside = {launch["args"]["correlation"] for launch in launches if any(_within(launch, call) for call in calls)}
    ours = [
        kernel
        for kernel in kernels
        if kernel["name"].startswith(tuple(packed)) or kernel.get("args", {}).get("correlation") in inside
    ]
    return {
        "busy_seconds": _covered(kernels) / 1e6 / steps,
        "kernels": len(kernels) / steps,
        "launches": len(launches) / steps,
        "matrix_products": sum(bool(_PRODUCT.search(event["name"])) for event in kernels) / steps,
        "packed_kernels": _per_step(ours, steps),
        "most_frequent": _per_step(kernels, steps),
    }


def _per_step(kernels: Sequence[Mapping[str, Any]], steps: int) -> dict[str, float]:
    """How often each kernel runs, the most frequent ones."""
    counts = Counter(kernel["name"][:120] for kernel in kernels)
    return {name: count / steps for name, count in counts.most_common(12)}


def _names() -> tuple[str, ...]:
    """Of the packed cache's own kernels."""
    if importlib.util.find_spec("triton") is None:
        return ()
    from attnpack_fx.kernels.triton import KERNELS

    return tuple(kernel.__name__ for kernel in KERNELS)


def _within(inner: Mapping[str, Any], outer: Mapping[str, Any]) -> bool:
    return inner["tid"] == outer["tid"] and outer["ts"] <= inner["ts"] < outer["ts"] + outer["dur"]


def _covered(events: Sequence[Mapping[str, Any]]) -> float:
    """Microseconds in which at least one of the events runs."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _packed_kernels(case: Result) -> float:
    """Kernels of packed operators, per layer and step."""
    return sum(case["packed_kernels"].values()) / case["layers"]


def table(results: Mapping[str, Result]) -> list[str]:
    header = ("decode step", "wall ms", "device busy ms", "busy", "launches", "kernels", "a layer", "packed, a layer")
    rows = [
        (
            name,
            f"{case['wall_seconds'] * 1e3:.2f}",
            f"{case['busy_seconds'] * 1e3:.2f}",
            f"{case['busy_share']:.0%}",
            f"{case['launches']:.0f}",
            f"{case['kernels']:.0f}",
            f"{case['kernels'] / case['layers']:.1f}",
            f"{_packed_kernels(case):.1f}" if case["packed_kernels"] else "-",
        )
        for name, case in measured(results).items()
    ]
    return [*markdown(header, rows), "", *left_out(results)]


def verdict(results: Mapping[str, Result]) -> list[str]:
    lines = []
    for name, case in measured(results).items():
        if case["packed_kernels"]:
            count = _packed_kernels(case)
            held = "holds" if count <= TARGET else "does not hold"
            lines.append(f"At most {TARGET} kernels of packed operators a layer: {held} ({count:.1f}, {name}).")
    return lines


PART = Part(
    "profile",
    "One decode step at batch 1",
    "Wall time of a step, untraced; then, from a profiler's trace of a few steps, the time in which the device runs "
    "any kernel, and what is launched. Where *busy* is far below 100 %, the host cannot launch fast enough. *a layer* "
    "is all kernels over the number of layers, projections (seven matrix products) included; *packed, a layer* those "
    "of the packed cache's operators. The JSON names the most frequent kernels.",
    cases,
    table,
    verdict,
)
