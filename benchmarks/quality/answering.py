"""Answering the questions of a batch of contexts with a model, dense or compiled with a policy."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import attnpack_fx
from attnpack_fx import hf
from attnpack_fx.cache_bytes import cache_bytes
from attnpack_fx.taking_back import settle
from benchmarks.quality.contexts import FIRST, LATER, LONG, Contexts

#: Tokens of the long reference that are fed at once; methods act between two such steps.
CHUNK = 32

Step = Callable[..., Any]


@dataclass(frozen=True)
class Answers:
    """What one model says of a batch.

    tokens: by task, int64 `[B, n]`: the greedy answer, from the first token that the cache has a part in: all but the
        first of the first question's, which the exact prefill gives.
    logits: by task, fp32 `[B, n, V]`: of the same places, fed the dense model's answer, or the right long one.
    opening: int64 `[B, 1]`, the token the prefill gives.
    prompt_bytes: of the cache after the prompt. long_bytes: after the long reference.
    """

    tokens: dict[str, Tensor]
    logits: dict[str, Tensor]
    opening: Tensor
    prompt_bytes: int
    long_bytes: int


@torch.no_grad()
def answers(model: Any, step: Step, batch: Contexts, dense: Answers | None = None) -> Answers:
    """All turns of a batch. step: the model or its compiled form. dense: the dense model's, None where this is it."""
    cache = hf.empty_cache(model)
    opening = prefilled(step, batch, cache).argmax(-1)
    settle(chain.from_iterable(hf.keys_and_values(cache)))
    prompt_bytes = cache_bytes(cache)
    tokens: dict[str, Tensor] = {}
    logits: dict[str, Tensor] = {}

    def turn(task: str, past: Any, start: Tensor, forced: Tensor, count: int) -> Any:
        """Answer a question twice from `past`, which stays as it is; the cache fed the dense answer is returned."""
        held = _fork(past)
        reference = None if dense is None else dense.tokens[task]
        logits[task] = _follow(step, batch, held, forced, count, reference)
        tokens[task] = logits[task].argmax(-1)
        # Fed its own tokens it says the same, unless one of them differed.
        if reference is not None and not (torch.equal(tokens[task], reference) and torch.equal(start, forced)):
            tokens[task] = _follow(step, batch, _fork(past), start, count, None).argmax(-1)
        return held

    given = opening if dense is None else dense.opening
    first = batch.turns[FIRST]
    after = turn(FIRST, cache, opening, given, first.answer.shape[1] - 1)
    # What follows is asked after the dense model's answer in every cache, so that all are asked the same.
    last = (tokens if dense is None else dense.tokens)[FIRST][:, -1:]
    for task in LATER:
        question = torch.cat([last, batch.turns[task].question], 1)
        turn(task, after, question, question, batch.turns[task].answer.shape[1])
    reference = batch.turns[LONG].answer
    held = _fork(after)
    given = torch.cat([last, batch.turns[LONG].question], 1)
    parts = [_step(step, batch, held, given)[:, -1:]]
    for chunk in reference[:, :-1].split(CHUNK, 1):
        parts.append(_step(step, batch, held, chunk))
    logits[LONG] = torch.cat(parts, 1)
    tokens[LONG] = logits[LONG].argmax(-1)
    return Answers(tokens, logits, opening, prompt_bytes, cache_bytes(held))


@torch.no_grad()
def prefilled(step: Step, batch: Contexts, cache: Any) -> Tensor:
    """The logits after the prompt, `[B, 1, V]`, which goes into the cache."""
    with attnpack_fx.modality(batch.vision):
        return step(**batch.inputs, **hf.cache_argument(cache), use_cache=True, logits_to_keep=1).logits


def _follow(step: Step, batch: Contexts, cache: Any, start: Tensor, count: int, forced: Tensor | None) -> Tensor:
    """Logits, fp32 `[B, count, V]`, of an answer that begins after `start`; forced: fed in place of its own tokens."""
    found, given = [], start
    for number in range(count):
        found.append(_step(step, batch, cache, given)[:, -1:])
        given = found[-1].argmax(-1) if forced is None else forced[:, number : number + 1]
    return torch.cat(found, 1)


def _step(step: Step, batch: Contexts, cache: Any, ids: Tensor) -> Tensor:
    placed = {}
    if batch.after is not None:
        start = hf.keys_and_values(cache)[0][0].shape[2] + batch.after
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        placed["position_ids"] = positions.repeat(3, ids.shape[0], 1)
    ids = ids.clone()  # Of a slice the strides are, which differ, and each takes a graph.
    if ids.shape[1] > 1:  # Questions and chunks are of many lengths: one graph for all of them.
        for each in (ids, *placed.values()):
            torch._dynamo.mark_dynamic(each, each.dim() - 1)
    return step(input_ids=ids, **hf.cache_argument(cache), use_cache=True, **placed).logits.float()


def _fork(cache: Any) -> Any:
    """A cache that holds the same tensors and grows on its own."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork
