"""Timed generation: one prompt or batch, through the model as it is, through Inductor, or through attnpack."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import attnpack_fx
from attnpack_fx import hf
from attnpack_fx.cache_bytes import cache_bytes
from attnpack_fx.demo.load import Loaded
from attnpack_fx.policy import PackPolicy

DENSE, INDUCTOR, PACKED = "dense, eager", "dense, Inductor", "packed, attnpack"
_ATTEMPTS = 6


@dataclass(frozen=True)
class Run:
    """One call of `generate`, greedy.

    tokens: int64 `[B, new tokens]` on the CPU. prefill: seconds until the first token. steps: seconds of every later token.
    held: bytes of the cache after the prefill and after every step.
    """

    tokens: torch.Tensor
    prefill: float
    steps: list[float]
    held: list[int]

    @property
    def cache_bytes(self) -> int:
        """At the end of the answer."""
        return self.held[-1]

    @property
    def tokens_per_second(self) -> float:
        """Of the whole batch, prefill not counted; 0 for an answer of one token."""
        return len(self.steps) * self.tokens.shape[0] / sum(self.steps) if self.steps else 0.0


class _Watch:
    """A streamer that notes when each token comes and what the cache holds then; the noting itself is not timed."""

    def __init__(self, cache: object) -> None:
        self._cache = cache
        self._left: float | None = None
        self.seconds: list[float] = []
        self.held: list[int] = []

    def put(self, _: torch.Tensor) -> None:
        if self._left is not None:
            self.seconds.append(time.perf_counter() - self._left)
            self.held.append(cache_bytes(self._cache))
        self._left = time.perf_counter()

    def end(self) -> None:
        pass


@contextmanager
def compiled(model: Any, variant: str, policy: PackPolicy) -> Iterator[None]:
    """Let `model` run as `variant` (`DENSE`, `INDUCTOR` or `PACKED`), and leave it eager."""
    torch._dynamo.reset()
    if variant == INDUCTOR:
        model.compile()
    elif variant == PACKED:
        attnpack_fx.compile(model, policy=policy)
    # A check of transformers that counts image tokens would break every prefill into several graphs; the eager run has made it.
    with _environment("TRANSFORMERS_DISABLE_TORCH_CHECK", None if variant == DENSE else "1"):
        try:
            yield
        finally:
            model._compiled_call_impl = None


def timed(loaded: Loaded, inputs: dict[str, Any], tokens: int, exactly: bool = False) -> Run:
    """Generate up to (or `exactly`) `tokens` tokens, and again as long as something was compiled meanwhile: that is not timed."""
    for _ in range(_ATTEMPTS):
        before = _graphs()
        run = _generate(loaded, inputs, tokens, exactly)
        if _graphs() == before:
            return run
    return run


def warmed(loaded: Loaded, inputs: dict[str, Any], tokens: int, advance: Callable[[], object]) -> Run:
    """Like `timed`, after one run that does not count; calls `advance` after it."""
    _generate(loaded, inputs, tokens, False)
    advance()
    return timed(loaded, inputs, tokens)


def decode(loaded: Loaded, run: Run) -> list[str]:
    """The texts of a run, special tokens left out."""
    return [text.strip() for text in loaded.tokenizer.batch_decode(run.tokens, skip_special_tokens=True)]


def _generate(loaded: Loaded, inputs: dict[str, Any], tokens: int, exactly: bool) -> Run:
    cache = hf.empty_cache(loaded.model)
    watch = _Watch(cache)
    with torch.no_grad():
        found = loaded.model.generate(
            **inputs,
            past_key_values=cache,
            streamer=watch,
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            min_new_tokens=tokens if exactly else None,
        )
    new = found[:, inputs["input_ids"].shape[1] :].cpu()
    return Run(new, watch.seconds[0], watch.seconds[1:], watch.held)


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
