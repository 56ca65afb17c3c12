"""Tiny randomly initialised transformers models, one entry per architecture, with inputs for its own forward.

Nothing is downloaded and nothing is tokenised: configurations, weights and token ids come from fixed seeds.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCABULARY = 320
IMAGE = 319
VIDEO = 318
TEXT_TOKENS = range(10, 300)
HIDDEN = 64


@dataclass(frozen=True)
class Example:
    """One architecture.

    build: attention implementation -> model in eval mode, always with the same weights.
    inputs: `(batch, left_padding)` -> keyword arguments of `generate`; only sample 0 is padded.
    packed_layers: indices of the decoder layers whose cache must come back packed.
    dense_reason: a word of the reason reported for the other layers; None when there are none.
    """

    name: str
    build: Callable[[str], transformers.PreTrainedModel]
    inputs: Callable[[int, int], dict[str, Tensor]]
    packed_layers: tuple[int, ...]
    dense_reason: str | None = None


ZOO: dict[str, Example] = {}
#: Further architectures, which differ from those of `ZOO` outside the decoder's layers: for tests of exports.
MORE: dict[str, Example] = {}


def _add(
    name: str,
    model: type[transformers.PreTrainedModel],
    config: Callable[[], transformers.PretrainedConfig],
    inputs: Callable[[int, int], dict[str, Tensor]],
    packed_layers: tuple[int, ...] = (0, 1),
    dense_reason: str | None = None,
    zoo: dict[str, Example] = ZOO,
) -> None:
    def build(attn_implementation: str) -> transformers.PreTrainedModel:
        with _seeded(0):
            made = model._from_config(config(), attn_implementation=attn_implementation).eval()
            _liven(made)
        made.generation_config.eos_token_id = None
        made.generation_config.pad_token_id = 0
        return made

    zoo[name] = Example(name, build, inputs, packed_layers, dense_reason)


def _liven(model: nn.Module) -> None:
    """Weights at which attention is far from uniform and every branch counts, so a wrong cache shows."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=1.5 * module.in_features**-0.5)
            elif isinstance(module, Conv1D):
                module.weight.normal_(std=1.5 * module.weight.shape[0] ** -0.5)
        for name, parameter in model.named_parameters():
            # Mllama's cross-attention and Gemma 3's projector start at zero.
            if name.endswith("gate") and parameter.numel() == 1:
                parameter.fill_(0.5)
            elif parameter.dim() == 2 and not parameter.any():
                parameter.normal_(std=1.5 * parameter.shape[0] ** -0.5)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# ---- inputs ------------------------------------------------------------------------------------------------


