"""Batches of held-out questions with all that is the same for every policy: the dense cache and the dense answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnpack_fx import hf
from attnpack_fx.demo import digits
from attnpack_fx.demo.load import Loaded, batch_inputs

_QUESTION = "question"


@dataclass(frozen=True)
class Setting:
    """What is asked. late: the question is read from the packed cache; otherwise it is part of the prefill."""

    task: str = "read"
    images: int = 4
    late: bool = False

    @property
    def name(self) -> str:
        return f"{self.task}, {self.images} images" + (", asked late" if self.late else "")


@dataclass(frozen=True)
class Layer:
    """One layer of the dense cache after prefill, each `[B, H, T, D]`; plain: keys before rotary embedding."""

    key: Tensor
    plain: Tensor
    value: Tensor


@dataclass(frozen=True)
class Batch:
    """Questions of one setting, prefilled.

    layers, cos, sin (`[1, T, D]`): of the prompt. vision: bool `[B, T]`. start: int64 `[B, k]`, what decoding begins
    with: the question, or the first answer token, which the exact prefill gives. answers: int64 `[B, A]`, the right
    tokens. tokens: int64 `[B, A]`, those the dense model gives. logits: fp32 `[B, n, V]`, the dense model's, of the n
    answer tokens that are read from the cache. dense_bytes: of the whole dense cache at the end.
    """

    layers: list[Layer]
    cos: Tensor
    sin: Tensor
    vision: Tensor
    start: Tensor
    answers: Tensor
    tokens: Tensor
    logits: Tensor
    dense_bytes: int

    @property
    def from_cache(self) -> int:
        """How many tokens of every answer are generated from the cache: the last ones."""
        return self.logits.shape[1]

    @property
    def dense_vision_bytes(self) -> int:
        layer = self.layers[0]
        per_token = sum(each.shape[1] * each.shape[3] * each.element_size() for each in (layer.key, layer.value))
        return int(self.vision.sum()) * per_token * len(self.layers)


@torch.no_grad()
def batches(loaded: Loaded, setting: Setting, count: int, size: int, seed: int) -> list[Batch]:
    """`count` held-out questions, `size` in a batch, which must divide it."""
    if count % size:
        raise ValueError(f"questions: got {count}, expected a multiple of the batch of {size}")
    asked = digits.held_out_questions(setting.task, setting.images, count, seed)
    return [_batch(loaded, setting, asked[start : start + size]) for start in range(0, count, size)]


def _batch(loaded: Loaded, setting: Setting, questions: list[digits.Question]) -> Batch:
    inputs = batch_inputs(loaded, [each.prompt for each in questions], [each.images for each in questions])
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = inputs["input_ids"]
    # No prompt is padded: questions of one task and number of images are equally long.
    inputs.pop("attention_mask", None)
    words = tokenizer([each.answer for each in questions], add_special_tokens=False, return_tensors="pt")
    answers = words["input_ids"].to(ids.device)
    question = ids[:, :0]
    if setting.late:
        place = int((ids[0] == tokenizer.convert_tokens_to_ids(_QUESTION)).nonzero()[0])
        question, inputs["input_ids"] = ids[:, place:], ids[:, :place]
    cache = hf.empty_cache(model)
    with _observed(model) as seen:
        first = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    layers = [
        Layer(key, plain, value) for (key, value), plain in zip(hf.keys_and_values(cache), seen.plain_keys, strict=True)
    ]
    start = question if setting.late else first
    steps = answers.shape[1] - (0 if setting.late else 1)
    logits = follow(model, cache, start, steps, None)
    tokens = logits.argmax(-1)
    return Batch(
        layers,
        *seen.angles,
        hf.image_positions(model, inputs["input_ids"]),
        start,
        answers,
        tokens if setting.late else torch.cat([first, tokens], 1),
        logits,
        sum(each.nbytes for pair in hf.keys_and_values(cache) for each in pair),
    )


@torch.no_grad()
def follow(model: Any, cache: Any, start: Tensor, steps: int, forced: Tensor | None) -> Tensor:
    """Logits, fp32 `[B, steps, V]`, of a greedy answer that begins after `start`.

    forced: int64 `[B, steps]`, to be fed in place of the model's own tokens.
    """
    found, column = [], start
    for step in range(steps):
        logits = model(input_ids=column, past_key_values=cache, use_cache=True).logits[:, -1:]
        found.append(logits.float())
        column = logits.argmax(-1) if forced is None else forced[:, step : step + 1]
    return torch.cat(found, 1)


@dataclass
class _Seen:
    plain_keys: list[Tensor]
    angles: tuple[Tensor, Tensor]


@contextmanager
def _observed(model: Any) -> Iterator[_Seen]:
    """Keys before rotary embedding and its cos and sin, as the decoder computes them."""
    seen = _Seen([], (torch.empty(0), torch.empty(0)))
    decoder = model.model.language_model

    def note_key(attention: Any) -> Any:
        def note(module: Any, arguments: Any, result: Tensor) -> None:
            seen.plain_keys.append(result.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2).contiguous())

        return note

    def note_angles(module: Any, arguments: Any, result: tuple[Tensor, Tensor]) -> None:
        seen.angles = result

    hooks = [decoder.rotary_emb.register_forward_hook(note_angles)]
    for layer in decoder.layers:
        hooks.append(layer.self_attn.k_proj.register_forward_hook(note_key(layer.self_attn)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
