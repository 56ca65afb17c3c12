"""The operators in ATen calls: what every device can run, and what runs on CPU."""

from attnpack_fx.kernels.aten.asap import bidirectional_scores, merged_rows
from attnpack_fx.kernels.aten.attention import attention
from attnpack_fx.kernels.aten.decompress import decompress
from attnpack_fx.kernels.aten.factorize import align, compress, fold, sketch
from attnpack_fx.kernels.aten.linear import linear
from attnpack_fx.kernels.aten.observe import observe, observe_newest
from attnpack_fx.kernels.aten.plan import plan
from attnpack_fx.kernels.aten.prune import (
    gather_mask,
    gather_tokens,
    kept_rows,
    last_row_scores,
    merge_tokens,
    pooled_rows,
    random_scores,
    scatter_tokens,
)
from attnpack_fx.kernels.aten.rows import append_, take_rows
from attnpack_fx.kernels.aten.shared_basis import compress_shared

__all__ = [
    "align",
    "append_",
    "attention",
    "bidirectional_scores",
    "compress",
    "compress_shared",
    "decompress",
    "fold",
    "gather_mask",
    "gather_tokens",
    "kept_rows",
    "last_row_scores",
    "linear",
    "merge_tokens",
    "merged_rows",
    "observe",
    "observe_newest",
    "plan",
    "pooled_rows",
    "random_scores",
    "scatter_tokens",
    "sketch",
    "take_rows",
]
