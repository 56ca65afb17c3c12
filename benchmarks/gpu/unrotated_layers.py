"""One layer's packed cache with keys before rotary embedding, as `PackPolicy()` stores it: keys of half the rank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnpack_fx.kernels.parts import Angles, PackedParts
from benchmarks.gpu.layers import Layout, PackedLayer

#: Most tokens of an image, of which a prompt has as many as fill it, and frequencies of the models' rotary embedding.
_IMAGE, _BASE = 1024, 1e6


@dataclass(frozen=True)
class UnrotatedLayer:
    """A packed layer whose keys are rotated when they are attended to, and by what.

    cos, sin: `[1, P, D / 2]` of every packed token, or rows of tables that `axes`, int64 `[1, A, N]`, chooses.
    """

    packed: PackedLayer
    cos: Tensor
    sin: Tensor
    axes: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and angles, all of which one attention reads."""
        angles = (self.cos, self.sin) if self.axes is None else (self.cos, self.sin, self.axes)
        return self.packed.nbytes + sum(each.nbytes for each in angles)

    @property
    def query(self) -> Tensor:
        return self.packed.query

    @property
    def parts(self) -> tuple[PackedParts[Tensor], PackedParts[Tensor]]:
        """Keys and values."""
        keys, values = self.packed.parts
        return replace(keys, angles=Angles(self.cos, self.sin, self.axes, False)), values

    def expected(self, rows: Sequence[tuple[int, int]]) -> Tensor:
        """As that of `PackedLayer`."""
        cos, sin = (
            each[0].double() if self.axes is None else each[0].double()[self.axes[0]].sum(0)
            for each in (self.cos, self.sin)
        )

        def turned(keys: Tensor) -> Tensor:
            first, second = keys.chunk(2, 1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], 1)

        return self.packed.expected(rows, turned)


def unrotated(layer: PackedLayer, layout: Layout, key_rank: int) -> UnrotatedLayer:
    """The same numbers as keys before rotary embedding, of the first ranks, with angles like those of the model."""
    (keys, values), (key_basis, value_basis) = layer.coefficients, layer.bases
    scale = (keys.shape[2] / key_rank) ** 0.5
    fewer = replace(
        layer,
        coefficients=(keys[..., :key_rank].contiguous(), values),
        bases=((key_basis[:, :, :key_rank] * scale).to(keys.dtype), value_basis),
    )
    tokens, pairs, device = keys.shape[1], layout.head_dim // 2, keys.device
    frequencies = _BASE ** -(torch.arange(pairs, device=device) / pairs)
    number = torch.arange(tokens, device=device)
    if not layout.axes:
        angles = number[:, None] * frequencies
        return UnrotatedLayer(fewer, *(each(angles)[None].to(keys.dtype) for each in (torch.cos, torch.sin)), None)
    images = -(-tokens // _IMAGE)
    each_has = -(-tokens // images)
    side = next(size for size in range(1, _IMAGE) if size**2 >= each_has)
    image, place = number // each_has, number % each_has
    # Time, rows and columns, each with a table of its own; an image begins where the one before ends.
    starts, every = torch.arange(images, device=device) * side, torch.arange(images * side, device=device)
    position = torch.cat([starts, every, every])
    axes = torch.stack([image, images + image * side + place // side, images + (images + image) * side + place % side])
    owner = torch.arange(pairs, device=device) * 8 // pairs  # a quarter of the pairs, and three eighths twice
    axis = (owner >= 2).int() + (owner >= 5).int()
    row_axis = torch.cat([torch.full_like(starts, 0), torch.full_like(every, 1), torch.full_like(every, 2)])
    mine = row_axis[:, None] == axis
    angles = position[:, None] * frequencies
    cos, sin = (torch.where(mine, each(angles), 0.0)[None].to(keys.dtype) for each in (torch.cos, torch.sin))
    return UnrotatedLayer(fewer, cos, sin, axes[None].contiguous())
