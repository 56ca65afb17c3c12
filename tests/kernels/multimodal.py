"""cos and sin of the vision tokens of Qwen-VL models, from transformers' own position indices and rotary embeddings."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl


class Media(NamedTuple):
    """An image or a video; grid: frames, rows and columns of its tokens."""

    kind: str
    grid: tuple[int, int, int]


class _Layout(NamedTuple):
    config: Any
    model: Any
    rotary: Any
    rope: dict[str, Any]
    frames_apart: bool  # with a time stamp before every frame of a video


_SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_IN_TURN = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
_2, _2_5, _3 = modeling_qwen2_vl, modeling_qwen2_5_vl, modeling_qwen3_vl
LAYOUTS = {
    "qwen2_vl": _Layout(Qwen2VLConfig, _2.Qwen2VLModel, _2.Qwen2VLRotaryEmbedding, _SECTIONS, False),
    "qwen2_5_vl": _Layout(Qwen2_5_VLConfig, _2_5.Qwen2_5_VLModel, _2_5.Qwen2_5_VLRotaryEmbedding, _SECTIONS, False),
    "qwen3_vl": _Layout(Qwen3VLConfig, _3.Qwen3VLModel, _3.Qwen3VLTextRotaryEmbedding, _IN_TURN, True),
}


def cos_and_sin(layout: str, samples: list[list[Media]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`[B, N, 64]` each, of the vision tokens of prompts; every sample has as many."""
    made = LAYOUTS[layout]
    config = made.config(text_config={"hidden_size": 512, "num_attention_heads": 4, "rope_parameters": made.rope})
    rows = []
    for sample in samples:
        positions, vision = _positions(made, config, sample)
        rotary = made.rotary(config.text_config)
        cos, sin = rotary(torch.empty((), dtype=dtype), positions)
        assert cos.shape[-1] == 128
        rows.append((cos[0, vision, :64], sin[0, vision, :64]))
    cos, sin = zip(*rows, strict=True)
    return torch.stack(cos), torch.stack(sin)


def _positions(made: _Layout, config: Any, sample: list[Media]) -> tuple[Tensor, Tensor]:
    """Positions `[3, 1, T]` of a prompt with text around its media, and which of its tokens are vision."""
    merge = config.vision_config.spatial_merge_size
    kinds: list[int] = [0] * 15
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for kind, (frames, height, width) in sample:
        apart = made.frames_apart and kind == "video"
        for _ in range(frames if apart else 1):
            kinds += [1 if kind == "image" else 2] * (height * width * (1 if apart else frames)) + [0] * 4
        grids[kind].append([frames, height * merge, width * merge])
    types = torch.tensor([kinds])
    given = {f"{kind}_grid_thw": torch.tensor(each) for kind, each in grids.items() if each}
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = lambda *args, **kwargs: made.model.get_vision_position_ids(model, *args, **kwargs)
    positions, _ = made.model.get_rope_index(model, torch.zeros_like(types), types, **given)
    return positions, types[0] != 0
