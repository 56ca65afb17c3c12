"""All that knows how transformers holds a cache. Duck-typed: nothing here imports transformers at import time."""

from typing import Any

import torch
from torch import Tensor

from attnpack_fx.maintenance import maintain
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.packing import fresh_layer
from attnpack_fx.policy import PackPolicy


def self_attention_layers(past_key_values: Any) -> list[Any]:
    """The layer objects of a cache, each with `keys` and `values`; of an encoder-decoder cache, those of its
    self-attention.
    """
    cache = getattr(past_key_values, "self_attention_cache", past_key_values)
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(
            f"past_key_values: got {type(past_key_values).__name__}, expected a transformers Cache with layers "
            "(transformers 5.17 or later); pack single tensors with attnpack_fx.pack"
        )
    return list(layers)


def keys_and_values(past_key_values: Any) -> list[tuple[Tensor, Tensor]]:
    """`(keys, values)` of every layer that holds any."""
    pairs = [
        (getattr(layer, "keys", None), getattr(layer, "values", None))
        for layer in self_attention_layers(past_key_values)
    ]
    return [
        (key, value) for key, value in pairs if isinstance(key, Tensor) and isinstance(value, Tensor) and key.dim() == 4
    ]


def pack_cache(
    past_key_values: Any, policy: PackPolicy, *, modality: Tensor | None = None, real: Tensor | None = None
) -> Any:
    """Pack every dense, growing layer of a transformers cache in place; returns the cache. Arguments as in
    `attnpack_fx.pack`.

    Sliding-window layers stay as they are: what they keep changes with every token.
    """
    packed = []
    for number, layer in enumerate(self_attention_layers(past_key_values)):
        key = getattr(layer, "keys", None)
        if (
            isinstance(key, Tensor)
            and key.dim() == 4
            and not isinstance(key, PackedTensor)
            and not getattr(layer, "is_sliding", False)
        ):
            fresh = fresh_layer(key, layer.values, policy, modality=modality, real=real, layer=number)
            packed.append((layer, fresh))
    maintain([fresh for _, fresh in packed], policy)
    for layer, fresh in packed:
        layer.keys, layer.values = fresh.key, fresh.value
    return past_key_values


def empty_cache(model: Any) -> Any:
    """The cache `model.generate` would make for itself; passed in, it can be watched while generation goes on."""
    from transformers import DynamicCache, EncoderDecoderCache

    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    return EncoderDecoderCache(cache, DynamicCache(config=config)) if model.config.is_encoder_decoder else cache


def cache_of(output: Any) -> Any:
    """The cache among what a model returned, whose name transformers 5.24 changed; None where there is none."""
    return output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)


def called_by_generate(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What `model.generate` calls if not the model: BLIP-2 and Kosmos-2 let the language model in them generate."""
    own: Any = getattr(type(model), "generate", None)
    if own is None or own.__module__.endswith("generation.utils"):
        return []
    children: list[Any] = [child for child in model.children() if hasattr(child, "generate")]
    return [child for child in children if child.can_generate()]


def cache_argument(cache: Any) -> dict[str, Any]:
    """`cache` under the name by which `generate` takes it, which transformers 5.24 changed."""
    from transformers import __version__

    major, minor = map(int, __version__.split(".")[:2])
    return {"cache" if (major, minor) >= (5, 24) else "past_key_values": cache}


#: Under which names configurations keep the ids of tokens that stand for images or videos.
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def image_tokens(model: Any) -> tuple[int, ...]:
    """The ids of tokens that stand for images or videos, ascending; none for what has no configuration."""
    config = getattr(getattr(model, "module", model), "config", None)  # of what DistributedDataParallel wraps
    return tuple(sorted({token for name in _IMAGE_TOKENS if isinstance(token := getattr(config, name, None), int)}))


def image_positions(model: Any, input_ids: Tensor) -> Tensor:
    """Bool `[B, T]`: which prompt tokens stand for images; all False for a model that has no token for them."""
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in image_tokens(model):
        found |= input_ids == token
    return found


def layer_count(model: Any) -> int | None:
    """How many decoder layers a model has, where its configuration says so."""
    return _number(model, "num_hidden_layers")


def processes(model: Any) -> int:
    """How many tensor-parallel processes share the heads of the model's layers.

    One where transformers has no plan for a model: each process then has all of it.
    """
    count = getattr(model, "tp_size", None) or 1
    if count == 1:
        return 1
    from torch.distributed.tensor import DTensor

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # a vision encoder may be shared alone
    attention = (each for name, each in decoder.named_parameters() if "attn" in name or "attention" in name)
    shared = any(isinstance(each, DTensor) and any(part.is_shard() for part in each.placements) for each in attention)
    if not shared:
        return 1
    heads = _number(model, "num_key_value_heads") or _number(model, "num_attention_heads") or count
    if heads % count:
        raise ValueError(
            f"model: got {heads} heads of keys and values for {count} processes, expected a number of processes that "
            "divides them: transformers cuts the others in two"
        )
    return count


def check_whole(model: Any, what: str, way_out: str) -> None:
    """Raise `ValueError` where tensor-parallel processes share the model, and `what` is for one that has all of it."""
    count = processes(model)
    if count > 1:
        raise ValueError(f"{what}: got a model whose heads {count} processes share, expected all of it; {way_out}")


def query_heads(model: Any) -> int | None:
    """How many heads the queries of a decoder layer have, where the model's configuration says so."""
    return _number(model, "num_attention_heads")


def _number(model: Any, name: str) -> int | None:
    config: Any = getattr(getattr(model, "module", model), "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    count = getattr(text, name, None)
    return count if isinstance(count, int) else None
