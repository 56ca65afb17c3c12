"""ASAP (arXiv 2603.14549, section 3): attention of vision tokens both ways, similar tokens merged, others salvaged.

The paper's formulas have no heads: what is one number a token here is a mean over query heads.
"""

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.plan import positions
from attnpack_fx.kernels.aten.prune import best, gather_tokens, prunable

#: Least weight of a later vision token in the soft mask, before the logarithm: the paper's epsilon, our value.
SMALLEST = 1e-6


def normalised(raw: Tensor, seen: Tensor) -> Tensor:
    """`(s - s_min) / (s_max - s_min + 1e-6)` over the vision tokens of every row (eq. 3); 0 elsewhere."""
    least = torch.where(seen, raw, torch.inf).amin(1, keepdim=True)
    largest = torch.where(seen, raw, -torch.inf).amax(1, keepdim=True)
    return torch.where(seen, (raw - least) / (largest - least + 1e-6), 0.0)


def bidirectional_scores(
    query: Tensor, key: Tensor, vision: Tensor, mask: Tensor | None, scale: float, strongest: float
) -> tuple[Tensor, Tensor]:
    """See `ops_prune.bidirectional_scores`; one head's `[T, T]` at a time."""
    batch, heads, tokens, _ = query.shape
    real, seen = prunable(vision, mask, (batch, tokens))
    group = heads // key.shape[1]
    queries = torch.where(seen[:, None, :, None], query, 0).float().sum(2).unflatten(1, (-1, group)).sum(2)
    raw = scale / heads * (queries[:, :, None] * key.float()).sum((1, 3))
    soft = (strongest * normalised(raw, seen)).clamp(min=SMALLEST).log()
    causal = torch.ones((tokens, tokens), dtype=torch.bool, device=query.device).tril()
    bias = torch.zeros_like(causal, dtype=torch.float32).masked_fill_(~causal, -torch.inf)
    if mask is not None:
        bias = mask.float() if mask.dtype != torch.bool else torch.zeros_like(mask, dtype=torch.float32)
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        bias = bias.masked_fill(~allowed, -torch.inf)
    bias = bias.expand(batch, bias.shape[-3] if bias.dim() > 2 else 1, tokens, tokens)
    later = seen[:, :, None] & seen[:, None] & ~causal
    attention = torch.zeros_like(raw)
    for head in range(heads):
        own = bias[:, head if bias.shape[1] == heads else 0]
        own = torch.where(later & own.isneginf(), soft[:, None], own)
        scores = scale * query[:, head].float() @ key[:, head // group].float().transpose(1, 2) + own
        # Rows whose every token is masked are padding, and count nothing.
        weights = torch.where(real[:, :, None], torch.softmax(scores, -1), 0.0)
        attention += weights.sum(1) / heads
    return attention, raw


def merged_rows(
    hidden: Tensor,
    attention: Tensor,
    raw: Tensor,
    vision: Tensor,
    mask: Tensor | None,
    most: int,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops_prune.merged_rows`."""
    batch, tokens, _ = hidden.shape
    real, seen = prunable(vision, mask, (batch, tokens))
    kept = best(attention, seen, seen.sum(1).clamp(max=most))
    weight = normalised(raw, seen)
    owner = _owners(hidden, weight, kept, threshold)
    place = torch.arange(tokens, device=hidden.device).expand(batch, tokens)
    absorbed = kept & (owner != place)
    salvaged = best(raw, seen & ~kept, absorbed.sum(1))
    stays = real & ~seen | kept & ~absorbed | salvaged
    group = torch.where(absorbed, owner, torch.where(stays, place, -1))
    return positions(stays), group, weight


def _owners(hidden: Tensor, weight: Tensor, kept: Tensor, threshold: float) -> Tensor:
    """The position of the kept token that each kept token is merged into, itself where into none: int64 `[B, T]`.

    Tokens in descending order of weight, earlier ones first among equals, take the free ones behind them that are
    similar: source sets are disjoint, and who has been taken takes none.
    """
    index = positions(kept)
    batch, count = index.shape
    rows = torch.nn.functional.normalize(gather_tokens(hidden, index, 1).float(), dim=-1)
    similar = (rows @ rows.transpose(1, 2)).clamp(max=1.0) > threshold
    weights = torch.where(index < 0, -torch.inf, weight.gather(1, index.clamp(min=0)))
    order = weights.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=order.device).expand_as(order))
    sample = torch.arange(batch, device=order.device)
    free, owner = index >= 0, torch.arange(count, device=order.device).expand_as(order).clone()
    for turn in range(count):
        taker = order[:, turn]
        taken = similar[sample, taker] & free & (rank > turn) & free[sample, taker][:, None]
        owner = torch.where(taken, taker[:, None], owner)
        free = free & ~taken
    tokens = kept.shape[1]
    found = torch.arange(tokens + 1, device=order.device).repeat(batch, 1)
    found.scatter_(1, index.remainder(tokens + 1), index.clamp(min=0).gather(1, owner))
    return found[:, :tokens]
