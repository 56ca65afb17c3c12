"""Fewer tokens from a decoder layer on: which rows stay, and moving them out of and back into all rows.

`rows` is int64 `[B, T']`, logical positions in ascending order, filled up at the end of a row with -1. A filler row is
a copy of its sample's last row: finite, behind every real row, so that causal attention does not see it.
"""

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.plan import positions


def real_tokens(mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Bool `[B, T]`: tokens that some query may attend to. What none may is padding."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = allowed.any(0, keepdim=True) if mask.dim() == 2 else allowed.any(2).any(1)
    return seen.expand(shape)


def prunable(vision: Tensor, mask: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Bool `[B, T]` each: tokens that are no padding, and those of them that are vision tokens, the last one apart."""
    real = real_tokens(mask, shape, vision.device)
    later = real.flip(1).cumsum(1).flip(1)
    return real, vision.expand(shape) & real & (later > 1)


def last_row_scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `ops_prune.last_row_scores`."""
    batch, _, tokens, _ = query.shape
    heads = key.shape[1]
    real = real_tokens(mask, (batch, tokens), query.device)
    last = torch.where(real, torch.arange(tokens, device=query.device), 0).amax(1)
    sample = torch.arange(batch, device=query.device)
    rows = query[sample, :, last].float().unflatten(1, (heads, -1))
    scores = scale * rows @ key.float().transpose(2, 3)
    scores = scores.flatten(1, 2)
    if mask is not None:
        full = mask.expand(batch, mask.shape[-3] if mask.dim() > 2 else 1, tokens, tokens)
        scores = _masked(scores, full[sample, :, last])
    return torch.softmax(scores, -1).mean(1)


def kept_rows(scores: Tensor, vision: Tensor, mask: Tensor | None, share: float) -> Tensor:
    """See `ops_prune.kept_rows`."""
    batch, tokens = scores.shape
    real, seen = prunable(vision, mask, (batch, tokens))
    count = (seen.sum(1).double() * share).round().long()
    return positions(real & ~seen | best(scores, seen, count))


def best(scores: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """The `count` `[B]` candidates of highest score in every row, earlier ones first among equals: bool `[B, T]`."""
    ranked = torch.where(candidates, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(ranked)
    rank.scatter_(1, ranked, torch.arange(scores.shape[1], device=scores.device).expand_as(ranked))
    return candidates & (rank < count[:, None])


def filled(rows: Tensor) -> Tensor:
    """`rows` with each filler replaced by its sample's last row (0 where it has none)."""
    if rows.shape[1] == 0:
        return rows
    return torch.where(rows < 0, rows.amax(1, keepdim=True).clamp(min=0), rows)


def gather_tokens(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """See `ops_prune.gather_tokens`."""
    batch, kept = rows.shape
    shape = [1] * x.dim()
    shape[0], shape[dim] = batch, kept
    index = filled(rows).view(shape)
    sizes = list(x.shape)
    sizes[0] = batch
    return x.expand(sizes).gather(dim, index.expand([*sizes[:dim], kept, *sizes[dim + 1 :]]))


def gather_mask(mask: Tensor, rows: Tensor) -> Tensor:
    """See `ops_prune.gather_mask`."""
    if mask.dim() == 2:
        mask = mask[None, None]
    if mask.shape[2] != 1:
        mask = gather_tokens(mask, rows, 2)
    chosen = gather_tokens(mask, rows, 3)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return chosen.masked_fill_((rows < 0)[:, None, None], hidden)


def scatter_tokens(full: Tensor, rows: Tensor, part: Tensor) -> Tensor:
    """See `ops_prune.scatter_tokens`."""
    # Filler writes to an extra last row, which is cut off.
    out = torch.cat([full, full.new_zeros((full.shape[0], 1, full.shape[2]))], 1)
    places = torch.where(rows < 0, full.shape[1], rows)
    out.scatter_(1, places[:, :, None].expand_as(part), part)
    return out[:, : full.shape[1]].contiguous()


def random_scores(like: Tensor, seed: int) -> Tensor:
    """See `ops_prune.random_scores`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(like.shape, generator=generator).to(like.device)


def merge_tokens(hidden: Tensor, rows: Tensor, group: Tensor, weight: Tensor) -> Tensor:
    """See `ops_prune.merge_tokens`."""
    batch, tokens, width = hidden.shape
    places = torch.where(group < 0, tokens, group)
    weights = torch.where(group < 0, 0.0, weight.float())
    sums = hidden.new_zeros((batch, tokens + 1, width), dtype=torch.float32)
    weighted = torch.where(group[..., None] < 0, 0.0, weights[..., None] * hidden.float())
    sums.scatter_add_(1, places[..., None].expand_as(weighted), weighted)
    total = weights.new_zeros((batch, tokens + 1)).scatter_add_(1, places, weights)
    merged = (sums / total[..., None])[:, :tokens]
    # A token alone in its group stays bit for bit; so does one that carries no weight.
    alone = torch.zeros_like(total, dtype=torch.int64).scatter_add_(1, places, torch.ones_like(places))
    keep = (alone[:, :tokens] < 2) | (total[:, :tokens] == 0)
    return gather_tokens(torch.where(keep[..., None], hidden, merged.to(hidden.dtype)), rows, 1)


def pooled_rows(vision: Tensor, mask: Tensor | None, window: int) -> tuple[Tensor, Tensor]:
    """See `ops_prune.pooled_rows`."""
    batch, tokens = vision.shape
    real, seen = prunable(vision, mask, (batch, tokens))
    place = torch.arange(tokens, device=vision.device).expand(batch, tokens)
    begins = seen & ~torch.nn.functional.pad(seen[:, :-1], (1, 0))
    start = torch.where(begins, place, 0).cummax(1).values
    first = start + (place - start) // window * window
    group = torch.where(seen, first, torch.where(real, place, -1))
    return positions(group == place), group


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores with a mask applied, True or 0 for what may be attended to."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.float()
