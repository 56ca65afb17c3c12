"""The two architectures: multi-head attention under one-dimensional RoPE, and grouped heads under M-RoPE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from attnpack_fx.demo import digits

PATCH = 8
SIDE = digits.IMAGE_SIZE // PATCH
TOKENS_PER_IMAGE = SIDE**2
PIXEL_MEAN = 0.2
PIXEL_STD = 0.3
CHAT_TEMPLATE = (
    "{% set ns = namespace(image=0) %}{% set parts = namespace(text='') %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}"
    "{% set parts.text = parts.text ~ 'question : ' ~ message['content'] ~ ' answer : ' %}"
    "{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{% set ns.image = ns.image + 1 %}"
    "{% set parts.text = parts.text ~ 'image #' ~ ns.image ~ ' : <image> ' %}{% endif %}{% endfor %}"
    "{% for item in message['content'] %}{% if item['type'] == 'text' %}"
    "{% set parts.text = parts.text ~ 'question : ' ~ item['text'] ~ ' answer : ' %}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% else %}"
    "{% if message['content'] is string %}{% set parts.text = parts.text ~ message['content'] %}"
    "{% else %}{% for item in message['content'] %}{% if item['type'] == 'text' %}"
    "{% set parts.text = parts.text ~ item['text'] %}{% endif %}{% endfor %}{% endif %}"
    "{% set parts.text = parts.text ~ ' <eos> ' %}"
    "{% endif %}{% endfor %}{{ parts.text | trim }}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `digits.vocabulary`; every prompt starts with ``<bos>``."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>", digits.IMAGE_TOKEN]
    words = special + digits.vocabulary()
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": digits.IMAGE_TOKEN},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def patch_cells() -> Tensor:
    """The cell ``[64]`` that every patch lies in."""
    patch = torch.arange(TOKENS_PER_IMAGE)
    row = (patch // SIDE) * PATCH // digits.CELL_HEIGHT
    column = (patch % SIDE) * PATCH // digits.CELL_WIDTH
    return row * digits.COLUMNS + column


def patch_places() -> Tensor:
    """Which part ``[64]`` of its cell every patch shows, counted row by row."""
    patch = torch.arange(TOKENS_PER_IMAGE)
    high, wide = digits.CELL_HEIGHT // PATCH, digits.CELL_WIDTH // PATCH
    return (patch // SIDE) % high * wide + patch % SIDE % wide


def normalised(pixels: NDArray[np.uint8]) -> Tensor:
    """Grey images ``[n, 64, 64]``, centred and scaled as a processor does it."""
    return torch.from_numpy(pixels).float().div_(255.0).sub_(PIXEL_MEAN).div_(PIXEL_STD)


class Family(ABC):
    """How one architecture is made, fed and frozen."""

    #: Positions that an image takes of the text's, and those of its tokens ``[axes, 64]`` from the first.
    span: int
    places: NDArray[np.int64]

    @abstractmethod
    def make(self, tokenizer: PreTrainedTokenizerFast) -> Any:
        """The untrained model, in float32."""

    @abstractmethod
    def pixels(self, grey: NDArray[np.uint8]) -> dict[str, Tensor]:
        """Grey images ``[n, 64, 64]`` as the model takes them."""

    @abstractmethod
    def tower(self, model: Any) -> nn.Module:
        """What turns pixels into patch features."""

    @abstractmethod
    def projector(self, model: Any) -> nn.Module:
        """What turns patch features into tokens; trained in both phases."""

    @abstractmethod
    def last_projection(self, model: Any) -> nn.Linear:
        """The layer that sets the scale of image tokens."""

    @abstractmethod
    def save_processor(self, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
        """Write what prepares prompts beside the weights."""

    def positions(self, each: Tensor) -> Tensor:
        """Positions ``[axes, batch, length]`` as the decoder takes them."""
        return each

    def features(self, model: Any, grey: NDArray[np.uint8]) -> Tensor:
        """Image tokens ``[n, 64, hidden]``."""
        given = self.pixels(grey)
        return torch.stack(list(model.model.get_image_features(**given, return_dict=True).pooler_output))


class Llava(Family):
    """CLIP tower, two-layer projector, Llama decoder: 4 heads of 64, one position a token."""

    span = TOKENS_PER_IMAGE
    places = np.arange(TOKENS_PER_IMAGE)[None]

    def make(self, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
        vision = CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=digits.IMAGE_SIZE,
            patch_size=PATCH,
            projection_dim=128,
        )
        text = LlamaConfig(
            vocab_size=64,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids(digits.IMAGE_TOKEN),
            image_seq_length=TOKENS_PER_IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
        model = LlavaForConditionalGeneration(config)
        nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
        with torch.no_grad():
            table = model.model.vision_tower.embeddings.position_embedding.weight
            table[1:] = _place_codes(vision.hidden_size)
        return model

    def pixels(self, grey: NDArray[np.uint8]) -> dict[str, Tensor]:
        return {"pixel_values": normalised(grey)[:, None].expand(-1, 3, -1, -1)}

    def tower(self, model: Any) -> nn.Module:
        return model.model.vision_tower

    def projector(self, model: Any) -> nn.Module:
        return model.model.multi_modal_projector

    def last_projection(self, model: Any) -> nn.Linear:
        return model.model.multi_modal_projector.linear_2

    def positions(self, each: Tensor) -> Tensor:
        return each[0]

    def save_processor(self, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
        size = digits.IMAGE_SIZE
        image_processor = CLIPImageProcessor(
            size={"height": size, "width": size},
            crop_size={"height": size, "width": size},
            image_mean=[PIXEL_MEAN] * 3,
            image_std=[PIXEL_STD] * 3,
        )
        processor = LlavaProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token=digits.IMAGE_TOKEN,
            chat_template=CHAT_TEMPLATE,
        )
        processor.save_pretrained(out)
        image_processor.save_pretrained(out)


class Qwen3VL(Family):
    """Qwen3-VL: 8 query and 2 key/value heads of 64, norms of queries and keys, interleaved M-RoPE, no deepstack."""

    span = SIDE
    places = np.stack(
        [np.zeros(TOKENS_PER_IMAGE, np.int64), np.repeat(np.arange(SIDE), SIDE), np.tile(np.arange(SIDE), SIDE)]
    )

    def make(self, tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
        vision = {
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "spatial_merge_size": 1,
            "out_hidden_size": 256,
            "num_position_embeddings": TOKENS_PER_IMAGE,
            "deepstack_visual_indexes": [],
        }
        text = {
            "vocab_size": 64,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
            },
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": False,
        }
        # No prompt holds a video, or marks where an image begins: ids that no token has.
        unused = {"video_token_id": 63, "vision_start_token_id": 62, "vision_end_token_id": 61}
        config = Qwen3VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids(digits.IMAGE_TOKEN),
            tie_word_embeddings=False,
            **unused,
        )
        model = Qwen3VLForConditionalGeneration(config)
        nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
        with torch.no_grad():
            model.model.visual.pos_embed.weight.copy_(_place_codes(vision["hidden_size"]))
        return model

    def pixels(self, grey: NDArray[np.uint8]) -> dict[str, Tensor]:
        patches = normalised(grey).view(-1, SIDE, PATCH, SIDE, PATCH).transpose(2, 3)
        # Channels and frames of a still grey image are all the same.
        flat = patches.reshape(-1, 1, PATCH * PATCH).expand(-1, 6, -1).flatten(1)
        return {"pixel_values": flat, "image_grid_thw": torch.tensor([[1, SIDE, SIDE]]).expand(len(grey), -1)}

    def tower(self, model: Any) -> nn.Module:
        return nn.ModuleList([model.model.visual.patch_embed, model.model.visual.pos_embed, model.model.visual.blocks])

    def projector(self, model: Any) -> nn.Module:
        return model.model.visual.merger

    def last_projection(self, model: Any) -> nn.Linear:
        return model.model.visual.merger.linear_fc2

    def save_processor(self, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
        # The processor of transformers needs torchvision, for videos; `benchmarks.trained` has one that does not.
        tokenizer.save_pretrained(out)


FAMILIES: dict[str, type[Family]] = {"llava": Llava, "qwen3_vl": Qwen3VL}


def _place_codes(width: int) -> Tensor:
    """Position embeddings ``[64, width]`` to begin with: of the cell, and of the place within it."""
    cell_codes = torch.randn(digits.CELLS, width)
    place_codes = torch.randn(TOKENS_PER_IMAGE // digits.CELLS, width)
    return 0.3 * (cell_codes[patch_cells()] + place_codes[patch_places()])
