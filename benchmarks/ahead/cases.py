"""Models and settings whose graphs are compiled: attention of the shape of real models, over narrow hidden states."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from attnpack_fx import H2O, KIVI, KVQuant, PackPolicy, Partial, Quantize

#: The image token, and what of the vocabulary is text.
_IMAGE, _TEXT, _VOCABULARY = 319, (10, 300), 320
_LAYERS, _HIDDEN, _PATCH = 2, 64, 2
_QWEN = {"image_token_id": _IMAGE, "vision_start_token_id": 318, "vision_end_token_id": 317, "video_token_id": 316}


@dataclass(frozen=True)
class Attention:
    """Query heads, KV heads and the dims of a head; side: of an image, in tokens."""

    heads: int
    kv_heads: int
    dim: int
    side: int = 24


@dataclass(frozen=True)
class Case:
    """One model, its dtype, and the policy it generates with; batch: of alike prompts of one image."""

    family: str
    size: str
    dtype: torch.dtype
    setting: str
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.size} {self.family}, {str(self.dtype).removeprefix('torch.')}, {self.setting}" + (
            f", batch {self.batch}" if self.batch > 1 else ""
        )

    def model(self) -> nn.Module:
        """The model with weights of one seed, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = _BUILDERS[self.family](SIZES[self.size][self.family])
        return made.eval().to(self.dtype)

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of `generate`."""
        attention = SIZES[self.size][self.family]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return _prompt(self.family, attention.side, self.batch, self.dtype)

    def policy(self) -> PackPolicy:
        return SETTINGS[self.setting]


def _text(attention: Attention) -> dict[str, Any]:
    return {
        "vocab_size": _VOCABULARY,
        "hidden_size": _HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.dim,
        "max_position_embeddings": 4096,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def _llava(attention: Attention) -> nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=_PATCH * attention.side,
        patch_size=_PATCH,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**_text(attention)),
        image_token_index=_IMAGE,
        image_seq_length=attention.side**2,
    )
    return transformers.LlavaForConditionalGeneration(config)


#: Of the Qwen-VL models.
_ENCODER = {"depth": 1, "num_heads": 2, "patch_size": _PATCH, "hidden_size": 32, "intermediate_size": 48}


def _rope(attention: Attention, **more: Any) -> dict[str, Any]:
    pairs = attention.dim // 2
    sections = [pairs // 4, pairs * 3 // 8, pairs * 3 // 8]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections} | more}


def _qwen2_5_vl(attention: Attention) -> nn.Module:
    width = attention.heads * attention.dim
    vision = _ENCODER | {"window_size": 8 * _PATCH, "out_hidden_size": width, "fullatt_block_indexes": [0]}
    text = _text(attention) | _rope(attention) | {"hidden_size": width}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_QWEN)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(attention: Attention) -> nn.Module:
    vision = _ENCODER | {"out_hidden_size": _HIDDEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text = _text(attention) | _rope(attention, mrope_interleaved=True)
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN)
    return transformers.Qwen3VLForConditionalGeneration(config)


_BUILDERS: dict[str, Callable[[Attention], nn.Module]] = {
    "LLaVA": _llava,
    "Qwen2.5-VL": _qwen2_5_vl,
    "Qwen3-VL": _qwen3_vl,
}
#: Attention of tiny models, and of LLaVA-1.5-7B, Qwen2.5-VL-7B and Qwen3-VL-8B.
SIZES: dict[str, dict[str, Attention]] = {
    "tiny": {
        "LLaVA": Attention(8, 8, 16),
        "Qwen2.5-VL": Attention(4, 2, 32),
        "Qwen3-VL": Attention(4, 2, 64),
    },
    "7B": {
        "LLaVA": Attention(32, 32, 128),
        "Qwen2.5-VL": Attention(28, 4, 128),
        "Qwen3-VL": Attention(32, 8, 128),
    },
}


def _prompt(family: str, side: int, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    image, text = side**2, 24
    ids = torch.randint(*_TEXT, (batch, image + text))
    ids[:, 8 : 8 + image] = _IMAGE
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "LLaVA":
        return made | {"pixel_values": torch.randn(batch, 3, _PATCH * side, _PATCH * side, dtype=dtype)}
    patches = 2 * side  # two by two become a token
    made["pixel_values"] = torch.randn(batch * patches**2, 3 * 2 * _PATCH**2, dtype=dtype)
    made["image_grid_thw"] = torch.tensor([[1, patches, patches]] * batch)
    return made | {"mm_token_type_ids": (ids == _IMAGE).int()}


_FOUR_BITS = Quantize(4)
SETTINGS = {
    "default": PackPolicy(),
    "rank 16": PackPolicy(vision_rank=16, key_space="unrotated"),
    "rotated": PackPolicy(vision_rank=64, key_space="rotated"),
    "rotated, text packed": PackPolicy(vision_rank=64, text_rank=16, key_space="rotated", fold_every=4, recent=2),
    "4 bits": PackPolicy(vision_rank=64, key_space="rotated", passes=(_FOUR_BITS,)),
    "4 bits, un-rotated": PackPolicy(vision_rank=64, key_space="unrotated", passes=(_FOUR_BITS,)),
    "8 and 2 bits": PackPolicy(vision_rank=64, key_space="rotated", passes=(Quantize(((16, 8), (None, 2))),)),
    "shared bases": PackPolicy(bases="batch"),
    "partial reading": PackPolicy(vision_rank=64, key_space="rotated", partial=Partial()),
    "KIVI": PackPolicy(vision_rank=None, passes=(KIVI(2, residual=32),)),
    "KVQuant": PackPolicy(vision_rank=None, passes=(KVQuant(4, residual=32),)),
    "low rank, KIVI, H2O": PackPolicy(passes=(H2O(0.5), KIVI(4, residual=32))),
}
_HALF = torch.bfloat16


def cases() -> Iterator[Case]:
    """Every setting in bf16 at the shape of real models; other dtypes and small shapes for what differs there."""
    for family in _BUILDERS:
        yield from (Case(family, "7B", _HALF, setting) for setting in SETTINGS)
        for setting in ("default", "rotated", "4 bits", "4 bits, un-rotated"):
            yield from (Case(family, "7B", dtype, setting) for dtype in (torch.float16, torch.float32))
            yield Case(family, "tiny", torch.float32, setting)
        for setting in ("default", "rotated", "4 bits"):
            yield Case(family, "7B", _HALF, setting, batch=8)
