"""The `attnpack::` operators that let fewer tokens flow from a decoder layer on; see `aten/prune.py` for `rows`.

`reference_prune.py` defines what each must compute.
"""

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size

from attnpack_fx.kernels import aten
from attnpack_fx.kernels.no_gradient import refuse_gradient
from attnpack_fx.kernels.registering import fake, operator


def _new_rows(like: Tensor) -> Tensor:
    size = allocate_size(torch.library.get_ctx()._shape_env)
    return like.new_empty((like.shape[0], size), dtype=torch.int64)


@operator()
def gather_tokens(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """The rows of x that stay.

    x: `[B or 1, ..., T, ...]` with its tokens in dimension `dim`, not the first. rows: int64 `[B, T']`, logical
    positions, ascending, filled up with -1; a filler row is a copy of its sample's last.
    Returns `[B, ..., T', ...]`, of x's dtype.
    """
    return aten.gather_tokens(x, rows, dim)


@fake("gather_tokens")
def _(x, rows, dim):
    return x.new_empty((rows.shape[0], *x.shape[1:dim], rows.shape[1], *x.shape[dim + 1 :]))


@operator()
def gather_mask(mask: Tensor, rows: Tensor) -> Tensor:
    """Rows and columns of an attention mask that stay; columns of filler are masked.

    mask: `[T, T]` or `[B or 1, H or 1, T or 1, T]`, bool (True: attend) or added to the scores. rows: as in
    `gather_tokens`. Returns `[B, H or 1, T' or 1, T']`.
    """
    return aten.gather_mask(mask, rows)


@fake("gather_mask")
def _(mask, rows):
    batch, kept = rows.shape
    heads, queries = (1, kept) if mask.dim() == 2 else (mask.shape[1], 1 if mask.shape[2] == 1 else kept)
    return mask.new_empty((batch, heads, queries, kept))


@operator()
def scatter_tokens(full: Tensor, rows: Tensor, part: Tensor) -> Tensor:
    """`full` `[B, T, C]` with `part` `[B, T', C]` at `rows` `[B, T']`; filler writes nowhere. A new tensor."""
    return aten.scatter_tokens(full, rows, part)


@fake("scatter_tokens")
def _(full, rows, part):
    return full.new_empty(full.shape)


@operator()
def last_row_scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """How much the last real prompt token attends to every token, averaged over query heads.

    query: `[B, Hq, T, D]`; key: `[B, H, T, D]`, `Hq` a multiple of H, both as attention reads them.
    mask: `[T, T]` or `[B or 1, Hq or 1, T, T]`, bool or added to the scores, None: causal. A token that no query may
    attend to is padding.
    Returns fp32 `[B, T]`, rows adding up to 1.
    """
    return aten.last_row_scores(query, key, mask, scale)


@fake("last_row_scores")
def _(query, key, mask, scale):
    return query.new_empty((query.shape[0], query.shape[2]), dtype=torch.float32)


@operator()
def kept_rows(scores: Tensor, vision: Tensor, mask: Tensor | None, share: float) -> Tensor:
    """Which rows stay when of every sample's N vision tokens the `round(share N)` of highest score do.

    scores: fp32 `[B, T]`, among equals earlier tokens win; vision: bool `[B or 1, T]`; mask: as in `last_row_scores`.
    All other tokens stay, so does the last one whatever it is; padding goes. Returns rows, int64 `[B, T']`; T' depends
    on the data.
    """
    return aten.kept_rows(scores, vision, mask, share)


@fake("kept_rows")
def _(scores, vision, mask, share):
    return _new_rows(scores)


@operator()
def random_scores(like: Tensor, seed: int) -> Tensor:
    """Uniform numbers of a generator seeded with `seed`, the same at every call: fp32, of the shape of `like`."""
    return aten.random_scores(like, seed)


@fake("random_scores")
def _(like, seed):
    return like.new_empty(like.shape, dtype=torch.float32)


@operator()
def pooled_rows(vision: Tensor, mask: Tensor | None, window: int) -> tuple[Tensor, Tensor]:
    """Runs of consecutive vision tokens in groups of `window`, the last of a run smaller; the first of each stays.

    vision: bool `[B, T]`; mask: as in `last_row_scores`.
    Returns rows, int64 `[B, T']`, and group, int64 `[B, T]`: the position whose row a token is merged into, for other
    tokens their own, -1 for padding. T' depends on the data.
    """
    return aten.pooled_rows(vision, mask, window)


@fake("pooled_rows")
def _(vision, mask, window):
    return _new_rows(vision), vision.new_empty(vision.shape, dtype=torch.int64)


@operator()
def merge_tokens(hidden: Tensor, rows: Tensor, group: Tensor, weight: Tensor) -> Tensor:
    """Weighted means of groups of tokens: `sum_t w_t h_t / sum_t w_t` over the tokens whose group is the row.

    hidden: `[B, T, C]`; rows: int64 `[B, T']`; group: int64 `[B, T]`, a position that is among rows, or -1.
    weight: `[B, T]`, not negative; a group of weight 0 keeps its row as it is, so does a group of one.
    Returns `[B, T', C]` in hidden's dtype, means taken in fp32.
    """
    return aten.merge_tokens(hidden, rows, group, weight)


@fake("merge_tokens")
def _(hidden, rows, group, weight):
    return hidden.new_empty((hidden.shape[0], rows.shape[1], hidden.shape[2]))


@operator()
def bidirectional_scores(
    query: Tensor, key: Tensor, vision: Tensor, mask: Tensor | None, scale: float, strongest: float
) -> tuple[Tensor, Tensor]:
    """Attention received under ASAP's soft mask, where vision tokens also see later ones (eq. 2-5).

    query, key, mask, scale: as in `last_row_scores`; vision: bool `[B or 1, T]`; strongest: lambda_max, in (0, 1].
    With W the scores: `s_j = sum over vision queries i of W_ij`, `lambda_j = lambda_max s^_j` with s^ scaled to [0, 1]
    over the vision tokens; vision queries see later vision tokens j with `ln(max(lambda_j, 1e-6))` added.
    Returns fp32 `[B, T]`: attention summed over the real queries, and s, both averaged over query heads.
    """
    return aten.bidirectional_scores(query, key, vision, mask, scale, strongest)


@fake("bidirectional_scores")
def _(query, key, vision, mask, scale, strongest):
    made = query.new_empty((query.shape[0], query.shape[2]), dtype=torch.float32)
    return made, torch.empty_like(made)


@operator()
def merged_rows(
    hidden: Tensor,
    attention: Tensor,
    raw: Tensor,
    vision: Tensor,
    mask: Tensor | None,
    most: int,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """ASAP's choice of tokens: best by attention, similar ones merged (eq. 6), as many others salvaged.

    hidden: `[B, T, C]`; attention, raw: as `bidirectional_scores` returns them; vision, mask: as in `kept_rows`;
    most: how many vision tokens stay; threshold: the cosine above which one absorbs another of no larger weight.
    Returns rows int64 `[B, T']`, group int64 `[B, T]` and weight fp32 `[B, T]`, as `merge_tokens` takes them. T'
    depends on the data.
    """
    return aten.merged_rows(hidden, attention, raw, vision, mask, most, threshold)


@fake("merged_rows")
def _(hidden, attention, raw, vision, mask, most, threshold):
    return _new_rows(raw), raw.new_empty(raw.shape, dtype=torch.int64), torch.empty_like(raw)


for _name in ("gather_tokens", "scatter_tokens", "merge_tokens"):
    refuse_gradient(_name)
