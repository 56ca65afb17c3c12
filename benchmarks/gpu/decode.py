"""End to end: a prompt is read and tokens are decoded, at equal batch and at the largest that fits into a memory."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product

import torch

from attnpack_fx import cache_bytes
from benchmarks.gpu import decoders
from benchmarks.gpu.decoders import CONTENDERS, EAGER, OURS, Decoder, Prompt
from benchmarks.gpu.part import (
    Failure,
    NotYetError,
    Part,
    Result,
    Run,
    attempt,
    left_out,
    markdown,
    measured,
    within_memory,
)

BATCHES, DRY_BATCHES = (1, 8, 32), (1, 2)
#: Of a given memory, how much an estimate may fill; when that is too much after all, it is tried once with `_LESS`.
_FILL, _LESS = 0.95, 0.85


def cases(run: Run) -> Mapping[str, Callable[[], Result]]:
    """Every contender on its own, at equal batch; then at the largest batch."""
    dry = run.machine.dry
    models = decoders.DRY_DECODERS if dry else decoders.DECODERS
    prompts = decoders.DRY_PROMPTS if dry else decoders.PROMPTS
    functions: dict[str, Callable[[], Result]] = {}
    for decoder, prompt in product(models, prompts):
        for batch, name in product(DRY_BATCHES if dry else BATCHES, CONTENDERS):
            if dry and batch > 1 and name != EAGER:
                continue  # It would be compiled once more.
            functions[_name(decoder, prompt, f"B={batch}", name)] = partial(
                measure_case, run, decoder, prompt, batch, name
            )
    # The longest prompt alone: there the cache decides what fits.
    for decoder, memory, name in product(models, run.memory_gb, (EAGER,) if dry else CONTENDERS):
        functions[_name(decoder, prompts[-1], f"largest in {memory:g} GB", name)] = partial(
            measure_largest, run, decoder, prompts[-1], memory, name
        )
    return functions


def _name(decoder: Decoder, prompt: Prompt, size: str, contender: str) -> str:
    return f"{decoder.name}, {prompt.name}, {size}: {contender}"


@torch.no_grad()
def measure_case(run: Run, decoder: Decoder, prompt: Prompt, batch: int, name: str, limit: int | None = None) -> Result:
    """Tokens per second, seconds of prefill, peak memory and cache bytes of one contender.

    limit: device memory allowed, in bytes; all of it unless given.
    """
    machine = run.machine
    guard = machine.limited(limit) if limit is not None else nullcontext()
    with guard, decoders.alone(machine):
        call = partial(_measure, run, decoder, prompt, batch, name)
        outcome = within_memory(call) if name == OURS else attempt(call)
    labels = {"model": decoder.name, "prompt": prompt.name, "batch": batch, "contender": name}
    return {**labels, **({"skipped": outcome.reason} if isinstance(outcome, Failure) else outcome)}


def _measure(run: Run, decoder: Decoder, prompt: Prompt, batch: int, name: str) -> Result:
    machine = run.machine
    model = decoders.build(decoder, machine.device)
    # One more for the comparison at the end.
    new = decoders.new_tokens(machine) + 1
    ids = decoders.random_ids(model, batch, prompt.tokens + new, machine)
    contender = decoders.contenders(model, decoder, prompt, new, machine.dry)[name]()
    prefill = partial(contender.prefill, ids[:, : prompt.tokens])
    prefill()
    prefills = [machine.clock.seconds(prefill) for _ in range(2)]
    prefill_peak = machine.peak_bytes()
    machine.reset_peak()
    timed = decoders.time_decode(machine, contender, ids[:, prompt.tokens : -1])
    result = {
        **timed,
        "prefill_seconds": min(prefills),
        "peak_bytes": max(prefill_peak, machine.peak_bytes()),
        "prefill_peak_bytes": prefill_peak,
        "decode_peak_bytes": machine.peak_bytes(),
        "cache_bytes": cache_bytes(contender.cache),
        "weight_bytes": decoders.weight_bytes(model),
    }
    if name == OURS:
        result["error"] = decoders.packed_error(model, contender, ids[:, -1:])
    return result


def measure_largest(run: Run, decoder: Decoder, prompt: Prompt, memory: float, name: str) -> Result:
    """The largest batch, estimated from what the equal batches took and confirmed by running it in that memory."""
    limit = int(memory * 1e9)
    if limit > run.machine.total_bytes:
        return {"skipped": f"{memory:g} GB are more than this device has"}
    batches = DRY_BATCHES if run.machine.dry else BATCHES
    found = {batch: run.done.get(_name(decoder, prompt, f"B={batch}", name)) for batch in batches}
    if any(result is None for result in found.values()):
        raise NotYetError("it is estimated from the equal batches, which are not all measured")
    ran = {batch: result for batch, result in found.items() if result is not None and "peak_bytes" in result}
    if len(ran) < 2:
        return {"skipped": "fewer than two equal batches ran, so that nothing can be estimated"}
    batch = largest_batch(limit, ran)
    tried: list[str] = []
    for candidate in (batch, int(batch * _LESS)):
        if candidate < 1:
            break
        result = measure_case(run, decoder, prompt, candidate, name, limit)
        if "skipped" not in result:
            return {**result, "memory_gb": memory, "tried": tried}
        tried.append(f"{candidate}: {result['skipped']}")
    return {"skipped": f"no batch was found for {memory:g} GB; " + ("; ".join(tried) or "not even one sample fits")}


def largest_batch(limit: int, ran: Mapping[int, Result]) -> int:
    """Samples that fit into `limit` bytes, from the peaks of smaller batches; a sample takes its cache at least."""
    (small, first), (large, last) = min(ran.items()), max(ran.items())
    sample = max((last["peak_bytes"] - first["peak_bytes"]) / (large - small), last["cache_bytes"] / large)
    fixed = max(first["peak_bytes"] - small * sample, first["weight_bytes"])
    return max(0, int((_FILL * limit - fixed) / sample))


def table(results: Mapping[str, Result]) -> list[str]:
    header = ("case", "tokens/s", "to the best dense", "ms/step", "prefill s", "peak GB", "cache MB", "error")
    held = measured(results)
    rows = []
    for name, case in held.items():
        group = name.rpartition(": ")[0]
        dense = [
            other["tokens_per_second"]
            for label, other in held.items()
            if label.rpartition(": ")[0] == group and other["contender"] != OURS
        ]
        size = f" (B={case['batch']})" if "memory_gb" in case else ""
        rows.append(
            (
                f"{group}{size}: {case['contender']}",
                f"{case['tokens_per_second']:.1f}",
                f"{case['tokens_per_second'] / max(dense):.2f}x" if case["contender"] == OURS and dense else "",
                f"{case['seconds_per_step']['median'] * 1e3:.2f}",
                f"{case['prefill_seconds']:.3f}",
                f"{case['peak_bytes'] / 1e9:.1f}",
                f"{case['cache_bytes'] / 1e6:.0f}",
                f"{case['error']:.0e}" if "error" in case else "",
            )
        )
    return [*markdown(header, rows), "", *left_out(results)]


def verdict(results: Mapping[str, Result]) -> list[str]:
    return decoders.disturbances(measured(results))


PART = Part(
    "decode",
    "End to end",
    "Decoders with the shapes of published vision-language models and random bf16 weights (a small vocabulary: the "
    "output layer is the same work for all) read a prompt and decode given tokens, the same for every contender, whose "
    "vision positions are stated. *1 image* is 576 vision and 50 text tokens, *16 images* 16 x 256 and 50. Vision "
    "tokens are packed at rank 64. Prefill of `attnpack` and of Inductor is compiled; that of `StaticCache` is not. "
    "Peak is that of tensors, prefill included. The logits of the packed cache are held against those of the "
    "uncompiled model on the same cache decompressed. The largest batch for a memory is estimated from the equal "
    "batches and confirmed by running it with no more memory than that.",
    cases,
    table,
    verdict,
)
