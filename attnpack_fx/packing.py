"""Pack a dense key/value pair outside a compiled graph: the same operators, called eagerly."""

from torch import Tensor

from attnpack_fx.held import Held
from attnpack_fx.kernels import ops
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.plan_tokens import asks_for_loss, gain, share_basis
from attnpack_fx.passes.state import TEXT, VISION
from attnpack_fx.placement import Placement
from attnpack_fx.policy import PackPolicy
from attnpack_fx.regrouping import weighed
from attnpack_fx.storing import after, squares_of, store
from attnpack_fx.tail import TailBuffer


def pack(
    key: Tensor,
    value: Tensor,
    policy: PackPolicy,
    *,
    modality: Tensor | None = None,
    real: Tensor | None = None,
    layer: int | None = None,
) -> tuple[PackedTensor, PackedTensor]:
    """Pack one layer's cache, as the compiled graph does at prefill; keys are stored as they are, rotated.

    key, value: `[B, H, T, D]`, head dims may differ; modality: bool `[B or 1, T]`, True for vision, None for all text;
    real: bool `[B or 1, T]`, False for padding, None for none; layer: its number, for policies that ask.

    Raises ValueError for ranks the heads cannot have, and for NaN or Inf in what is packed.
    """
    widths = key.shape[1] * key.shape[3], value.shape[1] * value.shape[3]
    plan = policy.layer(layer, policy.layer_count, *widths, vision=modality is not None)
    stored = {name: how for name in (VISION, TEXT) if (how := plan.of(name)) is not None}
    gains = {name: gain(policy, name, how, widths) for name, how in stored.items()}
    known = modality if VISION in stored else None
    *indices, slot = ops.plan(known, real, key, TEXT in stored, gains.get(VISION, []), gains.get(TEXT, []))
    index = {name: found for name, found in zip((VISION, TEXT), indices, strict=False) if name in stored}
    placement = Placement.from_plan([*index.values(), indices[2]], slot)
    packed = []
    for kind, dense in (("key", key.detach()), ("value", value.detach())):
        squares = dense.float().square().sum((1, 3)) if asks_for_loss(policy, stored.values()) else None
        segments, losses = {}, []
        for name, how in stored.items():
            if index[name].shape[1]:
                columns = getattr(how, kind)
                if share_basis(policy, name):
                    given = policy.basis(layer, name, kind)
                    factors = _together(dense, index[name], columns.rank, policy.basis_tolerance, given)
                else:
                    factors = *ops.compress(dense, index[name], columns.rank), None
                total = None if squares is None else squares_of(squares, index[name])
                segments[name], loss = store(*factors[:2], columns, total, factors[2])
                losses += [] if loss is None else [(name, loss)]
        lease = TailBuffer(ops.take_rows(dense, indices[2], 0)).lease(indices[2].shape[1])
        held = Held(tuple(segments.values()), tuple(segments), placement, losses=tuple(losses))
        packed.append(PackedTensor(held, lease))
    return weighed(packed[0], policy), packed[1]


def _together(
    x: Tensor, index: Tensor, rank: int, tolerance: float, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficient, bases and owner of samples on one basis, which may be given."""
    given = None if given is None else given.to(x.device, x.dtype)
    coefficient, bases, owner = ops.compress_shared(x, index, rank, tolerance, given)
    return coefficient, after(given, bases), owner
