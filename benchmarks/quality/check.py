"""Packing outside the graph against the compiled prefill: the same bytes, and logits that differ by rounding."""

from typing import Any
from unittest import mock

import torch

from attnpack_fx import PackPolicy, hf
from attnpack_fx.cache_bytes import cache_bytes
from attnpack_fx.demo import digits
from attnpack_fx.demo.load import Loaded, batch_inputs
from benchmarks import measure
from benchmarks.quality.data import Setting, batches, follow
from benchmarks.quality.packing import Decoders, cache_of, compiled, packed

_QUESTIONS = 2


@torch.no_grad()
def check(loaded: Loaded, decoders: Decoders, setting: Setting, policy: PackPolicy, seed: int) -> dict[str, Any]:
    """Cache bytes after the prefill, and the largest difference of the next logits as a part of the largest.

    setting: one that is not late. Raises RuntimeError where the two ways disagree.
    """
    (batch,) = batches(loaded, setting, _QUESTIONS, _QUESTIONS, seed)
    asked = digits.held_out_questions(setting.task, setting.images, _QUESTIONS, seed)
    inputs = batch_inputs(loaded, [each.prompt for each in asked], [each.images for each in asked])
    model = compiled(loaded.model, policy)
    cache = hf.empty_cache(loaded.model)
    # A check of transformers reads a tensor's value, which would break the graph in two.
    with mock.patch.dict("os.environ", TRANSFORMERS_DISABLE_TORCH_CHECK="1"):
        model(**inputs, past_key_values=cache, use_cache=True)
    own = cache_of(loaded.model, batch, packed(batch, policy))
    held = cache_bytes(cache), cache_bytes(own)
    if held[0] != held[1]:
        raise RuntimeError(f"{policy}: {held[1]} bytes packed outside the graph, {held[0]} by the compiled prefill")
    decode, reference = decoders.of(policy), batch.tokens[:, -batch.from_cache :]
    logits = [follow(decode, each, batch.start, batch.from_cache, reference) for each in (cache, own)]
    difference = measure.difference(logits[1], logits[0])
    if not difference <= measure.TOLERANCE[loaded.model.dtype]:
        raise RuntimeError(f"{policy}: logits differ from those after the compiled prefill by {difference:.1e}")
    return {"policy": policy.to_dict(), "bytes": held[0], "difference": difference}
