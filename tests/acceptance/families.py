"""The families of transformers models that the acceptance grid runs: tiny, with prompts long enough to pack.

Like tests/zoo.py's, but sized so that the default options must save bytes: 256 vision tokens an image, 40 text tokens,
keys and values 256 numbers wide (`H * D`), and three decoder layers: every graph is traced and compiled layer by layer,
and three are the fewest among which some see fewer tokens, and two are merged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.zoo import _DECODER, _QWEN_IDS, IMAGE, VOCABULARY, _liven, _seeded, prompt
from tests.zoo import _ENCODER as _TWO_LAYERS

LAYERS = 3
VISION_TOKENS = 256
TEXT_TOKENS = 40
#: Of keys, and of values: heads by channels.
HEAD_DIMS = {"mha": (8, 32), "gqa": (4, 64)}
_PATCH = 4
_PADDING = 7
#: Pixels of a square image with 256 patches.
_SIDE = 16 * _PATCH


@dataclass(frozen=True)
class Family:
    """One architecture with a prompt.

    config: what `model` is built from. inputs: keyword arguments of `generate`, by seed.
    heads, dim: of its cached keys and values. batch: samples of a prompt. vision, text: tokens of a sample's prompt,
    padding among text.
    windows: layers with a sliding window, which stay dense where methods act or tokens are read in part.
    unpruned, unmerged: a word of the reason why no tokens can be pruned in it, or no layers be merged, else None.
    """

    name: str
    model: type[transformers.PreTrainedModel]
    config: Callable[[], transformers.PretrainedConfig]
    inputs: Callable[[int], dict[str, Tensor]]
    heads: int = HEAD_DIMS["gqa"][0]
    dim: int = HEAD_DIMS["gqa"][1]
    batch: int = 1
    vision: int = VISION_TOKENS
    text: int = TEXT_TOKENS
    windows: tuple[int, ...] = ()
    unpruned: str | None = None
    unmerged: str | None = None

    def build(self) -> transformers.PreTrainedModel:
        """The model in eval mode, always with the same weights; it never ends a text by itself."""
        with _seeded(0):
            made = self.model._from_config(self.config(), attn_implementation="sdpa").eval()
            _liven(made)
        made.generation_config.eos_token_id = None
        made.generation_config.pad_token_id = 0
        return made


# ---- inputs ------------------------------------------------------------------------------------------------


def _image_inputs(
    pixels: tuple[int, ...], batch: int = 1, left_padding: int = 0, types: bool = False
) -> Callable[[int], dict[str, Tensor]]:
    def inputs(seed: int) -> dict[str, Tensor]:
        with _seeded(seed + 1):
            made = prompt(batch, left_padding, (IMAGE, VISION_TOKENS), tokens=TEXT_TOKENS)
            made["pixel_values"] = torch.randn(batch, *pixels)
        if types:
            made["token_type_ids"] = (made["input_ids"] == IMAGE).long()
        return made

    return inputs


def _qwen_inputs(seed: int) -> dict[str, Tensor]:
    side = 32  # patches; two by two become a token
    with _seeded(seed + 1):
        made = prompt(1, 0, (IMAGE, side * side // 4), tokens=TEXT_TOKENS)
        made["pixel_values"] = torch.randn(side * side, 3 * 2 * _PATCH * _PATCH)
    made["image_grid_thw"] = torch.tensor([[1, side, side]])
    made["mm_token_type_ids"] = (made["input_ids"] == IMAGE).int()
    return made


def _text_inputs(seed: int) -> dict[str, Tensor]:
    with _seeded(seed + 1):
        return prompt(1, 0, tokens=VISION_TOKENS + TEXT_TOKENS)


# ---- configurations ----------------------------------------------------------------------------------------

#: One layer, which is as many as matter here.
_ENCODER: dict[str, Any] = _TWO_LAYERS | {"num_hidden_layers": 1}
_DEEP: dict[str, Any] = _DECODER | {"num_hidden_layers": LAYERS, "num_attention_heads": 8}
_MHA: dict[str, Any] = _DEEP | {"hidden_size": 256, "num_key_value_heads": 8}
_GQA: dict[str, Any] = _DEEP | {"hidden_size": 512, "num_key_value_heads": 4}


def _llava(decoder: dict[str, Any]) -> transformers.LlavaConfig:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_TWO_LAYERS, image_size=_SIDE, patch_size=_PATCH),
        text_config=transformers.LlamaConfig(**decoder),
        image_token_index=IMAGE,
        image_seq_length=VISION_TOKENS,
    )


def _qwen_text(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    return _GQA | {"rope_parameters": rope | changes.pop("rope", {})} | changes


_QWEN_ENCODER: dict[str, Any] = {"depth": 1, "num_heads": 2, "patch_size": _PATCH}


def _qwen2_vl() -> transformers.Qwen2VLConfig:
    vision = _QWEN_ENCODER | {"embed_dim": 32, "hidden_size": _GQA["hidden_size"], "mlp_ratio": 2}
    return transformers.Qwen2VLConfig(text_config=_qwen_text(), vision_config=vision, **_QWEN_IDS)


def _qwen2_5_vl() -> transformers.Qwen2_5_VLConfig:
    vision = _QWEN_ENCODER | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "window_size": 8 * _PATCH,
        "out_hidden_size": _GQA["hidden_size"],
        "fullatt_block_indexes": [0],
    }
    return transformers.Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=vision, **_QWEN_IDS)


def _qwen3_vl() -> transformers.Qwen3VLConfig:
    vision = _QWEN_ENCODER | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": _GQA["hidden_size"],
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    text = _qwen_text(head_dim=64, rope={"mrope_interleaved": True})
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS)


def _internvl() -> transformers.InternVLConfig:
    # Two by two patches become a token.
    side = [2 * _SIDE, 2 * _SIDE]
    return transformers.InternVLConfig(
        vision_config={**_ENCODER, "image_size": side, "patch_size": [_PATCH, _PATCH]},
        text_config=transformers.Qwen2Config(**_GQA),
        image_token_id=IMAGE,
        image_seq_length=VISION_TOKENS,
    )


def _gemma3() -> transformers.Gemma3Config:
    text = transformers.Gemma3TextConfig(
        **_GQA,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )
    return transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(
            **_ENCODER, image_size=2 * _SIDE, patch_size=_PATCH, vision_use_head=False
        ),
        text_config=text,
        image_token_index=IMAGE,
        boi_token_index=317,
        eoi_token_index=316,
        mm_tokens_per_image=VISION_TOKENS,
        tie_word_embeddings=False,
    )


def _llama() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**_GQA)


_square, _large = (3, _SIDE, _SIDE), (3, 2 * _SIDE, 2 * _SIDE)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llava-mha",
            transformers.LlavaForConditionalGeneration,
            lambda: _llava(_MHA),
            _image_inputs(_square),
            *HEAD_DIMS["mha"],
        ),
        Family(
            "llava-gqa-padded",
            transformers.LlavaForConditionalGeneration,
            lambda: _llava(_GQA),
            _image_inputs(_square, batch=2, left_padding=_PADDING),
            batch=2,
            text=TEXT_TOKENS + _PADDING,
        ),
        Family("qwen2-vl", transformers.Qwen2VLForConditionalGeneration, _qwen2_vl, _qwen_inputs),
        Family("qwen2.5-vl", transformers.Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl, _qwen_inputs),
        Family(
            "qwen3-vl",
            transformers.Qwen3VLForConditionalGeneration,
            _qwen3_vl,
            _qwen_inputs,
            # Each decoder layer is a graph of its own.
            unpruned="this graph shows no list of decoder layers by number",
            unmerged="this graph does not show which layers are its neighbours",
        ),
        Family("internvl", transformers.InternVLForConditionalGeneration, _internvl, _image_inputs(_large)),
        Family(
            "gemma3",
            transformers.Gemma3ForConditionalGeneration,
            _gemma3,
            _image_inputs(_large, types=True),
            windows=(0,),
            unpruned="layer",
        ),
        Family(
            "llama",
            transformers.LlamaForCausalLM,
            _llama,
            _text_inputs,
            vision=0,
            text=VISION_TOKENS + TEXT_TOKENS,
            unpruned="no vision tokens are known",
        ),
    )
}
assert VOCABULARY > IMAGE
