"""Operators that tell the newest queries of a call apart: what drafts have added can be taken back when they go.

As `ops.py`, of which this is a part that every device runs by ATen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnpack_fx.kernels import aten
from attnpack_fx.kernels.flat import unflatten_pair
from attnpack_fx.kernels.no_gradient import refuse_gradient
from attnpack_fx.kernels.ops import no_gradients, no_part_in_training
from attnpack_fx.kernels.parts import NEWEST
from attnpack_fx.kernels.registering import LIBRARY, fake, operator


@operator()
def attention_each(
    query: Tensor,
    packed: Sequence[Tensor],
    key: Sequence[int],
    value: Sequence[int],
    length: int,
    mask: Tensor | None,
    scale: float,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_weights` of several queries, of the newest each by itself: what drafts take back when they go.

    Arguments and first result as in `attention`; the second fp32 `[B, 1 + n, slots]`, n the least of `NEWEST` and Tq:
    weights averaged over query heads, first the sum of those of older queries, then of the newest n each, in order.
    """
    parts = unflatten_pair(packed, key, value, length)
    return aten.attention(query, *parts, mask, scale, cap, sinks, weights=True, each=NEWEST)


@fake("attention_each")
def _(query, packed, key, value, length, *_):
    keys, values = unflatten_pair(packed, key, value, length)
    out = query.new_empty((*query.shape[:3], values.tail.shape[-1]))
    rows = 1 + torch.sym_min(query.shape[2], NEWEST)
    return out, query.new_empty((query.shape[0], rows, keys.packed + length), dtype=torch.float32)


refuse_gradient("attention_each")


@operator()
def observe_newest(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    pivotal: bool,
    together: bool,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """What `observe` sums, of each of the newest queries of a prompt by itself.

    query, key, mask, scale, is_causal, cap, sinks: as in `observe`; pivotal: 1 where it gives a token A >= 1 / t, else
    0, instead of the weight A itself; together: with A averaged over all query heads.
    Returns fp32 `[B, H, n, T]`, with `together` `[B, 1, n, T]`, n the least of `NEWEST` and Tq, queries in order.
    """
    return aten.observe_newest(query, key, mask, scale, is_causal, pivotal, together, NEWEST, cap, sinks)


@fake("observe_newest")
def _(query, key, mask, scale, is_causal, pivotal, together, *_):
    heads = 1 if together else key.shape[1]
    rows = torch.sym_min(query.shape[2], NEWEST)
    return query.new_empty((key.shape[0], heads, rows, key.shape[2]), dtype=torch.float32)


torch.library.register_autograd(
    "attnpack::observe_newest", no_gradients, setup_context=no_part_in_training, lib=LIBRARY
)
