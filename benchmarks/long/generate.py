"""One contender through one long generation, its cache watched."""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from attnpack_cli.models import trained_model
from attnpack_fx import cache_bytes, hf
from attnpack_fx.demo import digits
from attnpack_fx.demo.load import batch_inputs, load
from attnpack_fx.taking_back import settle
from benchmarks import allocator, measure
from benchmarks.graphs import compiled, op_by_op
from benchmarks.long.contenders import CONTENDERS

_DTYPE = "bfloat16"
_TASK = "read"
_SEED = 2
#: Steps at the end over which the peak of resident memory is taken.
_WATCHED = 4


@dataclass(frozen=True)
class Length:
    """images: of a prompt, each 64 vision tokens. prompts: in the batch. tokens: generated. every: bytes are counted
    after so many.
    """

    images: int = 16
    prompts: int = 4
    tokens: int = 512
    every: int = 16


@torch.no_grad()
def run(name: str, length: Length) -> dict[str, Any]:
    """`steps`, tokens generated so far, from 0, and `bytes` held then; `peak_bytes`, resident beyond the model.

    peak_bytes is of the last steps, with what they hold besides the cache.
    """
    allocator.give_back()
    contender = CONTENDERS[name]
    loaded = load(str(trained_model()), _DTYPE)
    asked = digits.held_out_questions(_TASK, length.images, length.prompts, _SEED)
    inputs = batch_inputs(loaded, [each.prompt for each in asked], [each.images for each in asked])
    inputs.pop("attention_mask", None)  # No prompt is padded: all are equally long.
    words = loaded.tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)])
    generator = torch.Generator().manual_seed(_SEED)
    given = torch.tensor(words)[torch.randint(10, (length.prompts, length.tokens), generator=generator)]
    cache = contender.cache(loaded.model)
    with nullcontext() if contender.policy is None else op_by_op():
        model = loaded.model if contender.policy is None else compiled(loaded.model, contender.policy)
        model(**inputs, **hf.cache_argument(cache), use_cache=True)
        settle(chain.from_iterable(hf.keys_and_values(cache)))
        steps, held = [0], [cache_bytes(cache)]
        for step in range(length.tokens):
            if step == length.tokens - _WATCHED:
                measure.tidy()
                measure.forget_peak()
            model(input_ids=given[:, step : step + 1], **hf.cache_argument(cache), use_cache=True)
            if (step + 1) % length.every == 0:
                steps.append(step + 1)
                held.append(cache_bytes(cache))
        peak = measure.resident(peak=True)
        cache = None
        measure.tidy()
        rest = measure.resident()  # before the graphs go too
    return {"steps": steps, "bytes": held, "peak_bytes": peak - rest}
