"""What stands between scores and weights: a soft cap, and a softmax with a sink beside the tokens or without."""

import torch
from torch import Tensor


def capped(scores: Tensor, cap: float) -> Tensor:
    """`cap tanh(scores / cap)`, written into `scores`; as they are where cap is 0."""
    return scores.div_(cap).tanh_().mul_(cap) if cap else scores


def attended(scores: Tensor, sinks: Tensor | None, masked: bool) -> Tensor:
    """Softmax of `[B, Hq, Tq, T]`; rows without a token in sight, which there are only where `masked`, are zero.

    sinks: None, or `[B or 1, Hq]`: what takes part in the softmax and is left out of the result.
    """
    if sinks is None:
        return torch._safe_softmax(scores, -1) if masked else scores.softmax(-1)
    more = sinks.to(scores.dtype)[:, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, more], -1).softmax(-1)[..., :-1]
