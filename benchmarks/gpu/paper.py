"""The case AttentionPack starts from: LLaVA-1.5-13B, 16 images, batch 64, whose dense cache no single GPU holds.

The prompts are read a few at a time, and their packed caches joined along the batch. The dense cache is filled with
random numbers: what a decode step does is the same.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from attnpack_fx import cache_bytes
from benchmarks.gpu import decoders, layers
from benchmarks.gpu.decoders import DTYPE, OURS, STATIC, Contender, Decoder, Prompt
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.part import Failure, Part, Result, Run, attempt, left_out, markdown, measured, within_memory

BATCH, DRY_BATCH = 64, 4
#: Prompts read at once: their dense keys and values of one layer, and their activations, are all that is ever dense.
PREFILL_BATCH, DRY_PREFILL_BATCH = 8, 2
#: Of the memory that weights leave free, how much a dense cache may take: the rest is for activations. A dry run
#: pretends that `_DRY_DENSE` samples fit.
_SHARE, _DRY_DENSE = 0.85, 2


def cases(run: Run) -> Mapping[str, Callable[[], Result]]:
    return {OURS: partial(measure_ours, run), STATIC: partial(measure_dense, run)}


def _problem(machine: Machine) -> tuple[Decoder, Prompt, int]:
    if machine.dry:
        return decoders.DRY_DECODERS[0], decoders.DRY_PROMPTS[-1], DRY_BATCH
    return decoders.DECODERS[1], decoders.PROMPTS[-1], BATCH


@torch.no_grad()
def measure_ours(run: Run) -> Result:
    """Read 64 prompts in parts, then decode them together."""
    decoder, prompt, batch = _problem(run.machine)
    with decoders.alone(run.machine):
        outcome = within_memory(partial(_ours, run.machine, decoder, prompt, batch))
    return _labelled(outcome, decoder, prompt, batch)


@torch.no_grad()
def measure_dense(run: Run) -> Result:
    """Decode with as many samples as fit beside the weights."""
    machine = run.machine
    decoder, prompt, wanted = _problem(machine)
    with decoders.alone(machine):
        model = decoders.build(decoder, machine.device)
        sample = decoder.token_bytes * (prompt.tokens + decoders.new_tokens(machine))
        room = int(_SHARE * (machine.total_bytes - decoders.weight_bytes(model)))
        batch = min(wanted, _DRY_DENSE if machine.dry else room // sample)
        if batch < 1:
            return {"skipped": f"one sample's dense cache takes {sample / 1e9:.1f} GB, {room / 1e9:.1f} GB are free"}
        outcome = attempt(partial(_dense, machine, model, prompt, batch))
    return _labelled(outcome, decoder, prompt, batch)


def _labelled(outcome: Result | Failure, decoder: Decoder, prompt: Prompt, batch: int) -> Result:
    labels = {
        "model": decoder.name,
        "prompt": prompt.name,
        "batch": batch,
        "dense_cache_bytes": batch * prompt.tokens * decoder.token_bytes,
    }
    return {**labels, **({"skipped": outcome.reason} if isinstance(outcome, Failure) else outcome)}


def _ours(machine: Machine, decoder: Decoder, prompt: Prompt, batch: int) -> Result:
    model = decoders.build(decoder, machine.device)
    new = decoders.new_tokens(machine) + 1
    contender = decoders.contenders(model, decoder, prompt, new, machine.dry)[OURS]()
    ids = decoders.random_ids(model, batch, prompt.tokens + new, machine)
    prompts, ids = ids.split([prompt.tokens, new], dim=1)
    part = DRY_PREFILL_BATCH if machine.dry else PREFILL_BATCH
    seconds = machine.clock.seconds(partial(_prefill, contender, prompts, part))
    result = _decode(machine, contender, ids[:, :-1])
    return {**result, "prefill_seconds": seconds, "error": decoders.packed_error(model, contender, ids[:, -1:])}


def _prefill(contender: Contender, prompts: Tensor, batch: int) -> None:
    """Read prompts `[B, T]`, `batch` at a time, into one packed cache."""
    parts = []
    for ids in prompts.split(batch):
        contender.prefill(ids)
        assert contender.cache is not None
        parts.append([(layer.keys, layer.values) for layer in contender.cache.layers])
    contender.cache = contender.new_cache()
    for number in range(len(parts[0])):
        keys, values = zip(*(part[number] for part in parts), strict=True)
        contender.cache.update(torch.cat(keys), torch.cat(values), number)
        for part in parts:
            part[number] = ()  # joining may hold one layer twice, not all


def _dense(machine: Machine, model: PreTrainedModel, prompt: Prompt, batch: int) -> Result:
    decoder = _problem(machine)[0]
    new = decoders.new_tokens(machine)
    contender = decoders.contenders(model, decoder, prompt, new, machine.dry)[STATIC]()
    contender.cache = StaticCache(config=model.config, max_cache_len=prompt.tokens + new)
    for number in range(decoder.layers):
        contender.cache.update(*_keys_and_values(machine, decoder, prompt, batch, number), number)
    return _decode(machine, contender, decoders.random_ids(model, batch, new, machine))


def _keys_and_values(
    machine: Machine, decoder: Decoder, prompt: Prompt, batch: int, layer: int
) -> tuple[Tensor, Tensor]:
    """One layer's dense cache, of half the rank it is packed at."""
    random = torch.Generator(machine.device).manual_seed(layer)
    shape = batch, decoder.layout.kv_heads, prompt.tokens, decoder.layout.head_dim
    key, value = (layers.low_rank(*shape, decoders.rank(decoder) // 2, DTYPE, random) for _ in range(2))
    return key, value


def _decode(machine: Machine, contender: Contender, ids: Tensor) -> Result:
    machine.reset_peak()
    timed = decoders.time_decode(machine, contender, ids)
    return {**timed, "decode_peak_bytes": machine.peak_bytes(), "cache_bytes": cache_bytes(contender.cache)}


def table(results: Mapping[str, Result]) -> list[str]:
    header = ("cache", "batch", "dense cache GB", "cache GB", "peak while decoding GB", "ms/step", "tokens/s")
    rows = [
        (
            name,
            f"{case['batch']}",
            f"{case['dense_cache_bytes'] / 1e9:.1f}",
            f"{case['cache_bytes'] / 1e9:.2f}",
            f"{case['decode_peak_bytes'] / 1e9:.1f}",
            f"{case['seconds_per_step']['median'] * 1e3:.1f}",
            f"{case['tokens_per_second']:.0f}",
        )
        for name, case in measured(results).items()
    ]
    return [*markdown(header, rows), "", *left_out(results)]


def verdict(results: Mapping[str, Result]) -> list[str]:
    held = measured(results)
    lines = decoders.disturbances(held)
    if OURS not in held:
        return lines
    ours = held[OURS]
    lines.append(
        f"Batch {ours['batch']} decodes on this GPU: {ours['cache_bytes'] / 1e9:.1f} GB of cache in place of "
        f"{ours['dense_cache_bytes'] / 1e9:.0f}."
    )
    if STATIC in held:
        ratio = ours["tokens_per_second"] / held[STATIC]["tokens_per_second"]
        lines.append(f"That is {ratio:.2f} times the tokens per second of the largest dense batch that fits.")
    return lines


PART = Part(
    "paper",
    "A cache no GPU holds",
    "LLaVA-1.5-13B's shape, 16 images of 256 tokens and 50 text tokens a prompt, batch 64, vision rank 64: the packed "
    "cache against `StaticCache` at the largest batch whose cache fits. Prompts are read "
    f"{PREFILL_BATCH} at a time, and their packed caches joined along the batch. The dense cache holds random numbers.",
    cases,
    table,
    verdict,
)
