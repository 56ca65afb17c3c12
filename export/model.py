"""The models that can be exported, and the parts of one that the steps call. All that knows transformers is here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnpack_fx.hf import image_tokens

#: Decoders whose layers are plain self-attention with rotary embedding of pairs `(i, i + E / 2)`.
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
#: Models that put one feature vector in the place of every image token, and leave the rest to such a decoder.
VISION = ("llava", "llava_next", "llava_onevision", "vipllava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
#: What processors make of images; all but the pixels says how they were cut.
_IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images")
#: Under which transformers finds the attention of a step.
_ATTENTION = "attnpack_export"


@dataclass(frozen=True)
class Parts:
    """One model taken apart.

    decoder: of hidden states; embedding, head: of tokens; image_tokens: ids that stand for an image's features.
    layers, heads, kv_heads, head_dim, hidden: sizes. axes: of positions, 3 under M-RoPE. deepstack: into how many
    layers the vision tower's features go besides.
    """

    model: nn.Module
    decoder: nn.Module
    embedding: nn.Module
    head: nn.Module
    image_tokens: tuple[int, ...]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    axes: int
    deepstack: int

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device  # type: ignore[return-value]

    @property
    def features(self) -> list[str]:
        """The names of what a vision tower makes: features of image tokens, then those for deeper layers."""
        return ["image_features", *(f"deepstack_features.{number}" for number in range(self.deepstack))]

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        return int(self.head.weight.shape[0])  # type: ignore[index]

    @property
    def rotated(self) -> int:
        """How many dims of a head are turned."""
        place = torch.zeros((1, 1) if self.axes == 1 else (self.axes, 1, 1), dtype=torch.int64, device=self.device)
        return int(self.angles(self.embedding.weight, place)[0].shape[-1])  # type: ignore[arg-type]

    def angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[B, T, E]` of positions `[B, T]`, or `[3, B, T]` under M-RoPE, in x's dtype."""
        cos, sin = self.decoder.rotary_emb(x, positions)  # type: ignore[operator]
        if cos.dim() == 3:
            return cos, sin
        # transformers before 5.24 leaves the choice of an axis for every frequency to the layers of Qwen2-VL.
        sections = [*self.decoder.config.rope_parameters["mrope_section"]] * 2  # type: ignore[union-attr, index]
        chosen = (
            torch.cat([part[number % 3] for number, part in enumerate(each.split(sections, -1))], -1)
            for each in (cos, sin)
        )
        return tuple(chosen)  # type: ignore[return-value]

    def decode(self, embedded: Tensor, mask: Tensor, positions: Tensor, step: Any) -> Tensor:
        """Hidden states of tokens, where `step.attend(layer, query, key, value, mask, scaling)` is the attention."""
        return self.decoder(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False, attnpack_step=step
        ).last_hidden_state


def parts_of(model: Any) -> Parts:
    """Raises `NotImplementedError` for a model that cannot be exported, with the reason."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise NotImplementedError(
            f"export: got {type(model).__name__}, which is no transformers model; expected one of {_listed()}"
        )
    text = config.get_text_config(decoder=True)
    vision = config.model_type in VISION
    if not vision and config.model_type not in DECODERS:
        raise NotImplementedError(
            f"export: got a model of type {config.model_type!r}, whose decoder step is not known to be one of plain "
            f"self-attention layers over a growing cache; expected one of {_listed()}"
        )
    if text.model_type not in DECODERS:
        raise NotImplementedError(
            f"export: got {config.model_type!r} with a {text.model_type!r} decoder; expected a decoder of type "
            f"{', '.join(DECODERS)}"
        )
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    sliding = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if kinds or (sliding is not None and text.model_type in ("mistral", "qwen2", "qwen3")):
        raise NotImplementedError(
            f"export: this {text.model_type} model has layers of sliding-window attention, whose cache drops tokens as "
            "it grows; set sliding_window=None in its configuration if its prompts stay shorter"
        )
    decoder, embedding, head = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise NotImplementedError(
            f"export: {type(model).__name__} has no language modelling head; take the model with one"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    deepstack = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", ())
    return Parts(
        model,
        decoder,
        embedding,
        head,
        image_tokens(model) if vision else (),
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        head_dim,
        text.hidden_size,
        3 if "mrope_section" in rope else 1,
        len(deepstack) if vision else 0,
    )


@contextmanager
def exporting(parts: Parts) -> Iterator[None]:
    """Let the attention of the decoder's layers be that of the step which calls it."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    config = parts.decoder.config
    before, training = config._attn_implementation, parts.model.training  # type: ignore[union-attr]
    config._attn_implementation = _ATTENTION  # type: ignore[union-attr]
    parts.model.eval()
    try:
        # Without no_grad, the rotary embedding's own would stay in the captured program as an operator of its own.
        with torch.no_grad():
            yield
    finally:
        config._attn_implementation = before  # type: ignore[union-attr]
        parts.model.train(training)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    out = kwargs["attnpack_step"].attend(module.layer_idx, query, key, value, attention_mask, scaling)
    return out.transpose(1, 2), None


