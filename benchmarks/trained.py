"""The trained models of `benchmarks/assets`, by name, and what their inputs are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attnpack_fx.demo.load import Loaded, load

ASSETS = Path(__file__).parent / "assets"
#: Name: what is said of its architecture in tables.
MODELS = {
    "digits-llava": "LLaVA: CLIP and Llama, 4 layers, multi-head attention (4 heads of 64), one-dimensional RoPE",
    "digits-qwen3-vl": "Qwen3-VL, 4 layers, grouped-query attention (8 query, 2 KV heads of 64), interleaved M-RoPE",
}


def load_trained(name: str, dtype: str) -> Loaded:
    """A model of `MODELS` in eval mode, with what prepares its prompts. Raises ValueError for another name."""
    if name not in MODELS:
        raise ValueError(f"model: got {name!r}, expected one of {', '.join(MODELS)}")
    folder = ASSETS / name
    if (folder / "preprocessor_config.json").exists():
        return load(str(folder), dtype)
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    processor = GridProcessor(AutoTokenizer.from_pretrained(folder), model.config)
    return Loaded(str(folder), model, processor, vision=True)


class GridProcessor:
    """What `Qwen3VLProcessor` does with text and still images; that one needs torchvision, for videos.

    Prompts hold one image token for each image, and must be equally long.
    """

    mean, std = 0.2, 0.3

    def __init__(self, tokenizer: Any, config: Any) -> None:
        from transformers import Qwen2VLImageProcessorPil

        vision = config.vision_config
        self.tokenizer = tokenizer
        self.image_token = tokenizer.image_token
        self.image_token_id = config.image_token_id
        self._merged = vision.spatial_merge_size**2
        self._images = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            do_resize=False,
            image_mean=[self.mean] * 3,
            image_std=[self.std] * 3,
        )

    def __call__(self, text: Sequence[str], images: Sequence[Sequence[Any]], return_tensors: str = "pt") -> Any:
        from transformers import BatchFeature

        pixels = self._images([image for group in images for image in group], return_tensors=return_tensors)
        grids = iter((pixels["image_grid_thw"].prod(1) // self._merged).tolist())
        parts = [each.split(self.image_token) for each in text]
        expanded = ["".join(self._expanded(part, grids)) for part in parts]
        found = self.tokenizer(expanded, return_tensors=return_tensors)
        ids = found["input_ids"]
        kinds = (ids == self.image_token_id).int()
        return BatchFeature({**found, **pixels, "mm_token_type_ids": kinds})

    def _expanded(self, parts: Sequence[str], grids: Any) -> list[str]:
        found = [parts[0]]
        for part in parts[1:]:
            found += [f" {self.image_token}" * next(grids), part]
        return found

    def batch_decode(self, *arguments: Any, **options: Any) -> Any:
        return self.tokenizer.batch_decode(*arguments, **options)
