"""Further tiny transformers families, beside those of families.py: one of each kind of attention, of cache and of
merging images into the prompt. Nothing is downloaded; weights and inputs come from seeds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

VOCABULARY = 320
IMAGE, VIDEO, AUDIO, START, END = 319, 318, 317, 316, 315
#: Of Ovis 2.
_INDICATORS = [310, 311, 312, 313, 314]
#: Text is drawn from these; 0 pads, 1 starts, 2 ends, and image and other special tokens are from 310.
_TEXT = (10, 300)
_PADDING = 5
_PROMPT = 80
#: Of the layers with a sliding window, or with chunks: less than every prompt here.
WINDOW = 32


@dataclass(frozen=True)
class Further:
    """One architecture with a prompt.

    build: the model in eval mode, fp32, always with the same weights; it never ends a text by itself.
    inputs: keyword arguments of `generate`, by seed; text and image both depend on it.
    vision: vision tokens of one sample that are in the decoder's sequence. layers: of the decoder.
    note: what is special about its attention, cache, or merge of the image features.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    vision: int
    layers: int
    note: str


FURTHER: dict[str, Further] = {}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _liven(model: nn.Module) -> None:
    """Weights at which attention is far from uniform and every branch counts, so a wrong cache shows."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=1.5 * module.in_features**-0.5)
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                module.weight.normal_(std=1.5 * module.weight[0].numel() ** -0.5)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(std=1.0)
            elif name.endswith(("gate_up_proj", "down_proj", "router.weight", "gate.weight")):
                parameter.normal_(std=1.5 * min(parameter.shape[-2:]) ** -0.5)  # experts, and routers without Linear
            elif name.endswith(("query_tokens", "position_embedding", "position_embedding_table")):
                parameter.normal_(std=0.5)
            elif parameter.dim() == 2 and not parameter.any():
                parameter.normal_(std=1.5 * parameter.shape[0] ** -0.5)


def _add(
    name: str,
    model: str,
    config: Callable[[], T.PretrainedConfig],
    inputs: Callable[[int], dict[str, Tensor]],
    note: str,
    vision: int = 0,
    layers: int = 3,
    mend: Callable[[nn.Module], None] | None = None,
) -> None:
    """model: a class of transformers by name, which is imported when it is built. mend: applied to the model last."""

    def build() -> nn.Module:
        with _seeded(0):
            made = getattr(T, model)._from_config(config()).eval()
            _liven(made)
            if mend:
                mend(made)
        for module in made.modules():  # blip2 and kosmos2 generate with an inner model
            if getattr(module, "generation_config", None) is not None:
                module.generation_config.eos_token_id = None
                module.generation_config.pad_token_id = 0
        return made

    FURTHER[name] = Further(name, build, inputs, vision, layers, note)


# ---- inputs ------------------------------------------------------------------------------------------------


def _prompt(tokens: int, batch: int = 1, padding: int = 0, span: list[int] | None = None) -> dict[str, Tensor]:
    """`tokens` tokens a sample, with `span` (the image) from the eighth one on; sample 0 has left padding."""
    ids = torch.randint(*_TEXT, (batch, tokens))
    mask = torch.ones_like(ids)
    if padding:
        ids[0, :padding] = 0
        mask[0, :padding] = 0
    if span:
        ids[:, 7 : 7 + len(span)] = torch.tensor(span)
    return {"input_ids": ids, "attention_mask": mask}


def _text(seed: int) -> dict[str, Tensor]:
    with _seeded(seed + 1):
        return _prompt(_PROMPT, batch=2, padding=_PADDING)


def _image(
    length: int,
    pixels: tuple[int, ...],
    batch: int = 1,
    padding: int = 0,
    before: tuple[int, ...] = (),
    after: tuple[int, ...] = (),
    extra: Callable[[Tensor], dict[str, Tensor]] | None = None,
    flat: bool = False,
) -> Callable[[int], dict[str, Tensor]]:
    """Inputs with one image of `length` tokens a sample; extra: `input_ids` -> more arguments.

    pixels: shape of a sample's; flat: they are joined along the first dimension, rather than stacked.
    """

    def inputs(seed: int) -> dict[str, Tensor]:
        with _seeded(seed + 1):
            made = _prompt(54 + length, batch, padding, [*before, *[IMAGE] * length, *after])
            shape = (batch * pixels[0], *pixels[1:]) if flat else (batch, *pixels)
            made["pixel_values"] = torch.randn(shape)
        return made | (extra(made["input_ids"]) if extra else {})

    return inputs


def _grid(side: int) -> Callable[[Tensor], dict[str, Tensor]]:
    def extra(ids: Tensor) -> dict[str, Tensor]:
        return {"image_grid_thw": torch.tensor([[1, side, side]] * len(ids)), "mm_token_type_ids": (ids == IMAGE).int()}

    return extra


# ---- configurations ----------------------------------------------------------------------------------------

_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER: dict[str, Any] = _SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

# ---- text --------------------------------------------------------------------------------------------------

_GEMMA2: dict[str, Any] = _DECODER | {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "layer_types": _SLIDING,
    "attn_logit_softcapping": 5.0,  # near the logits here, so leaving it out shows
}
_add(
    "gemma2",
    "Gemma2ForCausalLM",
    lambda: T.Gemma2Config(**_GEMMA2),
    _text,
    f"soft-capped attention logits (5.0) and final logits; sliding window {WINDOW} on layers 0, 2; eager attention "
    "only (no sdpa). Cache: DynamicSlidingWindowLayer at 0, 2, DynamicLayer at 1",
)
_add(
    "gpt-oss",
    "GptOssForCausalLM",
    lambda: T.GptOssConfig(
        **_DECODER,
        head_dim=16,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=_SLIDING,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 1024,
        },
    ),
    _text,
    f"attention sinks (a learnt logit a head joined to the scores); sliding window {WINDOW} on layers 0, 2; yarn RoPE; "
    "mixture of experts; eager attention only (no sdpa). Cache: DynamicSlidingWindowLayer at 0, 2, DynamicLayer at 1",
)
_add(
    "bloom",
    "BloomForCausalLM",
    lambda: T.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=3, n_head=4, **_SPECIAL),
    _text,
    "ALiBi from the mask's cumsum, added by alibi.baddbmm(q, k) and then + causal mask; own attention (softmax, bmm on "
    "[batch * heads, ...]), fused qkv. Cache: DynamicLayer",
)
_add(
    "mpt",
    "MptForCausalLM",
    lambda: T.MptConfig(d_model=64, n_heads=4, n_layers=3, vocab_size=VOCABULARY, use_cache=True, **_SPECIAL),
    _text,
    "ALiBi by distance to the last key, from a constant tensor of max_seq_len that is sliced to the keys' length; own "
    "attention (matmul, softmax, masked_fill). Cache: DynamicLayer",
)


def _falcon(**changes: Any) -> T.FalconConfig:
    return T.FalconConfig(
        **_SPECIAL | {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
        **changes,
    )


_add(
    "falcon",
    "FalconForCausalLM",
    lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    _text,
    "RoPE; grouped queries that are broadcast before the cache, so that 4 heads are cached; sdpa called directly by "
    "the model. Cache: DynamicLayer",
)
_add(
    "falcon-mqa",
    "FalconForCausalLM",
    lambda: _falcon(multi_query=True),
    _text,
    "RoPE; multi-query: a single key and value head is cached ([2, 1, tokens, 16]); sdpa called directly by the model. "
    "Cache: DynamicLayer",
)
_add(
    "falcon-alibi",
    "FalconForCausalLM",
    lambda: _falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True),
    _text,
    "ALiBi from the mask's cumsum, added to the additive causal mask given to sdpa (so the mask is a float one that "
    "differs by head); no RoPE. Cache: DynamicLayer",
)
_add(
    "gpt-neo",
    "GPTNeoForCausalLM",
    lambda: T.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        attention_types=[[["global", "local", "global"], 1]],
        window_size=WINDOW,
        max_position_embeddings=2048,
        **_SPECIAL,
    ),
    _text,
    f"learnt positions; attention without 1/sqrt(d); local attention (window {WINDOW}) on layer 1 through a bool "
    "buffer that is sliced by lengths (torch.where), though its cache is full. Cache: DynamicLayer everywhere",
)
_MLA: dict[str, Any] = _DECODER | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_MLA_NOTE = (
    "MLA: what is cached is the latent, keys [batch, 1, tokens, 32] (kv_lora_rank, normalised) and values "
    "[batch, 1, tokens, 8] (the rotated key part): widths differ, and kv_b_proj expands both after cache.update. "
)
_add(
    "deepseek-v3",
    "DeepseekV3ForCausalLM",
    lambda: T.DeepseekV3Config(
        **_MLA,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    _text,
    _MLA_NOTE + "Dense MLP on layer 0, grouped experts on 1, 2. Cache: DynamicLayer",
)
_add(
    "deepseek-v2",
    "DeepseekV2ForCausalLM",
    lambda: T.DeepseekV2Config(
        **_MLA,
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    _text,
    _MLA_NOTE + "RoPE by complex numbers (torch.polar, view_as_complex). Dense MLP on layer 0, experts on 1, 2. "
    "Cache: DynamicLayer",
)
_add(
    "minicpm3",
    "MiniCPM3ForCausalLM",
    lambda: T.MiniCPM3Config(**_MLA, dim_model_base=32),
    _text,
    _MLA_NOTE + "Scaled embeddings, residuals (scale_depth) and logits. Cache: DynamicLayer",
)
_add(
    "xglm",
    "XGLMForCausalLM",
    lambda: T.XGLMConfig(vocab_size=VOCABULARY, d_model=64, ffn_dim=96, num_layers=3, attention_heads=4, **_SPECIAL),
    _text,
    "sinusoidal positions; own attention on [batch * heads, ...] with bmm and softmax, mask clamped by torch.max; "
    "scaled queries. Cache: DynamicLayer",
)
_add(
    "mistral-sliding",
    "MistralForCausalLM",
    lambda: T.MistralConfig(**_DECODER, sliding_window=64),
    _text,
    "sliding window 64 on every layer, less than the prompt of 80. Cache: DynamicSlidingWindowLayer (63 are kept)",
)
_TROCR: dict[str, Any] = _SPECIAL | {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 2048,
}
_add(
    "trocr",
    "TrOCRForCausalLM",
    lambda: T.TrOCRConfig(**_TROCR, is_decoder=True),
    _text,
    "the decoder alone, so no cross-attention; learnt positions; own attention on [batch * heads, ...] with bmm; "
    "positions do not heed padding. Cache: DynamicLayer",
)


def _trocr_inputs(seed: int) -> dict[str, Tensor]:
    with _seeded(seed + 1):
        return {
            "pixel_values": torch.randn(2, 3, 56, 56),
            "decoder_input_ids": torch.randint(*_TEXT, (2, 60)),
        }


def _trocr_vision() -> T.VisionEncoderDecoderConfig:
    made = T.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        T.ViTConfig(**_ENCODER, image_size=56, patch_size=14), T.TrOCRConfig(**_TROCR, cross_attention_hidden_size=32)
    )
    made.decoder_start_token_id, made.pad_token_id = 1, 0
    return made


_add(
    "trocr-vision",
    "VisionEncoderDecoderModel",
    _trocr_vision,
    _trocr_inputs,
    "encoder-decoder: the image (17 tokens) is seen by cross-attention only, none is in the decoder's sequence; own "
    "attention with bmm. The prompt is decoder_input_ids. Cache: EncoderDecoderCache of two DynamicCache, of "
    "DynamicLayer",
)
_QWEN35: dict[str, Any] = _DECODER | {
    "head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
_add(
    "qwen3.5",
    "Qwen3_5ForCausalLM",
    lambda: T.Qwen3_5TextConfig(**_QWEN35),
    _text,
    "linear attention (gated delta rule with a short convolution) on layers 0, 2, gated full attention with partial "
    "RoPE on layer 1. Cache: LinearAttentionLayer at 0, 2 (conv_states, recurrent_states), DynamicLayer at 1",
)

# ---- vision and language -----------------------------------------------------------------------------------

_SQUARE = (3, 56, 56)  # 16 patches of 14 by 14
_LARGE = (3, 112, 112)  # 64 of them, of which two by two become a token


def _siglip(side: int) -> T.SiglipVisionConfig:
    return T.SiglipVisionConfig(**_ENCODER, image_size=side, patch_size=14, vision_use_head=False)


_add(
    "paligemma2",
    "PaliGemmaForConditionalGeneration",
    lambda: T.PaliGemmaConfig(
        vision_config=_siglip(56),
        text_config=T.Gemma2Config(**_GEMMA2),
        image_token_index=IMAGE,
        vocab_size=VOCABULARY,
        projection_dim=64,
        hidden_size=64,
    ),
    _image(16, _SQUARE, batch=2, padding=_PADDING, extra=lambda ids: {"token_type_ids": torch.zeros_like(ids)}),
    f"Gemma 2's text model: soft-cap 5.0, sliding window {WINDOW} on layers 0, 2, eager attention only; the whole "
    "prompt attends to itself both ways (token_type_ids 0). masked_scatter. Cache: DynamicSlidingWindowLayer at 0, 2, "
    "DynamicLayer at 1",
    vision=16,
)


def _glm4v() -> T.Glm4vConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "image_size": 112,
        "patch_size": 14,
        "out_hidden_size": 64,
        "intermediate_size": 48,
    }
    return T.Glm4vConfig(
        text_config=_DECODER | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=312,
        video_end_token_id=313,
    )


_add(
    "glm4v",
    "Glm4vForConditionalGeneration",
    _glm4v,
    _image(16, (64, 3 * 2 * 14 * 14), 2, _PADDING, (START,), (END,), _grid(8), flat=True),
    "M-RoPE of half of each head; post-attention norms. masked_scatter. Cache: DynamicLayer",
    vision=16,
)


def _ernie() -> T.Ernie4_5_VLMoeConfig:
    rope = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [3, 3, 2]}
    text = _DECODER | {
        "moe_intermediate_size": [32, 32],
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "rope_parameters": rope,
    }
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 14, "intermediate_size": 48}
    return T.Ernie4_5_VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=312,
        video_end_token_id=313,
    )


def _ernie_types(ids: Tensor) -> dict[str, Tensor]:
    made = _grid(8)(ids)
    return made | {"moe_mm_token_type_ids": ((ids == IMAGE) | (ids == START) | (ids == END)).int()}


_add(
    "ernie4.5-vl-moe",
    "Ernie4_5_VLMoeForConditionalGeneration",
    _ernie,
    _image(16, (64, 3 * 14 * 14), 1, 0, (START,), (END,), _ernie_types, flat=True),
    "M-RoPE (height and width interleaved, then time); text and vision tokens go to different experts on layers 1, 2 "
    "(index by a bool mask, so shapes depend on data). masked_scatter. Cache: DynamicLayer",
    vision=16,
)
_add(
    "qwen3.5-vl",
    "Qwen3_5ForConditionalGeneration",
    lambda: T.Qwen3_5Config(
        text_config=_QWEN35,
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    ),
    _image(16, (64, 3 * 2 * 14 * 14), 1, 0, (START,), (END,), _grid(8), flat=True),
    "linear attention on layers 0, 2, gated full attention with interleaved M-RoPE on layer 1. masked_scatter. Cache: "
    "LinearAttentionLayer at 0, 2, DynamicLayer at 1",
    vision=16,
)


def _gemma4(bidirectional: str | None = None, **changes: Any) -> T.Gemma4Config:
    text = _DECODER | {
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": WINDOW,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "use_bidirectional_attention": bidirectional,
    }
    vision = T.Gemma4VisionConfig(
        **_ENCODER, num_key_value_heads=2, head_dim=16, pooling_kernel_size=2, patch_size=8, position_embedding_size=64
    )
    return T.Gemma4Config(
        text_config=T.Gemma4TextConfig(**text | changes),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        boi_token_id=START,
        eoi_token_id=END,
        boa_token_id=312,
        eoa_token_index=313,
    )


def _gemma4_extra(ids: Tensor) -> dict[str, Tensor]:
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    positions = torch.stack([x, y], dim=-1).reshape(1, 64, 2).repeat(len(ids), 1, 1)
    return {"image_position_ids": positions, "mm_token_type_ids": (ids == IMAGE).int()}


def _gemma4_mend(made: nn.Module) -> None:
    # Queries and keys are normalised and their products unscaled, so attention would see one token only.
    for name, parameter in made.named_parameters():
        if "language_model" in name and name.endswith("q_norm.weight"):
            parameter.data *= 0.4


_add(
    "gemma4",
    "Gemma4ForConditionalGeneration",
    lambda: _gemma4(
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    _image(16, (64, 3 * 8 * 8), 1, 0, (START,), (END,), _gemma4_extra),
    f"like E2B: layers 2, 3 have no keys of their own but those of 0, 1; sliding window {WINDOW} on layers 0, 2; heads "
    "of 16 on sliding layers and of 32 on full ones; per-layer embeddings; attention scale 1. masked_scatter. Cache: "
    "DynamicSlidingWindowLayer, DynamicLayer, DummyLayer, DummyLayer (keys None)",
    vision=16,
    layers=4,
    mend=_gemma4_mend,
)
_add(
    "gemma4-k-eq-v",
    "Gemma4ForConditionalGeneration",
    lambda: _gemma4(
        bidirectional="vision",
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    _image(16, (64, 3 * 8 * 8), 1, 0, (START,), (END,), _gemma4_extra),
    f"like 31B: on the full layer 2 values are made from the keys' projection, with 1 head of 32; sliding window "
    f"{WINDOW} on layers 0, 1 with 2 heads of 16; image tokens attend to each other both ways. masked_scatter. Cache: "
    "DynamicSlidingWindowLayer at 0, 1, DynamicLayer at 2",
    vision=16,
    mend=_gemma4_mend,
)


def _lfm2_mend(made: nn.Module) -> None:
    # One layer of attention among convolutions: let it count.
    made.model.language_model.layers[1].self_attn.out_proj.weight.data *= 4.0


_add(
    "lfm2-vl",
    "Lfm2VlForConditionalGeneration",
    lambda: T.Lfm2VlConfig(
        vision_config=T.Siglip2VisionConfig(**_ENCODER, patch_size=8, num_patches=64, vision_use_head=False),
        text_config=T.Lfm2Config(**_DECODER, layer_types=["conv", "full_attention", "conv"]),
        image_token_id=IMAGE,
        projector_hidden_size=48,
    ),
    _image(
        16,
        (64, 3 * 8 * 8),
        extra=lambda ids: {
            "spatial_shapes": torch.tensor([[8, 8]] * len(ids)),
            "pixel_attention_mask": torch.ones(len(ids), 64, dtype=torch.long),
        },
    ),
    "short convolutions on layers 0, 2, full attention on layer 1. masked_scatter. Cache: LinearAttentionLayer at 0, 2 "
    "(conv_states only), DynamicLayer at 1",
    vision=16,
    mend=_lfm2_mend,
)
_LLAMA4: dict[str, Any] = _DECODER | {
    "intermediate_size_mlp": 96,
    "head_dim": 16,
    "num_local_experts": 4,
    "no_rope_layers": [1, 1, 0],
    "attention_chunk_size": WINDOW,
    "moe_layers": [1],
    "floor_scale": 16,
}
_LLAMA4_NOTE = (
    f"chunked attention ({WINDOW}) with complex RoPE and normalised queries and keys on layers 0, 1; layer 2 is full, "
    "without RoPE and with queries scaled by position; experts on layer 1. Where a chunk begins (at multiples of "
    f"{WINDOW}) layers 0, 1 forget all that is cached. Cache: DynamicSlidingWindowLayer at 0, 1, DynamicLayer at 2"
)
_add("llama4", "Llama4ForCausalLM", lambda: T.Llama4TextConfig(**_LLAMA4), _text, _LLAMA4_NOTE)


def _llama4_mend(made: nn.Module) -> None:
    """transformers 5.24's forward fails always: it reads `image_outputs`, which the inner model's output lacks."""
    from transformers.models.llama4.modeling_llama4 import Llama4CausalLMOutputWithPast, Llama4ForCausalLM

    class Inner(Llama4ForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Llama4CausalLMOutputWithPast:
            return Llama4CausalLMOutputWithPast(**super().forward(*args, **kwargs))

    made.language_model.__class__ = Inner


_add(
    "llama4-vl",
    "Llama4ForConditionalGeneration",
    lambda: T.Llama4Config(
        text_config=T.Llama4TextConfig(**_LLAMA4),
        vision_config=T.Llama4VisionConfig(
            **_ENCODER | {"intermediate_size": 4 * 32},
            image_size=112,
            patch_size=14,
            vision_output_dim=64,
            projector_input_dim=64,
            projector_output_dim=64,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    ),
    _image(16, _LARGE, 1, 0, (START,), (END,)),
    _LLAMA4_NOTE + ". masked_scatter. Its language_model is a causal LM with a head (generate is the outer one's), and "
    "it is changed here: without that, transformers 5.24's forward fails",
    vision=16,
    mend=_llama4_mend,
)
_add(
    "idefics3",
    "Idefics3ForConditionalGeneration",
    lambda: T.Idefics3Config(
        vision_config={**_ENCODER, "image_size": 112, "patch_size": 14},
        text_config=T.LlamaConfig(**_DECODER),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    ),
    _image(
        16,
        (1, *_LARGE),
        batch=2,
        padding=_PADDING,
        extra=lambda ids: {"pixel_attention_mask": torch.ones(len(ids), 1, 112, 112, dtype=torch.bool)},
    ),
    "Llama text; pixel_values [batch, images, 3, h, w]; images that are all 0 are dropped by a bool mask. "
    "masked_scatter (inputs_merger). Cache: DynamicLayer",
    vision=16,
)
_add(
    "ovis2",
    "Ovis2ForConditionalGeneration",
    lambda: T.Ovis2Config(
        vision_config={**_ENCODER, "image_size": 112, "patch_size": 14, "vocab_size": 64, "hidden_stride": 2},
        text_config=T.Qwen2Config(**_DECODER),
        image_token_id=IMAGE,
        visual_indicator_token_ids=_INDICATORS,
        vocab_size=VOCABULARY,
        hidden_size=64,
    ),
    _image(16, _LARGE, 1, 0, tuple(_INDICATORS[:1]), tuple(_INDICATORS[1:2])),
    "Qwen2 text; image features by masked_scatter, then the two indicator tokens around them by index assignment "
    "(inputs_embeds[mask] = ..., if mask.any()). Cache: DynamicLayer",
    vision=16,
)
_add(
    "mistral3",
    "Mistral3ForConditionalGeneration",
    lambda: T.Mistral3Config(
        vision_config=T.PixtralVisionConfig(**_ENCODER, image_size=112, patch_size=14),
        text_config=T.MistralConfig(**_DECODER, sliding_window=None),
        image_token_index=IMAGE,
    ),
    _image(
        16, _LARGE, batch=2, padding=_PADDING, extra=lambda ids: {"image_sizes": torch.tensor([[112, 112]] * len(ids))}
    ),
    "Mistral text without a window; Pixtral vision by image_sizes. masked_scatter. Cache: DynamicLayer",
    vision=16,
)
_add(
    "blip2",
    "Blip2ForConditionalGeneration",
    lambda: T.Blip2Config(
        vision_config={**_ENCODER, "image_size": 56, "patch_size": 14},
        qformer_config={**_ENCODER, "num_hidden_layers": 2, "vocab_size": VOCABULARY},
        text_config=T.OPTConfig(
            **_SPECIAL,
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=3,
            ffn_dim=96,
            num_attention_heads=4,
            max_position_embeddings=2048,
            word_embed_proj_dim=64,
        ),
        num_query_tokens=16,
        image_token_index=IMAGE,
        image_text_hidden_size=32,
    ),
    _image(16, _SQUARE),
    "generate() merges the image itself (masked_scatter, no forward of the outer model) and calls "
    "language_model.generate(inputs_embeds=..., input_ids=...): OPT, learnt positions. Cache: DynamicLayer",
    vision=16,
)


def _kosmos2_mend(made: nn.Module) -> None:
    # The image's features are normalised to length 1, and seen by latent queries only: let these tell them apart.
    made.image_to_text_projection.dense.weight.data *= 6.0


_add(
    "kosmos2",
    "Kosmos2ForConditionalGeneration",
    lambda: T.Kosmos2Config(
        vision_config={**_ENCODER, "image_size": 56, "patch_size": 14},
        text_config={
            **_SPECIAL,
            "vocab_size": VOCABULARY,
            "embed_dim": 64,
            "layers": 3,
            "ffn_dim": 96,
            "attention_heads": 4,
            "max_position_embeddings": 2048,
        },
        latent_query_num=16,
    ),
    _image(16, _SQUARE, 1, 0, (START,), (END,), lambda ids: {"image_embeds_position_mask": ids == IMAGE}),
    "generate() encodes the image and calls text_model.generate(image_embeds=..., image_embeds_position_mask=...); "
    "merged by index assignment (inputs_embeds[mask] = ...); sinusoidal positions. "
    "Cache: DynamicLayer",
    vision=16,
    mend=_kosmos2_mend,
)
_add(
    "aya-vision",
    "AyaVisionForConditionalGeneration",
    lambda: T.AyaVisionConfig(
        vision_config=_siglip(112),
        text_config=T.Cohere2Config(
            **_DECODER,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        image_token_index=IMAGE,
    ),
    _image(16, _LARGE, batch=2, padding=_PADDING),
    f"Cohere 2 text: sliding window {WINDOW} with RoPE on layers 0, 1, full attention without positions on layer 2, "
    "attention and MLP in parallel. masked_scatter. Cache: DynamicSlidingWindowLayer at 0, 1, DynamicLayer at 2",
    vision=16,
)
_add(
    "janus",
    "JanusForConditionalGeneration",
    lambda: T.JanusConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "mlp_ratio": 2.0,
            "image_size": 56,
            "patch_size": 14,
            "projection_dim": 64,
            "num_image_tokens": 16,
        },
        text_config=T.LlamaConfig(**_DECODER),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 32,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
        },
        image_token_id=IMAGE,
    ),
    _image(16, _SQUARE),
    "Llama text; generate() is overridden (text mode goes on to GenerationMixin.generate of the same model). "
    "masked_scatter. Cache: DynamicLayer",
    vision=16,
)
_add(
    "deepseek-vl",
    "DeepseekVLForConditionalGeneration",
    lambda: T.DeepseekVLConfig(vision_config=_siglip(56), text_config=T.LlamaConfig(**_DECODER), image_token_id=IMAGE),
    _image(16, _SQUARE),
    "Llama text. masked_scatter. Cache: DynamicLayer",
    vision=16,
)
