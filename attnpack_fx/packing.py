"""Pack a dense key/value pair outside a compiled graph: the same operators, called eagerly."""

import torch
from torch import Tensor

from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.kernels import ops
from attnpack_fx.maintenance import maintain
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.asks import asks_for_modality, heads_apart, moves_tokens, observation
from attnpack_fx.passes.plan_tokens import asks_for_loss, gain, share_basis
from attnpack_fx.passes.state import TEXT, VISION
from attnpack_fx.passes.storage import Columns
from attnpack_fx.placement import Placement
from attnpack_fx.policy import PackPolicy
from attnpack_fx.regrouping import weighed
from attnpack_fx.storing import Factored, assemble


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

    Of the policy's methods those act that need no queries and no other layer. Raises ValueError for what is no layer of
    a cache, for ranks the heads cannot have, and for NaN or Inf in what is packed; NotImplementedError for methods that
    go by attention.
    """
    fresh = fresh_layer(key, value, policy, modality=modality, real=real, layer=layer)
    maintain([fresh], policy)
    return fresh.key, fresh.value


def fresh_layer(
    key: Tensor, value: Tensor, policy: PackPolicy, *, modality: Tensor | None, real: Tensor | None, layer: int | None
) -> CachedLayer:
    """One layer packed, before methods act on it; arguments and errors as in `pack`."""
    _check(key, value, policy, layer)
    modality, real = (_checked_mask(name, mask, key) for name, mask in (("modality", modality), ("real", real)))
    if observation(policy) is not None:
        names = ", ".join(method.name for method in policy.passes if method.observes)
        raise NotImplementedError(
            f"pack: got a policy with {names}, which goes by what queries attend to, and there are none here; "
            "compile the model with the policy, or use StreamingLLM or RandomEviction"
        )
    widths = key.shape[1] * key.shape[3], value.shape[1] * value.shape[3]
    plan = policy.layer(layer, policy.layer_count, *widths, vision=modality is not None, rotary=False)
    stored = {name: how for name in (VISION, TEXT) if (how := plan.of(name)) is not None}
    gains = {name: gain(policy, name, how, widths) for name, how in stored.items()}
    known = modality if VISION in stored else None
    *indices, slot = ops.plan(known, real, key, TEXT in stored, gains.get(VISION, []), gains.get(TEXT, []))
    index = {name: found for name, found in zip((VISION, TEXT), indices, strict=False) if name in stored}
    vision = modality.expand(slot.shape) & (slot >= 0) if modality is not None and asks_for_modality(policy) else None
    placement = Placement.from_plan([*index.values(), indices[2]], slot, vision, moves=moves_tokens(policy))
    heads = key.shape[1] if heads_apart(policy, bool(stored)) else 0
    packed = []
    for kind, dense in (("key", key.detach()), ("value", value.detach())):
        factored = {}
        for name, how in stored.items():
            columns, places = getattr(how, kind), index[name]
            if places.shape[1] and share_basis(policy, name):
                factored[name] = _together(dense, places, columns, policy, policy.basis(layer, name, kind))
            elif places.shape[1]:
                coefficient, basis = ops.compress(dense, places, columns.rank)
                factored[name] = Factored(coefficient, basis, columns, places)
        squares = dense.float().square().sum((1, 3)) if asks_for_loss(policy, stored.values()) else None
        rows = ops.take_rows(dense, indices[2], 0)
        packed.append(assemble(factored, rows, placement, squares=squares, heads=heads))
    skipped = bool(policy.passes) and policy.skips(layer, policy.layer_count)
    return CachedLayer(layer, weighed(packed[0], policy), packed[1], key.shape[2], prefill=True, skipped=skipped)


def _check(key: Tensor, value: Tensor, policy: PackPolicy, layer: int | None) -> None:
    if not isinstance(policy, PackPolicy):
        raise ValueError(f"pack: policy: got {type(policy).__name__}, expected a PackPolicy, e.g. PackPolicy()")
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
        raise ValueError(f"pack: layer: got {layer!r}, expected the layer's number, from 0, or None")
    for name, x in (("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"pack: {name}: got {got}, expected a floating-point tensor [batch, heads, tokens, dim]")
    if (*key.shape[:3], key.dtype, key.device) != (*value.shape[:3], value.dtype, value.device):
        got = " and ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in (key, value))
        raise ValueError(
            f"pack: key and value: got {got}, expected the same batch, heads, tokens, dtype and device; only head dims "
            "may differ"
        )


def _checked_mask(name: str, mask: Tensor | None, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    batch, _, tokens, _ = key.shape
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape not in ((batch, tokens), (1, tokens)):
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"pack: {name}: got {got}, expected a bool tensor [{batch}, {tokens}] or [1, {tokens}]")
    return mask


def _together(x: Tensor, index: Tensor, columns: Columns, policy: PackPolicy, given: Tensor | None) -> Factored:
    """Samples on one basis, which may be given."""
    given = None if given is None else given.to(x.device, x.dtype)
    coefficient, bases, owner = ops.compress_shared(x, index, columns.rank, policy.basis_tolerance, given)
    return Factored(coefficient, bases, columns, index, owner, given)
