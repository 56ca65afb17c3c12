"""Timed generation: through the model as it is, through plain Inductor, or through attnpack."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import attnpack_fx
from attnpack_fx import explain, hf
from attnpack_fx.cache_bytes import cache_bytes
from attnpack_fx.demo.load import Loaded
from attnpack_fx.demo.printed import Printed
from attnpack_fx.explain import Report
from attnpack_fx.policy import PackPolicy

DENSE, INDUCTOR, PACKED = "dense, eager", "dense, Inductor", "packed, attnpack"
log = logging.getLogger(__name__)

_ATTEMPTS = 6
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Run:
    """One call of `generate`, greedy.

    tokens: int64 `[B, new tokens]` on the CPU. prefill: seconds until the first token. steps: seconds of
    every later token.
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
    """A streamer that notes when each token comes and what the cache holds; noting and printing are not timed."""

    def __init__(self, cache: object, printed: Printed | None) -> None:
        self._cache, self._printed = cache, printed
        self._left: float | None = None
        self.seconds: list[float] = []
        self.held: list[int] = []

    def put(self, tokens: torch.Tensor) -> None:
        # The first are the prompt.
        if self._left is not None:
            self.seconds.append(time.perf_counter() - self._left)
            self.held.append(cache_bytes(self._cache))
            if self._printed is not None:
                self._printed(tokens)
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
    try:
        with nullcontext() if variant == DENSE else without_checks():
            yield
    finally:
        model._compiled_call_impl = None


def timed(
    loaded: Loaded, inputs: dict[str, Any], tokens: int, exactly: bool = False, printed: Printed | None = None
) -> Run:
    """Generate up to (or `exactly`) `tokens` tokens; repeated while anything is compiled during the run.

    printed: is given the tokens as they come.
    """
    for _ in range(_ATTEMPTS):
        before = _graphs()
        if printed is not None:
            printed.begins()
        run = _generate(loaded, inputs, tokens, exactly, printed)
        if _graphs() == before:
            return run
    log.warning("every one of %d runs compiled something: the times of the last one hold that too", _ATTEMPTS)
    return run


def warm_up(loaded: Loaded, inputs: dict[str, Any]) -> None:
    """Compile, and do what happens only once, in a run of a few tokens that is not timed."""
    _generate(loaded, inputs, _WARM_UP_TOKENS, exactly=True)


def explained(loaded: Loaded, inputs: dict[str, Any], policy: PackPolicy) -> Report:
    """`attnpack_fx.explain` on these inputs."""
    with without_checks():
        return explain(loaded.model, policy=policy, **inputs)


def texts(loaded: Loaded, run: Run) -> list[str]:
    """The texts of a run, special tokens left out."""
    return [text.strip() for text in loaded.tokenizer.batch_decode(run.tokens, skip_special_tokens=True)]


def _generate(
    loaded: Loaded, inputs: dict[str, Any], tokens: int, exactly: bool, printed: Printed | None = None
) -> Run:
    cache = hf.empty_cache(loaded.model)
    watch = _Watch(cache, printed)
    with torch.no_grad():
        found = loaded.model.generate(
            **inputs,
            **hf.cache_argument(cache),
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
def without_checks() -> Iterator[None]:
    """Leave out transformers' checks that read a tensor's value: each would break the graph in two."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
