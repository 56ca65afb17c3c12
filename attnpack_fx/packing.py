"""Pack a dense key/value pair outside a compiled graph: the same operators, called eagerly."""

from torch import Tensor

from attnpack_fx.kernels import ops
from attnpack_fx.kernels.parts import Segment
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.state import TEXT, VISION, Modality
from attnpack_fx.placement import Placement
from attnpack_fx.policy import PackPolicy
from attnpack_fx.tail import TailBuffer


def pack(
    key: Tensor,
    value: Tensor,
    policy: PackPolicy,
    *,
    modality: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[PackedTensor, PackedTensor]:
    """Pack one layer's cache, as the compiled graph does at prefill.

    key, value: `[B, H, T, D]`, head dims may differ; modality: bool `[B or 1, T]`, True for vision, None for all text;
    real: bool `[B or 1, T]`, False for padding, None for none.

    Raises ValueError for ranks the heads cannot have, and for NaN or Inf in what is packed.
    """
    widths = key.shape[1] * key.shape[3], value.shape[1] * value.shape[3]
    ranks: dict[Modality, tuple[int, int]] = {}
    for name in (VISION, TEXT):
        chosen = policy.ranks(name, *widths) if name == TEXT or modality is not None else None
        if chosen is not None:
            ranks[name] = chosen
    gains = {name: [] if policy.lossless(name) else [*pair, *widths] for name, pair in ranks.items()}
    known = modality if VISION in ranks else None
    *indices, slot = ops.plan(known, real, key, TEXT in ranks, gains.get(VISION, []), gains.get(TEXT, []))
    index = {name: found for name, found in zip((VISION, TEXT), indices, strict=False) if name in ranks}
    placement = Placement.from_plan([*index.values(), indices[2]], slot)
    packed = []
    for number, dense in enumerate((key.detach(), value.detach())):
        held = {
            name: Segment(*ops.compress(dense, index[name], pair[number]))
            for name, pair in ranks.items()
            if index[name].shape[1]
        }
        rows = ops.take_rows(dense, indices[2], 0)
        lease = TailBuffer(rows).lease(indices[2].shape[1])
        packed.append(PackedTensor(tuple(held.values()), tuple(held), lease, placement))
    return packed[0], packed[1]
