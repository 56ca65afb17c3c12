"""What packing costs: compress and fold, against `torch.svd_lowrank` and against the prefill of the layer."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.gpu import decoders, layers
from benchmarks.gpu.decoders import DTYPE, RANK, Decoder
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.part import (
    Failure,
    Part,
    Result,
    Run,
    WrongResultError,
    left_out,
    markdown,
    measured,
    within_memory,
)
from benchmarks.gpu.timing import Contender, compare

BATCHES, TOKENS = (1, 8), (576, 4096)
#: Dense rows one fold takes in.
FOLDED = 64
#: Most a layer's compression may take of its prefill.
TARGET = 0.03
#: Ours may not be further from the input than this times `svd_lowrank`, beside rounding to bf16.
_NO_WORSE, _ROUNDING = 1.01, 8e-3
_NOISE = 0.1


def cases(run: Run) -> Mapping[str, Callable[[], Result]]:
    if run.machine.dry:
        return {"tiny B=2 T=64": partial(measure_case, run, decoders.DRY_DECODERS[0], 2, 64)}
    return {
        f"{decoder.name} B={batch} T={tokens}": partial(measure_case, run, decoder, batch, tokens)
        for tokens, batch, decoder in product(TOKENS, BATCHES, decoders.DECODERS)
    }


@torch.no_grad()
def measure_case(run: Run, decoder: Decoder, batch: int, tokens: int) -> Result:
    """Seconds for keys and values of one layer together. Raises WrongResultError when ours is less accurate."""
    outcome = within_memory(partial(_measure, run.machine, decoder, batch, tokens))
    return {"skipped": outcome.reason} if isinstance(outcome, Failure) else outcome


def _measure(machine: Machine, decoder: Decoder, batch: int, tokens: int) -> Result:
    random = torch.Generator(machine.device).manual_seed(0)
    layout = decoder.layout
    rank = RANK // 8 if machine.dry else RANK
    shape = batch, layout.kv_heads, tokens, layout.head_dim
    dense = [_realistic(shape, rank, random) for _ in range(2)]
    index = torch.arange(tokens, device=machine.device).expand(batch, -1).contiguous()
    rows = [torch.randn((FOLDED, batch, *shape[1::2]), generator=random, device=machine.device).to(DTYPE) for _ in "kv"]

    def compress() -> list[tuple[Tensor, Tensor]]:
        return [torch.ops.attnpack.compress(x, index, rank) for x in dense]

    def lowrank() -> list[tuple[Tensor, Tensor, Tensor]]:
        return [torch.svd_lowrank(_matrix(x), q=rank, niter=2) for x in dense]

    factors = compress()

    def fold() -> None:
        for (coefficient, basis), new in zip(factors, rows, strict=True):
            torch.ops.attnpack.fold(coefficient, basis, new, rank)

    def fold_lowrank() -> None:
        """What stands in for `fold` without it: rebuild, and factor again."""
        for (coefficient, basis), new in zip(factors, rows, strict=True):
            stacked = torch.cat([coefficient @ _flat(basis), new.transpose(0, 1).flatten(2)], 1)
            torch.svd_lowrank(stacked.float(), q=rank, niter=2)

    errors = [
        _error(x, coefficient.float() @ _flat(basis).float())
        for x, (coefficient, basis) in zip(dense, factors, strict=True)
    ]
    peers = [
        _error(x, (left * singular[:, None]) @ right.mT)
        for x, (left, singular, right) in zip(dense, lowrank(), strict=True)
    ]
    for ours, peer in zip(errors, peers, strict=True):
        if not ours <= _NO_WORSE * peer + _ROUNDING:
            raise WrongResultError(f"compress has an error of {ours:.2e}, torch.svd_lowrank of {peer:.2e}")
    contenders = {
        "compress": compress,
        "svd_lowrank": lowrank,
        "fold": fold,
        "rebuild and svd_lowrank": fold_lowrank,
        "prefill": _layer_prefill(machine, decoder, batch, tokens),
    }
    # Eager alone: that is how prefill runs, and svd_lowrank waits for the device.
    times = compare(machine.clock, {name: Contender([call]) for name, call in contenders.items()}, graphs=False)
    return {
        "model": decoder.name,
        "batch": batch,
        "tokens": tokens,
        "rank": rank,
        "seconds": {name: result["eager"] for name, result in times.items()},
        "error": {"compress": errors, "svd_lowrank": peers},
        "share_of_prefill": times["compress"]["seconds"] / times["prefill"]["seconds"],
    }


def _realistic(shape: tuple[int, int, int, int], rank: int, random: torch.Generator) -> Tensor:
    """Twice the columns that are kept, and noise: something is cut off, as in a model."""
    noise = torch.randn(shape, generator=random, device=random.device, dtype=DTYPE)
    return layers.low_rank(*shape, 2 * rank, DTYPE, random).add_(noise, alpha=_NOISE)


def _matrix(x: Tensor) -> Tensor:
    """`[B, H, T, D]` as fp32 `[B, T, H * D]`."""
    return x.transpose(1, 2).flatten(2).float()


def _flat(basis: Tensor) -> Tensor:
    """`[B, H, R, D]` as `[B, R, H * D]`."""
    return basis.transpose(1, 2).flatten(2)


def _error(x: Tensor, approximation: Tensor) -> float:
    matrix = _matrix(x)
    return float(torch.linalg.vector_norm(approximation - matrix) / torch.linalg.vector_norm(matrix))


def _layer_prefill(machine: Machine, decoder: Decoder, batch: int, tokens: int) -> Callable[[], object]:
    """One decoder layer of the model reads the prompt into a cache, uncompiled."""
    model = decoders.build(replace(decoder, layers=1), machine.device)
    embedded = torch.randn((batch, tokens, decoder.hidden), device=machine.device, dtype=DTYPE)

    def prefill() -> object:
        cache = DynamicCache(config=model.config)
        return model.model(inputs_embeds=embedded, past_key_values=cache, use_cache=True)

    return prefill


def table(results: Mapping[str, Result]) -> list[str]:
    header = ("layer", "compress", "svd_lowrank", "its prefill", "share", "fold", "rebuild and svd_lowrank", "error")
    rows = []
    for name, case in measured(results).items():
        seconds = {label: f"{spent['median'] * 1e3:.2f} ms" for label, spent in case["seconds"].items()}
        error = case["error"]
        rows.append(
            (
                name,
                seconds["compress"],
                seconds["svd_lowrank"],
                seconds["prefill"],
                f"{case['share_of_prefill']:.1%}",
                seconds["fold"],
                seconds["rebuild and svd_lowrank"],
                f"{max(error['compress']):.4f} / {max(error['svd_lowrank']):.4f}",
            )
        )
    return [*markdown(header, rows), "", *left_out(results)]


def verdict(results: Mapping[str, Result]) -> list[str]:
    shares = {name: case["share_of_prefill"] for name, case in measured(results).items()}
    if not shares:
        return []
    worst = max(shares, key=lambda name: shares[name])
    held = "holds" if shares[worst] <= TARGET else "does not hold"
    return [f"Compression takes at most {TARGET:.0%} of prefill: {held} (the most is {shares[worst]:.1%}, {worst})."]


PART = Part(
    "factorize",
    "Compress and fold",
    "Keys and values of one layer together, bf16, rank 64, on random matrices of twice that rank with noise. "
    "`torch.svd_lowrank` with two iterations is what AttentionPack's code runs. *its prefill* is one decoder layer of "
    "that model reading the prompt, uncompiled; every layer compresses once, so *share* is that of the whole model. "
    f"*fold* adds {FOLDED} dense rows to a packed segment. Errors are relative, ours and that of `svd_lowrank`.",
    cases,
    table,
    verdict,
)
