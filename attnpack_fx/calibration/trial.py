"""A policy tried on prompts: a dense prefill, its cache packed, and the dense model's own tokens fed one by one.

The packed cache is the one the compiled graphs make (same operators, same storage); it is read as the dense tensors it
stands for, so that no policy tried costs a compilation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnpack_fx import hf
from attnpack_fx.angles import SharedAngles
from attnpack_fx.calibration.capture import Angles, Observed
from attnpack_fx.compiling import called_through
from attnpack_fx.kernels import ops
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.packing import pack
from attnpack_fx.policy import PackPolicy
from attnpack_fx.tail import TailBuffer


@dataclass(frozen=True)
class Prompt:
    """What it takes to pack a layer's prompt: fields as in `Observed`."""

    real: Tensor | None
    vision: Tensor | None
    angles: Angles | None

    @classmethod
    def of(cls, layer: Observed) -> "Prompt":
        return cls(layer.real, layer.vision, layer.angles)


@dataclass(frozen=True)
class Answer:
    """One batch of prompts as the dense model answered it.

    inputs: as the model's processor gives them; prompts: by layer number. tokens: int64 `[B, n]`, generated; alive:
    bool `[B, n]`, whether the sample had not ended before that token; logits: `[B, n, V]` that chose them.
    """

    inputs: Mapping[str, Any]
    prompts: dict[int, Prompt]
    tokens: Tensor
    alive: Tensor
    logits: Tensor


class Forced:
    """A logits processor of transformers' `generate` that leaves no choice, and packs the cache behind the prefill."""

    def __init__(self, tokens: Tensor, cache: Any, prompts: dict[int, Prompt], policy: PackPolicy | None) -> None:
        self._tokens, self._cache, self._prompts, self._policy = tokens, cache, prompts, policy
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._step == 0 and self._policy is not None:
            packed_cache(self._cache, self._prompts, self._policy)
        chosen = self._tokens[:, self._step, None].to(scores.device)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def packed_cache(cache: Any, prompts: Mapping[int, Prompt], policy: PackPolicy) -> None:
    """Pack the layers of a cache that holds a prompt, in place, as the compiled prefill would."""
    layers = hf.self_attention_layers(cache)
    shared: dict[tuple[int, int], SharedAngles] = {}
    for number, prompt in prompts.items():
        layer = layers[number]
        layer.keys, layer.values = packed_layer(layer.keys, layer.values, prompt, policy, number, shared)


def packed_layer(
    key: Tensor,
    value: Tensor,
    prompt: Prompt,
    policy: PackPolicy,
    number: int,
    shared: dict[tuple[int, int], SharedAngles],
) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, H, P, D]` of one layer as the policy packs them; `shared`: angles that layers share."""
    widths = key.shape[1] * key.shape[3], value.shape[1] * value.shape[3]
    plan = policy.layer(number, policy.layer_count, *widths)
    if plan.text is None and (plan.vision is None or prompt.vision is None):
        return key, value
    rotary = prompt.angles if plan.key_space == "unrotated" else None
    source = key if rotary is None else rotary.unrotated(key)
    keys, values = pack(source, value, policy, modality=prompt.vision, real=prompt.real, layer=number)
    if rotary is None:
        return keys, values
    held, index, packed = keys.held, keys.held.placement.index, keys.held.packed
    if packed:
        known = id(rotary), packed
        if known not in shared:
            shared[known] = rotary.packed(index, packed)
        held = replace(held, angles=shared[known])
    tail = ops.take_rows(key, index[:, packed:], 0)
    return PackedTensor(held, TailBuffer(tail).lease(tail.shape[0])), values


def divergence(model: Any, answers: Sequence[Answer], policy: PackPolicy) -> float:
    """Mean Kullback-Leibler divergence, in nats, of next-token probabilities from the dense model's.

    Over all tokens that were chosen with a packed cache: all but the first of every answer.
    """
    total, count = 0.0, 0
    for answer in answers:
        found = forced_logits(model, answer, policy)
        alive = answer.alive[:, 1:]
        dense, packed = (each[:, 1:].float().log_softmax(-1) for each in (answer.logits, found))
        each = (dense.exp() * (dense - packed)).sum(-1)
        total += float(each[alive].double().sum())
        count += int(alive.sum())
    return total / count


def forced_logits(model: Any, answer: Answer, policy: PackPolicy | None) -> Tensor:
    """`[B, n, V]` of the answer's tokens fed one by one, with a cache packed behind the prefill (None: dense)."""
    cache = hf.empty_cache(model)
    forced = Forced(answer.tokens, cache, answer.prompts, policy)
    with called_through(model, None):
        more = hf.cache_argument(cache)
        out = generated(model, answer.inputs, answer.tokens.shape[1], **more, logits_processor=[forced])
    return torch.stack(out.logits, 1)


def generated(model: Any, inputs: Mapping[str, Any], tokens: int, **more: Any) -> Any:
    """What greedy `generate` returns after 2 to `tokens` tokens, logits included."""
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=2,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
            **more,
        )
