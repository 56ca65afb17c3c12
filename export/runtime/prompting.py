"""Prompts as the steps take them: ids, the features of their images, the positions of their tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnpack_fx.export.layout import Layout
from attnpack_fx.export.manifest import Manifest
from attnpack_fx.export.runtime.planning import mrope_positions
from attnpack_fx.export.runtime.session import Session
from attnpack_fx.export.signature import ArtefactError


def as_tensor(name: str, value: Any) -> Tensor:
    """What a processor makes as a tensor: of PyTorch, of NumPy, or in lists."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArtefactError(
            f"generate: {name}: got {type(value).__name__}, which is no tensor ({error}); expected one of PyTorch or "
            'NumPy, e.g. processor(..., return_tensors="pt")'
        ) from None


@dataclass(frozen=True)
class Images:
    """What is known of a prompt's images; arguments of `PackedGenerator.generate`.

    cut: grids and sizes of images, by name, as the processor makes them.
    """

    pixel_values: Tensor | None
    features: Tensor | Sequence[Tensor] | None
    cut: Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Prompt:
    """ids, mask: int64 `[B, T]`; image: bool `[B, T]`, tokens that stand for images; positions: int64 `[B, T]`, or
    `[3, B, T]`; features: what prefill takes for images, by name.
    """

    ids: Tensor
    mask: Tensor
    image: Tensor
    positions: Tensor
    features: dict[str, Tensor]

    @property
    def offset(self) -> Tensor:
        """Where the first generated token stands, int64 `[B, 1]`."""
        highest = self.positions if self.positions.dim() == 2 else self.positions.amax(0)
        return highest.masked_fill(self.mask == 0, 0).amax(1, keepdim=True) + 1


class Prompting:
    """Makes prompts of what processors make, for one artefact. Raises `ArtefactError` for what does not fit it."""

    def __init__(self, manifest: Manifest, layout: Layout, vision: Session | None) -> None:
        self._manifest, self._layout, self._vision = manifest, layout, vision
        self._image_tokens = torch.tensor(manifest.model["image_tokens"], dtype=torch.int64)

    def prompt(self, ids: Tensor, mask: Tensor | None, images: Images, positions: Tensor | None) -> Prompt:
        ids = ids.cpu().long()
        mask = torch.ones_like(ids) if mask is None else mask.cpu().long()
        if ids.dim() != 2 or mask.shape != ids.shape or ids.numel() < 1:
            raise ArtefactError(
                f"generate: got input_ids {list(ids.shape)} and attention_mask {list(mask.shape)}, expected two [B, T] "
                "of at least one prompt and token"
            )
        self._check_ids(ids)
        if bool((mask[:, -1] == 0).any()):
            raise ArtefactError("generate: attention_mask: got padding behind a prompt, expected it before (left)")
        image = torch.isin(ids, self._image_tokens)
        features = self._features(int(image.sum()), images)
        if positions is None:
            positions = self._positions(ids, mask > 0, image, images.cut.get("image_grid_thw"))
        return Prompt(ids, mask, image, positions.cpu().long(), features)

    def _check_ids(self, ids: Tensor) -> None:
        """An image's id need not be in the vocabulary; any other is looked up there."""
        vocabulary = int(self._manifest.model["vocabulary"])
        wrong = ((ids < 0) | (ids >= vocabulary)) & ~torch.isin(ids, self._image_tokens)
        if bool(wrong.any()):
            raise ArtefactError(
                f"generate: input_ids: got {int(ids[wrong][0])}, expected ids from 0 to {vocabulary - 1}, the model's "
                "vocabulary; pad with the pad token, and 0 in attention_mask"
            )

    def _features(self, count: int, images: Images) -> dict[str, Tensor]:
        """What prefill takes for so many image tokens."""
        names = [spec.name for spec in self._manifest.steps["prefill"].inputs if "features" in spec.name]
        pixels, given = images.pixel_values, images.features
        if not names:
            if pixels is not None or given is not None:
                raise ArtefactError("generate: got images, but this model takes text alone")
            return {}
        if given is not None:
            made = [given] if isinstance(given, Tensor) else list(given)
        elif pixels is not None:
            if self._vision is None:
                raise ArtefactError(
                    "generate: pixel_values: this artefact has no vision step, as it was exported without an example "
                    "with images; give image_features, or export again with example=processor(...)"
                )
            self._check_images(images.cut)
            dtype = self._vision.step.inputs[0].dtype
            made = list(self._vision.run({"pixel_values": pixels.to(dtype)}).values())
        else:
            facts = self._manifest.model
            made = [torch.zeros((0, facts["hidden"]), dtype=self._layout.dtype) for _ in names]
        if len(made) != len(names):
            raise ArtefactError(f"generate: image_features: got {len(made)} tensors, expected {len(names)}: {names}")
        if any(each.shape[0] != count for each in made):
            raise ArtefactError(
                f"generate: got {made[0].shape[0]} features of images for {count} image tokens in input_ids; give the "
                "pixels that belong to the prompt"
            )
        return dict(zip(names, made, strict=True))

    def _check_images(self, cut: Mapping[str, Tensor | None]) -> None:
        """Whether images are cut as those that the vision step was made with."""
        for name, expected in self._manifest.model.get("images", {}).items():
            found = cut.get(name)
            got = None if found is None else found.tolist()
            if got != expected:
                raise ArtefactError(
                    f"generate: {name}: got {got}, expected {expected}, for which the vision step was exported; give "
                    "image_features=attnpack_fx.export.features(model, inputs), or export again with such an example"
                )

    def _positions(self, ids: Tensor, real: Tensor, image: Tensor, grids: Tensor | None) -> Tensor:
        plain = (real.long().cumsum(1) - 1).clamp(min=0)
        if self._layout.axes == 1:
            return plain
        image = image & real
        if not bool(image.any()):
            return plain[None].expand(self._layout.axes, -1, -1).contiguous()
        if grids is None:
            raise ArtefactError(
                "generate: this model's positions depend on the grid of every image: give image_grid_thw, or "
                "position_ids [3, B, T]"
            )
        return mrope_positions(ids, real, image, grids, int(self._manifest.model["merge"]))