@torch.no_grad()
def features(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """What `PackedGenerator.generate` takes as `image_features`, computed in PyTorch: for artefacts without a vision
    step, and images of other sizes than those of its example.

    model: the one that was exported, in eval mode. inputs: as its processor makes them.
    Returns features `[F, hidden]` of all image tokens in turn, then those for deeper layers (DeepStack). Raises
    `NotImplementedError` for models that cannot be exported, ValueError for those of text and inputs without images.
    """
    parts = parts_of(model)
    if not parts.image_tokens or "pixel_values" not in inputs:
        raise ValueError(
            f"features: got {type(model).__name__} and inputs {sorted(inputs)}, expected a model that takes images, "
            "and pixel_values; leave image_features out for text alone"
        )
    return image_features(model, image_inputs(parts, inputs))


def image_inputs(parts: Parts, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a processor's inputs, those that the vision tower takes, where the model is and in its dtype."""
    given = {name: torch.as_tensor(inputs[name]).to(parts.device) for name in _IMAGE_INPUTS if name in inputs}
    return given | {"pixel_values": given["pixel_values"].to(parts.dtype)}


def example_images(parts: Parts, inputs: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """What a vision tower is exported with: images of `inputs`, or blank ones where all are of one size, else None."""
    if not parts.image_tokens:
        return None
    if "pixel_values" in inputs:
        return image_inputs(parts, inputs)
    if not any_count(parts.model):
        return None
    config: Any = parts.model.config
    size, channels = config.vision_config.image_size, config.vision_config.num_channels
    return {"pixel_values": torch.zeros((1, channels, size, size), dtype=parts.dtype)}


def image_features(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What the vision tower makes of images: features `[F, hidden]`, then those for deeper layers."""
    if any_count(model):
        return [_clip_features(model, inputs["pixel_values"]).flatten(0, 1)]
    found = model.get_image_features(**inputs, return_dict=True)
    every = (found.pooler_output, *(getattr(found, "deepstack_features", None) or ()))
    # Some towers list images one by one.
    rows = (torch.cat(list(each)) if isinstance(each, (list, tuple)) else each for each in every)
    return [each.flatten(0, -2) for each in rows]


def any_count(model: Any) -> bool:
    """Whether one vision step serves any number of images: where all are of one size, unlike those of Pixtral."""
    config = model.config
    return config.model_type in ("llava", "vipllava") and config.vision_config.model_type != "pixtral"


def _clip_features(model: Any, pixel_values: Tensor) -> Tensor:
    """As `get_image_features` of LLaVA and VipLLaVA, which list images one by one: `[images, tokens, hidden]`."""
    config, inner = model.config, model.model
    numbers = getattr(config, "vision_feature_layers", None) or config.vision_feature_layer
    states = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    chosen = [states[number] for number in ([numbers] if isinstance(numbers, int) else numbers)]
    if config.model_type == "vipllava" or config.vision_feature_select_strategy == "default":
        chosen = [each[:, 1:] for each in chosen]  # without CLIP's token for the whole image
    return inner.multi_modal_projector(torch.cat(chosen, -1))


@contextmanager
def added_to_layers(layers: Sequence[nn.Module], added: Sequence[Tensor]) -> Iterator[None]:
    """While a decoder runs, `added[n]` joins what its layer n returns (Qwen3-VL's DeepStack)."""

    def adding(more: Tensor) -> Callable[..., Any]:
        return lambda module, args, output: output + more

    handles = [layer.register_forward_hook(adding(more)) for layer, more in zip(layers, added, strict=False)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _listed() -> str:
    return ", ".join((*VISION, *(name for name in DECODERS if not name.endswith("_text"))))
