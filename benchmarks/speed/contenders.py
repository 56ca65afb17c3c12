"""The ways to hold a cache: for each the model that decodes from it, and how its cache of a batch is made."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache, StaticCache

import attnpack_fx
from attnpack_fx import PackedTensor, PackPolicy, Quantize
from benchmarks import measure
from benchmarks.packing import Layer, Prompt, cache_of, packed
from benchmarks.speed.case import Case

Kind = Literal["dense", "quantised", "ours"]
#: Room of a static cache for generated tokens.
ROOM = 64
_VOCABULARY = 512
_CONTENT_RANK = 128


@dataclass(frozen=True)
class Contender:
    """kind: what it is compared as. compiles: the model, in place, or not. cache: of so many prompts."""

    kind: Kind
    compiles: Callable[[Any], None]
    cache: Callable[[Any, Case, int], Any]


def model_of(case: Case) -> Any:
    """A decoder with random weights, the same in every layer: they take memory once, and time as often as others."""
    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.mlp,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        head_dim=case.head_dim,
        vocab_size=_VOCABULARY,
        max_position_embeddings=1 << 16,
        attn_implementation="sdpa",
        dtype=case.torch_dtype,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.nn.Parameter] = {}
    for name, weight in list(model.named_parameters()):
        shared = re.sub(r"layers\.\d+\.", "layers.0.", name)
        if shared not in weights:
            values = 0.02 * torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            weights[shared] = torch.nn.Parameter(values.to(case.torch_dtype), requires_grad=False)
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, weights[shared])
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def prompt(model: Any, case: Case) -> Prompt:
    """Random keys and values of one prompt, as its prefill would leave them."""
    generator = torch.Generator().manual_seed(1)
    shape = 1, case.heads, case.tokens, case.head_dim
    rank = min(_CONTENT_RANK, case.heads * case.head_dim)
    positions = torch.arange(case.tokens)[None]
    cos, sin = model.model.rotary_emb(torch.empty(1, dtype=case.torch_dtype), positions)
    layers = []
    for _ in range(case.layers):
        plain, value = (measure.low_rank(*shape, rank, case.torch_dtype, generator) for _ in range(2))
        layers.append(Layer(_rotated(plain, cos, sin), plain, value))
    return Prompt(layers, cos, sin, positions < case.tokens - case.text)


def _rotated(plain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys `[B, H, T, D]` after rotary embedding by `cos` and `sin` `[1, T, D]`."""
    first, second = plain.chunk(2, -1)
    return plain * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def _eager(model: Any) -> None:
    pass


def _inductor(model: Any) -> None:
    # Sizes are symbols: one graph for all batches, which Inductor then finds in its own cache.
    model.compile(dynamic=True)


def _filled(cache: Any, model: Any, case: Case, batch: int) -> Any:
    for number, layer in enumerate(prompt(model, case).layers):
        cache.update(*(each.expand(batch, -1, -1, -1).contiguous() for each in (layer.key, layer.value)), number)
    return cache


def _dynamic(model: Any, case: Case, batch: int) -> Any:
    return _filled(DynamicCache(config=model.config), model, case, batch)


def _static(model: Any, case: Case, batch: int) -> Any:
    return _filled(StaticCache(config=model.config, max_cache_len=case.tokens + ROOM), model, case, batch)


def _quantised(backend: str, **options: Any) -> Contender:
    def cache(model: Any, case: Case, batch: int) -> Any:
        return _filled(QuantizedCache(backend, model.config, **options), model, case, batch)

    return Contender("quantised", _eager, cache)


def _ours(policy: PackPolicy) -> Contender:
    def compiles(model: Any) -> None:
        attnpack_fx.compile(model, policy=policy, dynamic=True)

    def cache(model: Any, case: Case, batch: int) -> Any:
        prefilled = prompt(model, case)
        found = cache_of(model, prefilled, packed(prefilled, policy))
        found.batch_repeat_interleave(batch)
        _check_packed(found)
        return found

    return Contender("ours", compiles, cache)


def _check_packed(cache: Any) -> None:
    for number, layer in enumerate(cache.layers):
        for held in (layer.keys, layer.values):
            if not isinstance(held, PackedTensor) or not held.segments:
                raise RuntimeError(f"layer {number} of our cache is not packed, it holds a {type(held).__name__}")


CONTENDERS: dict[str, Contender] = {
    "dense, eager": Contender("dense", _eager, _dynamic),
    "dense, Inductor": Contender("dense", _inductor, _dynamic),
    "static, Inductor": Contender("dense", _inductor, _static),
    "quanto 4 bit": _quantised("quanto", nbits=4),
    "quanto 2 bit": _quantised("quanto", nbits=2),
    "hqq 4 bit": _quantised("hqq", nbits=4, axis_key=1, axis_value=1),
    "fp8": _quantised("fp8"),
    "ours, rank 64 rotated": _ours(PackPolicy(key_space="rotated", strict=True)),
    "ours, rank 64 rotated, 4 bit": _ours(PackPolicy(key_space="rotated", passes=(Quantize(bits=4),), strict=True)),
    "ours, rank 16 un-rotated": _ours(PackPolicy(vision_rank=16, key_space="unrotated", strict=True)),
}
#: Of `--quick`.
FEW = ("static, Inductor", "quanto 4 bit", "ours, rank 64 rotated")
