"""Families that the grid does not run: each layer is packed, or a reason is given; the text is eager's at full rank."""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attnpack_fx
from attnpack_fx import AttnpackWarning, PackedTensor, hf
from tests.acceptance.further import FURTHER

GENERATE: dict[str, Any] = {
    "max_new_tokens": 8,
    "min_new_tokens": 8,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}
#: Largest difference of a logit, as a part of the largest logit.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Expected:
    """packed: numbers of the layers whose keys and values are packed. reason: a word of why others are dense."""

    packed: tuple[int, ...] = (0, 1, 2)
    reason: str | None = None


ALL = Expected()
LATENT = Expected((), "multi-head latent attention")
EXPECTED = {
    "gemma2": ALL,
    "gpt-oss": ALL,
    "bloom": ALL,
    "mpt": ALL,
    "falcon": ALL,
    "falcon-mqa": ALL,
    "falcon-alibi": ALL,
    "gpt-neo": ALL,
    "deepseek-v3": LATENT,
    "deepseek-v2": LATENT,
    "minicpm3": LATENT,
    "xglm": ALL,
    "mistral-sliding": ALL,
    "trocr": ALL,
    "trocr-vision": Expected(reason="cross-attention"),
    "qwen3.5": Expected((1,)),  # the others are linear attention, which keeps no keys
    "paligemma2": ALL,
    "glm4v": ALL,
    "ernie4.5-vl-moe": ALL,
    "qwen3.5-vl": Expected((1,)),
    "gemma4": Expected((0, 1)),  # the last two read what the first two keep
    "gemma4-k-eq-v": ALL,
    "lfm2-vl": Expected((1,)),
    "llama4": ALL,
    "llama4-vl": ALL,
    "idefics3": ALL,
    "ovis2": ALL,
    "mistral3": ALL,
    "blip2": ALL,
    "kosmos2": ALL,
    "aya-vision": ALL,
    "janus": ALL,
    "deepseek-vl": ALL,
}


def test_every_family_is_expected() -> None:
    assert EXPECTED.keys() == FURTHER.keys()


def _check(name: str) -> None:
    family, expected = FURTHER[name], EXPECTED[name]
    model, inputs = family.build(), family.inputs(0)
    eager = model.generate(**inputs, **GENERATE)
    attnpack_fx.compile(model, vision_rank="full", text_rank="full")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = model.generate(**inputs, **GENERATE)
    assert torch.equal(made.sequences, eager.sequences)
    logits, dense = torch.stack(made.logits), torch.stack(eager.logits)
    assert (logits - dense).abs().max() <= TOLERANCE * dense.abs().max()

    keys = {
        number: layer.keys
        for number, layer in enumerate(hf.self_attention_layers(hf.cache_of(made)))
        if isinstance(getattr(layer, "keys", None), PackedTensor)
    }
    assert tuple(keys) == expected.packed
    # Layers with a sliding window hold those of the newest tokens alone.
    longest = max((key.shape[2] for key in keys.values()), default=0)
    assert all(key.tokens.get("vision", 0) == family.vision for key in keys.values() if key.shape[2] == longest)
    told = [str(each.message) for each in caught if issubclass(each.category, AttnpackWarning)]
    assert bool(told) == (expected.reason is not None)
    assert all(expected.reason in text for text in told)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_packed_or_reported(name: str, without_inductor: None) -> None:
    _check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bloom", "idefics3"])
def test_through_inductor(name: str, fresh_dynamo: None) -> None:
    """One of each kind of graph that the families of the grid do not have."""
    _check(name)