def prompt(batch: int, left_padding: int, *spans: tuple[int, int], tokens: int = 12) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`: text, then each span `(token id, length)` followed by a little text.

    tokens: how many text tokens there are beside the spans.
    """
    first, between = 3, 2
    last = tokens - first - between * (len(spans) - 1) if spans else tokens - first
    pieces = [torch.randint(TEXT_TOKENS.start, TEXT_TOKENS.stop, (batch, left_padding + first))]
    for number, (token, length) in enumerate(spans):
        text = last if number == len(spans) - 1 else between
        pieces.append(torch.full((batch, length), token))
        pieces.append(torch.randint(TEXT_TOKENS.start, TEXT_TOKENS.stop, (batch, text)))
    if not spans:
        pieces.append(torch.randint(TEXT_TOKENS.start, TEXT_TOKENS.stop, (batch, last)))
    ids = torch.cat(pieces, dim=1)
    attention_mask = torch.ones_like(ids)
    ids[0, :left_padding] = 0
    attention_mask[0, :left_padding] = 0
    return {"input_ids": ids, "attention_mask": attention_mask}


def text_inputs(batch: int, left_padding: int) -> dict[str, Tensor]:
    with _seeded(1):
        return prompt(batch, left_padding, tokens=24)


def _image_inputs(
    length: int, pixels: tuple[int, ...], extra: Callable[[Tensor], dict[str, Tensor]] | None = None
) -> Callable[[int, int], dict[str, Tensor]]:
    """Inputs with one image of `length` tokens a sample; extra: `input_ids` -> more arguments."""

    def inputs(batch: int, left_padding: int) -> dict[str, Tensor]:
        with _seeded(1):
            made = prompt(batch, left_padding, (IMAGE, length))
            made["pixel_values"] = torch.randn(batch, *pixels)
        if extra is not None:
            made |= extra(made["input_ids"])
        return made

    return inputs


def _image_types(ids: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": (ids == IMAGE).long()}


def _prefix_types(ids: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": torch.zeros_like(ids)}


def _next_sizes(ids: Tensor) -> dict[str, Tensor]:
    return {"image_sizes": torch.tensor([[56, 56]] * ids.shape[0])}


def _qwen_inputs(batch: int, left_padding: int) -> dict[str, Tensor]:
    grid = 6
    with _seeded(1):
        made = prompt(batch, left_padding, (IMAGE, grid * grid // 4))
        made["pixel_values"] = torch.randn(batch * grid * grid, 3 * 2 * 14 * 14)
    made["image_grid_thw"] = torch.tensor([[1, grid, grid]] * batch)
    made["mm_token_type_ids"] = (made["input_ids"] == IMAGE).int()
    return made


#: Older releases of transformers have the second name.
_VIDEO_LLAVA_IMAGES = next(
    name
    for name in inspect.signature(transformers.VideoLlavaForConditionalGeneration.forward).parameters
    if name in ("pixel_values", "pixel_values_images")
)


def _video_inputs(batch: int, left_padding: int) -> dict[str, Tensor]:
    frames, patches = 2, 4
    with _seeded(1):
        made = prompt(batch, left_padding, (IMAGE, patches), (VIDEO, frames * (patches + 1)))
        made[_VIDEO_LLAVA_IMAGES] = torch.randn(batch, 3, 28, 28)
        made["pixel_values_videos"] = torch.randn(batch, frames, 3, 28, 28)
    return made


def _mllama_inputs(batch: int, left_padding: int) -> dict[str, Tensor]:
    tiles = 2
    with _seeded(1):
        made = prompt(batch, left_padding, (IMAGE, 1), tokens=20)
        made["pixel_values"] = torch.randn(batch, 1, tiles, 3, 28, 28)
    made["aspect_ratio_ids"] = torch.full((batch, 1), 2)
    made["aspect_ratio_mask"] = torch.ones(batch, 1, tiles, dtype=torch.long)
    # Text before the image does not see it.
    seen = (made["input_ids"] == IMAGE).long().cumsum(1)
    made["cross_attention_mask"] = seen[:, :, None, None].expand(-1, -1, 1, tiles).contiguous()
    return made


# ---- configurations ----------------------------------------------------------------------------------------

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _llama(**changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**(_DECODER | changes))


def _clip(image_size: int) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(**_ENCODER, image_size=image_size, patch_size=14)


def _siglip(image_size: int) -> transformers.SiglipVisionConfig:
    return transformers.SiglipVisionConfig(**_ENCODER, image_size=image_size, patch_size=14, vision_use_head=False)


def llava_config(**decoder: Any) -> transformers.LlavaConfig:
    """LLaVA with 16 vision tokens an image; decoder: changes to its Llama decoder."""
    return transformers.LlavaConfig(
        vision_config=_clip(56),
        text_config=_llama(**decoder),
        image_token_index=IMAGE,
        image_seq_length=16,
    )


def _llava_next() -> transformers.LlavaNextConfig:
    return transformers.LlavaNextConfig(
        vision_config=_clip(28),
        text_config=_llama(),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[56, 56]],
        image_seq_length=4,
    )


def _llava_onevision() -> transformers.LlavaOnevisionConfig:
    return transformers.LlavaOnevisionConfig(
        vision_config=_siglip(28),
        text_config=transformers.Qwen2Config(**_DECODER),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[56, 56]],
    )


def _vipllava() -> transformers.VipLlavaConfig:
    config = transformers.VipLlavaConfig(vision_config=_clip(56), text_config=_llama(), image_token_index=IMAGE)
    # transformers before 5.24 has the plural.
    layers = "vision_feature_layers" if "vision_feature_layers" in vars(config) else "vision_feature_layer"
    setattr(config, layers, (-1, -2))
    return config


def _video_llava() -> transformers.VideoLlavaConfig:
    return transformers.VideoLlavaConfig(
        vision_config=_clip(28),
        text_config=_llama(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )


def _qwen_text(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return _DECODER | {"rope_parameters": rope | changes.pop("rope", {})} | changes


_QWEN_IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 317,
    "vision_end_token_id": 316,
}


def _qwen2_vl() -> transformers.Qwen2VLConfig:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2}
    return transformers.Qwen2VLConfig(text_config=_qwen_text(), vision_config=vision, **_QWEN_IDS)


def _qwen2_5_vl() -> transformers.Qwen2_5_VLConfig:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "window_size": 56,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [1],
    }
    return transformers.Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=vision, **_QWEN_IDS)


def _qwen3_vl() -> transformers.Qwen3VLConfig:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    text = _qwen_text(head_dim=16, rope={"mrope_interleaved": True})
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS)


def _internvl() -> transformers.InternVLConfig:
    return transformers.InternVLConfig(
        vision_config={**_ENCODER, "image_size": [112, 112], "patch_size": [14, 14]},
        text_config=transformers.Qwen2Config(**_DECODER),
        image_token_id=IMAGE,
        image_seq_length=16,
    )


def _smolvlm() -> transformers.SmolVLMConfig:
    return transformers.SmolVLMConfig(
        vision_config={**_ENCODER, "image_size": 112, "patch_size": 14},
        text_config=_llama(),
        image_token_id=IMAGE,
        scale_factor=2,
    )


def _paligemma() -> transformers.PaliGemmaConfig:
    text = transformers.GemmaConfig(**(_DECODER | {"num_key_value_heads": 1, "head_dim": 16}))
    return transformers.PaliGemmaConfig(
        vision_config=_siglip(56),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,  # tied, a random decoder repeats its last token for ever
    )


def _gemma3() -> transformers.Gemma3Config:
    text = transformers.Gemma3TextConfig(
        **(_DECODER | {"num_hidden_layers": 3}),
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return transformers.Gemma3Config(
        vision_config=_siglip(112),
        text_config=text,
        image_token_index=IMAGE,
        boi_token_index=317,
        eoi_token_index=316,
        mm_tokens_per_image=16,
        tie_word_embeddings=False,
    )


def _mllama() -> transformers.MllamaConfig:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "vision_output_dim": 64,
        "image_size": 28,
        "patch_size": 14,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    text = _DECODER | {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    return transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)


def _gpt2() -> transformers.GPT2Config:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=1024,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def _gpt_neox() -> transformers.GPTNeoXConfig:
    changes = {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}
    return transformers.GPTNeoXConfig(**changes)


_llava_inputs = _image_inputs(16, (3, 56, 56))

_add(
    "llava-mha",
    transformers.LlavaForConditionalGeneration,
    lambda: llava_config(num_key_value_heads=4),
    _llava_inputs,
)
_add("llava-gqa", transformers.LlavaForConditionalGeneration, llava_config, _llava_inputs)
_add(
    "llava-next",
    transformers.LlavaNextForConditionalGeneration,
    _llava_next,
    _image_inputs(4 + 4 * 5, (5, 3, 28, 28), _next_sizes),
)
_add("video-llava", transformers.VideoLlavaForConditionalGeneration, _video_llava, _video_inputs)
_add("qwen2-vl", transformers.Qwen2VLForConditionalGeneration, _qwen2_vl, _qwen_inputs)
_add("qwen2.5-vl", transformers.Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl, _qwen_inputs)
_add("qwen3-vl", transformers.Qwen3VLForConditionalGeneration, _qwen3_vl, _qwen_inputs)
_add("internvl", transformers.InternVLForConditionalGeneration, _internvl, _image_inputs(16, (3, 112, 112)))
_add("smolvlm", transformers.SmolVLMForConditionalGeneration, _smolvlm, _image_inputs(16, (1, 3, 112, 112)))
_add(
    "paligemma",
    transformers.PaliGemmaForConditionalGeneration,
    _paligemma,
    _image_inputs(16, (3, 56, 56), _prefix_types),
)
_add(
    "gemma3",
    transformers.Gemma3ForConditionalGeneration,
    _gemma3,
    _image_inputs(16, (3, 112, 112), _image_types),
    packed_layers=(0, 1, 2),
)
_add(
    "mllama",
    transformers.MllamaForConditionalGeneration,
    _mllama,
    _mllama_inputs,
    packed_layers=(0, 2),
    dense_reason="cross-attention",
)
_add("llama", transformers.LlamaForCausalLM, _llama, text_inputs)
_add(
    "qwen3",
    transformers.Qwen3ForCausalLM,
    lambda: transformers.Qwen3Config(**_DECODER, head_dim=16),
    text_inputs,
)
_add("gpt2", transformers.GPT2LMHeadModel, _gpt2, text_inputs)
_add("gpt-neox", transformers.GPTNeoXForCausalLM, _gpt_neox, text_inputs)
_add("phi3", transformers.Phi3ForCausalLM, lambda: transformers.Phi3Config(**_DECODER), text_inputs)
_add(
    "mistral",
    transformers.MistralForCausalLM,
    lambda: transformers.MistralConfig(**_DECODER, sliding_window=None),
    text_inputs,
)
_add(
    "mistral-sliding",
    transformers.MistralForCausalLM,
    lambda: transformers.MistralConfig(**_DECODER, sliding_window=16),
    text_inputs,
)

_add(
    "llava-onevision",
    transformers.LlavaOnevisionForConditionalGeneration,
    _llava_onevision,
    _image_inputs(4 + 4 * 5, (5, 3, 28, 28), _next_sizes),
    zoo=MORE,
)
_add("vipllava", transformers.VipLlavaForConditionalGeneration, _vipllava, _llava_inputs, zoo=MORE)
_add("qwen2", transformers.Qwen2ForCausalLM, lambda: transformers.Qwen2Config(**_DECODER), text_inputs, zoo=MORE)
_add("llama-tied", transformers.LlamaForCausalLM, lambda: _llama(tie_word_embeddings=True), text_inputs, zoo=MORE)
_add(
    "qwen2-sliding",
    transformers.Qwen2ForCausalLM,
    lambda: transformers.Qwen2Config(**_DECODER, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    text_inputs,
    zoo=MORE,
)
