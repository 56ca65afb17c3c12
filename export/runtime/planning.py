"""Which token of a prompt goes where: what `attnpack::plan` decides in a compiled graph, decided by the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnpack_fx.export.layout import Layout, Modality
from attnpack_fx.export.signature import ArtefactError
from attnpack_fx.kernels import ops
from attnpack_fx.kernels.aten.plan import saves_memory
from attnpack_fx.passes.plan_tokens import gain
from attnpack_fx.policy import PackPolicy


@dataclass(frozen=True)
class Plan:
    """Indices of tokens, int64 `[B, n]` with filler -1, by modality, and of those that stay, under `"prompt"`."""

    index: dict[str, Tensor]

    def masks(self) -> dict[str, Tensor]:
        return {f"{name}_mask": (index >= 0).long() for name, index in self.index.items()}

    def positions(self, positions: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Of the tokens of some modalities; positions: `[B, T]` or `[3, B, T]`."""
        found = {}
        for name in names:
            index = self.index[name].clamp(min=0)
            if positions.dim() == 3:
                index = index[None].expand(positions.shape[0], -1, -1)
            found[f"{name}_position_ids"] = positions.gather(-1, index)
        return found


def plan(policy: PackPolicy, layout: Layout, vision: Tensor, real: Tensor) -> Plan:
    """vision, real: bool `[B, T]`, which tokens stand for images, and which are no padding.

    A modality is packed where that takes less memory in at least half of the layers that pack it; vision tokens that
    are not go where text goes.
    """
    seen = vision & real
    apart = _worth(policy, layout, "vision", int(seen.sum(1).max()))
    rest = real & ~vision if apart else real
    text = _worth(policy, layout, "text", int(rest.sum(1).max()))
    like = real.new_empty((real.shape[0], 1, real.shape[1], 1))
    *indices, _ = ops.plan(vision if apart else None, real, like, text, [], [])
    found = dict(zip(("vision", "text", "prompt"), indices, strict=True))
    return Plan({name: found[name] for name in (*layout.modalities, "prompt")})


def _worth(policy: PackPolicy, layout: Layout, modality: Modality, tokens: int) -> bool:
    if modality not in layout.modalities:
        return False
    widths = layout.heads * layout.key_dim, layout.heads * layout.value_dim
    packing = [how for layer in layout.plans if (how := layer.of(modality)) is not None]
    saving = [saves_memory(tokens, gain(policy, modality, how, widths)) for how in packing]
    return 2 * sum(saving) >= len(saving)


def mrope_positions(ids: Tensor, real: Tensor, image: Tensor, grids: Tensor, merge: int) -> Tensor:
    """Positions `[3, B, T]` of prompts with images, as the Qwen-VL line has them: time, height and width of patches.

    image: bool `[B, T]`; grids: int `[images, 3]`, patches before `merge` of them in each direction are merged. Raises
    `ArtefactError` where these are not the grids of the prompts' images.
    """
    if grids.dim() != 2 or grids.shape[1] != 3:
        raise ArtefactError(f"image_grid_thw: got {list(grids.shape)}, expected [images, 3]")
    found = torch.zeros((3, *ids.shape), dtype=torch.int64)
    remaining = iter(grids.tolist())
    for sample in range(ids.shape[0]):
        place, position = 0, 0
        places = real[sample].nonzero().flatten().tolist()
        while place < len(places):
            if not image[sample, places[place]]:
                found[:, sample, places[place]] = position
                place, position = place + 1, position + 1
                continue
            time, height, width = next(remaining, (0, 0, 0))
            height, width = height // merge, width // merge
            axes = torch.meshgrid(*map(torch.arange, (time, height, width)), indexing="ij")
            count = time * height * width
            if not count or int(image[sample, places[place : place + count]].sum()) < count:
                raise _other_images(grids, image)
            found[:, sample, places[place : place + count]] = torch.stack([axis.flatten() for axis in axes]) + position
            place, position = place + count, position + max(time, height, width)
    if next(remaining, None) is not None:
        raise _other_images(grids, image)
    return found


def _other_images(grids: Tensor, image: Tensor) -> ArtefactError:
    return ArtefactError(
        f"image_grid_thw: got {grids.tolist()}, which are not the images of {int(image.sum())} image tokens in "
        "input_ids; give the processor's, for the same prompts"
    )
