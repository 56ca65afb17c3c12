"""Singular values of cached keys and values, per layer and modality: what packing has to work with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnpack_fx import hf
from attnpack_fx.demo.load import Loaded


@dataclass(frozen=True)
class Spectrum:
    """Singular values, largest first and relative to the largest, of one layer's `[tokens, H * D]` matrix.

    part: `"keys"` or `"values"`. modality: `"vision"` or `"text"`. values: `min(tokens, H * D)` numbers.
    """

    layer: int
    part: str
    modality: str
    tokens: int
    values: list[float]


def spectra(loaded: Loaded, inputs: dict[str, Any]) -> list[Spectrum]:
    """Of the dense cache after an eager prefill of the first prompt in `inputs`, padding left out."""
    cache = hf.empty_cache(loaded.model)
    with torch.no_grad():
        loaded.model(**inputs, past_key_values=cache, use_cache=True)
    ids = inputs["input_ids"][:1]
    image = hf.image_positions(loaded.model, ids)[0]
    real = inputs.get("attention_mask", torch.ones_like(ids))[0].bool()
    places = {"vision": image & real, "text": ~image & real}
    found = []
    for layer, pair in enumerate(hf.keys_and_values(cache)):
        for part, tensor in zip(("keys", "values"), pair, strict=True):
            matrix = tensor[0].transpose(0, 1).flatten(1)
            for modality, mask in places.items():
                # Layers that keep a window of the prompt, or attend to something else, have other tokens.
                if mask.any() and len(matrix) == len(mask):
                    found.append(Spectrum(layer, part, modality, int(mask.sum()), _relative(matrix[mask])))
    return found


def _relative(matrix: Tensor) -> list[float]:
    values = torch.linalg.svdvals(matrix.float())
    return (values / values[0].clamp(min=torch.finfo(values.dtype).tiny)).tolist()
