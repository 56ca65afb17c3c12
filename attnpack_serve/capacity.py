"""How many bytes a prompt will take, and whether it fits: from `attnpack_fx.plan_batch`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import attnpack_fx

#: Tokens that are generated to measure.
_MEASURED = 16


@dataclass(frozen=True)
class Capacity:
    """Bytes of prompts in proportion to their tokens.

    Attributes:
        free: bytes for prompts, beyond the model, what any batch takes, and kept prefixes.
        per_token: of a prompt, at the worst moment.
        per_new_token: of an answer, whose keys and values are dense at first.
        context: tokens of a prompt and its answer that the model was made for; None where it does not say.
    """

    free: int
    per_token: float
    per_new_token: float
    context: int | None = None

    def bytes(self, tokens: int, new_tokens: int) -> int:
        """Return what a prompt of so many tokens takes together with the longest answer."""
        return round(tokens * self.per_token + new_tokens * self.per_new_token)


def measured(model: Any, example: Mapping[str, Any], memory: int, prefixes: int) -> tuple[Capacity, int]:
    """Measure what prompts like `example` take.

    Args:
        model: a compiled transformers model.
        example: what `generate` takes for one prompt.
        memory: bytes for the model and all prompts.
        prefixes: bytes of that which kept prefixes take.

    Returns:
        The capacity, and the largest batch of such prompts.
    """
    placed = {name: each.to(model.device) for name, each in example.items()}
    plan = attnpack_fx.plan_batch(model, None, placed, memory=memory - prefixes, new_tokens=_MEASURED)
    one, tokens = max(plan.prefill, plan.decode, 1), example["input_ids"].shape[1]
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return Capacity(plan.batch * one, one / tokens, dense_bytes(model), context), plan.batch


def dense_bytes(model: Any) -> float:
    """Return the bytes of a token's dense keys and values in all layers, by the model's configuration."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
